"""An allocator of the tests: heads that keep very different numbers of slots, and together exactly the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from kvcomp_strategies.stores.dense import Dense
from kvcomp_strategies.stores.ragged import Ragged
from torch import Tensor

import kvcomp
from kvcomp.core.config import strategy


class Skewed(kvcomp.BudgetAllocator, use="skewed"):
    """Every other head gives three quarters of its slots to its neighbour, as far as that has tokens for them."""

    def allocate(self, slots: Tensor, layers: Sequence[kvcomp.LayerView], scores: Sequence[kvcomp.Scores]) -> Tensor:
        """Return the slots of each head."""
        return torch.stack([self._of_layer(slots, layer) for layer in layers])

    def _of_layer(self, slots: Tensor, layer: kvcomp.LayerView) -> Tensor:
        heads = layer.shape[1]
        allotted = slots[:, None].repeat(1, heads)
        free = layer.valid.sum(dim=-1).cpu() - allotted
        for first in range(0, heads - 1, 2):
            poor, rich = (first, first + 1) if layer.layer % 2 == 0 else (first + 1, first)
            given = (slots * 3 // 4).minimum(free[:, rich]).clamp(min=0)
            allotted[:, poor] -= given
            allotted[:, rich] += given
        return allotted


def skewed(recipe: str, budget: Any, store: str = "ragged", **overrides: Any) -> kvcomp.Strategy:
    """Return a recipe whose heads differ, with `ragged` or `dense` storage."""
    built = strategy(recipe, budget, **overrides)
    return replace(built, allocator=Skewed(), store=Ragged() if store == "ragged" else Dense())
