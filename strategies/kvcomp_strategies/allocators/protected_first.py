"""What is protected, and the same number beyond it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcomp.core.interfaces import BudgetAllocator
from kvcomp.core.types import LayerView, Scores
from kvcomp_strategies.apportioning import allot, check_room, even_share, held_tokens, protected_tokens


class ProtectedFirst(BudgetAllocator, use="protected-first"):
    """Give every head what is protected there, and all heads of all layers the same number of slots as far as that
    allows.

    With a scorer that protects whole layers, the others share what these leave (FastV, arXiv:2403.06764). A budget
    below what is protected is refused: no protected token is ever dropped.
    """

    scope = "model"
    firm = True

    def allocate(self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the slots of each head, `(layers, batch, kv_heads)`.

        Raises:
            BudgetError: the budget does not hold what is protected; with the smallest ratio that does.
        """
        held = held_tokens(layers)
        check_room(_needed(held, scores), held.amax(dim=(0, 2)), slots, "what this method never drops")
        return allot(torch.ones(held.shape, dtype=torch.float64), slots, layers, scores)

    def least(self, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the share that holds what is protected, `(batch,)`."""
        return even_share(_needed(held_tokens(layers), scores))


def _needed(held: Tensor, scores: Sequence[Scores]) -> Tensor:
    return protected_tokens(scores).clamp(min=1).minimum(held)
