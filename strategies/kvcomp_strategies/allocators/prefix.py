"""The same share of importance for every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcomp.core.types import LayerView, Scores
from kvcomp_strategies.apportioning import PromptAllocator, allot, held_tokens, protected_tokens
from kvcomp_strategies.ranking import counts_among_best


class Prefix(PromptAllocator, use="prefix"):
    """PrefixKV's layer budgets (arXiv:2412.03409; THU-MIG/PrefixKV, `prefixkv.py`): each layer keeps the shortest
    prefix of its tokens, sorted by importance, that holds a share of all importance; the share is the same for every
    layer and as large as the budget allows. What is protected comes on top.

    Importance is the mean of the scores over the KV heads, which must not be negative (less counts as 0); heads of a
    layer get the same.

    Deviations: the official code finds the share by halving on a few sample prompts, to 5 tokens, rescales what it
    found and stores the sizes per model and ratio; here every prompt gets its own, and the sum is exact: the prefixes
    grow token by token, where the share held so far is smallest, equal ones at the earlier layer.
    """

    def allocate(self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the slots of each head, `(layers, batch, kv_heads)`."""
        held, protected = (count.amax(dim=2) for count in (held_tokens(layers), protected_tokens(scores)))
        before = [_held_before(layer, score) for layer, score in zip(layers, scores, strict=True)]
        tokens = max(share.shape[-1] for share in before)
        shares = torch.stack([F.pad(share, (0, tokens - share.shape[-1])).cpu() for share in before], dim=-1)
        free = torch.arange(tokens)[:, None] < (held - protected).T[:, None]  # (batch, tokens, layers)
        pooled = (slots * len(layers) - protected.sum(dim=0)).clamp(min=0)
        weights = protected + counts_among_best([-shares], free, pooled).T
        return allot(weights[..., None], slots, layers, scores)


def _held_before(layer: LayerView, scores: Scores) -> Tensor:
    """Return the share of importance that the more important tokens hold, `(batch, tokens)` float64, ascending."""
    values = scores.values.double().clamp(min=0).masked_fill(~layer.valid, 0.0).mean(dim=1)
    ranked = values.sort(dim=-1, descending=True).values
    total = ranked.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(ranked.dtype).tiny)
    return (ranked.cumsum(dim=-1) - ranked) / total
