"""A fair lottery: the control that every method must beat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Scorer
from kvcomp.core.types import LayerView
from kvcomp_strategies.hashing import uniform


class Random(Scorer, use="random"):
    """Score by a hash of seed, layer, head and logical position: independent per head, the same for a row in any batch.

    So prompts draw the same lots at the same positions. In an experiment every sample draws its own: its number is
    hashed as well (`for_samples`).

    Attributes:
        seed: another seed gives another choice.
        samples: the number of each row's sample; none by default.
    """

    seed: int = Field(default=0, ge=0, lt=2**31)
    samples: tuple[int, ...] = Field(default=(), strict=False)

    def for_samples(self, numbers: Sequence[int]) -> Random:
        """Return the lottery of these samples."""
        return self.model_copy(update={"samples": tuple(numbers)})

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1), `(batch, kv_heads, tokens)` float64: no ties in practice."""
        heads = torch.arange(layer.shape[1], device=layer.indices.device)[:, None]
        if not self.samples:
            return uniform(layer.indices, self.seed, layer.layer, heads)
        rows = zip(layer.indices, self.samples, strict=True)
        return torch.stack([uniform(row, _seed_of(self.seed, number), layer.layer, heads) for row, number in rows])


def _seed_of(seed: int, number: int) -> int:
    """Return the seed of one sample, below 2 ** 31."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "big") >> 1
