"""Small keys matter most."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.core.interfaces import Scorer
from kvcomp.core.types import LayerView


class KeyNorm(Scorer, use="key-norm"):
    """Score by the negative L2 norm of the key: the keys with the smallest norms draw the most attention
    (arXiv:2406.11430; NVIDIA/kvpress, `kvpress/presses/knorm_press.py`).

    No attention is needed. Deviations: the paper's code leaves the first two layers uncompressed; here all layers share
    the budget.
    """

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return minus the norm of each key."""
        norms: Tensor = torch.linalg.vector_norm(layer.keys.float(), dim=-1)
        return -norms
