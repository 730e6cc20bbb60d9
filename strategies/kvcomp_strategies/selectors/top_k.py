"""Keep the best."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.core.interfaces import PivotSelector
from kvcomp.core.types import LayerView, Pivots, Scores
from kvcomp_strategies.ranking import best_first


class TopK(PivotSelector, use="top-k"):
    """Keep the protected tokens, then the highest tiers, then the highest scores; equal scores go to the earlier token.

    The order is lexicographic (protected, tier, score, place); see `kvcomp_strategies.ranking`. Sorted by place at the
    end. A smaller budget keeps a subset of a larger one's choice where tiers and protection do not change with it.

    Attributes:
        overflow: also keep every token above the lowest tier, beyond the budget: the official LOOK-M keeps all text,
            however little was asked for, and with it text-only prompts as they are.
    """

    requires = frozenset({"scores"})

    overflow: bool = False

    def select(self, layer: LayerView, scores: Scores, slots: Tensor) -> Pivots:
        """Return the pivots, `slots` `(batch, kv_heads)` of them per head."""
        if self.overflow:  # one sync on an accelerator, since it decides a shape
            slots = slots.maximum((scores.priority(layer.valid) > 1).sum(dim=-1).to(slots.device))
        tokens, most = layer.shape[2], int(slots.max())
        if int(slots.min()) == tokens:  # every head holds so many valid tokens, so everything stays
            return Pivots(torch.arange(tokens, device=layer.keys.device).expand(layer.shape))
        mask = self._mask(slots, layer)
        chosen = best_first(scores, layer.valid)[..., :most]
        if mask is not None:
            chosen = chosen.masked_fill(~mask, tokens)
        chosen = chosen.sort(dim=-1).values
        return Pivots(chosen if mask is None else chosen.masked_fill(~mask, 0), mask)

    @staticmethod
    def _mask(slots: Tensor, layer: LayerView) -> Tensor | None:
        """Return which slots are filled, or None where all are."""
        most = int(slots.max())
        if int(slots.min()) == most:
            return None
        return torch.arange(most, device=layer.keys.device) < slots.to(layer.keys.device)[..., None]
