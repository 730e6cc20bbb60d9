"""A fair lottery: the control that every method must beat."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Scorer
from kvcomp.core.types import LayerView
from kvcomp_strategies.hashing import uniform


class Random(Scorer, use="random"):
    """Score by a hash of seed, layer, head and logical position: independent per head, the same for a row in any batch.

    Attributes:
        seed: another seed gives another choice.
    """

    seed: int = Field(default=0, ge=0, lt=2**31)

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1), `(batch, kv_heads, tokens)` float64: no ties in practice."""
        heads = torch.arange(layer.shape[1], device=layer.indices.device)[:, None]
        return uniform(layer.indices, self.seed, layer.layer, heads)
