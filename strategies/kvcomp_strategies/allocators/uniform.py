"""The same number of slots for every head of every layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvcomp.core.interfaces import BudgetAllocator
from kvcomp.core.types import LayerView, Scores


class UniformAllocator(BudgetAllocator, use="uniform"):
    """Give every KV head of every layer the uniform share."""

    even = True

    def allocate(self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the uniform share for every head, `(layers, batch, kv_heads)`."""
        batch, kv_heads, _ = layers[0].shape
        return slots[None, :, None].expand(len(layers), batch, kv_heads)
