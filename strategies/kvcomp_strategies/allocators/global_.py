"""One budget for all layers and heads. (`global` is a keyword, so the module's name has an underscore.)"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import BudgetAllocator
from kvcomp.core.types import LayerView, Scores
from kvcomp_strategies.apportioning import allot, held_tokens, protected_tokens
from kvcomp_strategies.ranking import best_first, counts_among_best
from kvcomp_strategies.windows import share_of

EMPTY = -1.0  # the priority of what is no token of a layer


class Global(BudgetAllocator, use="global"):
    """The best tokens of all heads of all layers, in one ranking: KVzip's non-uniform budgets (arXiv:2505.23416) with a
    floor per head.

    Each head first gets its own best tokens up to the floor; the rest of the budget goes to the best of all others,
    wherever they are. Scores must be comparable between layers, as attention probabilities are. Equal scores go to
    the earlier token. The sum is exact; where the budget is below what is protected, it is divided in proportion to
    that, by largest remainder.

    Attributes:
        floor: a head gets at least this part of the uniform share (rounded down), what is protected, and 1 slot.
    """

    scope = "model"

    floor: float = Field(default=0.1, ge=0.0, le=1.0)

    def allocate(self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the slots of each head, `(layers, batch, kv_heads)`."""
        held, protected = held_tokens(layers), protected_tokens(scores)
        floor = share_of(slots, self.floor).clamp(min=1)
        least = protected.maximum(floor[:, None]).minimum(held)  # (layers, batch, kv_heads)
        ranked = [_keys(*one) for one in zip(layers, scores, least, strict=True)]
        device, tokens = ranked[0].device, max(keys.shape[-1] for keys in ranked)
        wide = [F.pad(keys, (0, tokens - keys.shape[-1]), value=EMPTY).to(device) for keys in ranked]
        keys = torch.cat(wide, dim=2).transpose(2, 3)  # (3, batch, tokens, bins)
        counts = counts_among_best(list(keys), keys[1] > EMPTY, slots * held[:, 0].numel())
        weights = counts.view(held.shape[1], held.shape[0], held.shape[2]).transpose(0, 1)
        return allot(weights, slots, layers, scores)


def _keys(layer: LayerView, scores: Scores, least: Tensor) -> Tensor:
    """Return what a layer's tokens are ranked by, `(3, batch, kv_heads, tokens)` float32.

    Whether a token is among the `least` `(batch, kv_heads)` best of its head, its priority, and its score.
    """
    order = best_first(scores, layer.valid)
    first = torch.arange(layer.shape[2], device=order.device) < least.to(order.device)[..., None]
    granted = torch.zeros_like(layer.valid).scatter(-1, order, first)
    priority = scores.priority(layer.valid).float().masked_fill(~layer.valid, EMPTY)
    return torch.stack([granted.float(), priority, scores.values.float()])
