"""The order of tokens, within a head and among heads: priority (protected, tiers), then score, then place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcomp.core.types import Scores


def best_first(scores: Scores, valid: Tensor) -> Tensor:
    """Return the tokens of each head in the order in which they are kept, `(batch, kv_heads, tokens)` int64.

    Lexicographic, by stable sorts instead of added constants, which would swallow small scores in low precision. What
    is no token comes last.
    """
    order = scores.values.argsort(dim=-1, descending=True, stable=True)
    priority = scores.priority(valid)
    return order.gather(-1, priority.gather(-1, order).argsort(dim=-1, descending=True, stable=True))


def counts_among_best(keys: Sequence[Tensor], eligible: Tensor, count: Tensor) -> Tensor:
    """Return how many of a row's best entries are in each bin, `(batch, bins)` int64 on the CPU.

    Args:
        keys: `(batch, tokens, bins)` each, what entries are ordered by, the most significant first, higher is better;
            then the earlier token, then the earlier bin.
        eligible: `(batch, tokens, bins)` bool.
        count: how many are the best, `(batch,)` int64 on the CPU; all where there are no more.

    >>> scores = torch.tensor([[[0.9, 0.5], [0.3, 0.8]]])
    >>> counts_among_best([scores], scores > 0, torch.tensor([3]))
    tensor([[1, 2]])
    """
    rows = [
        _best_of_row([key[row].flatten() for key in keys], eligible[row].flatten(), wanted)
        for row, wanted in enumerate(count.tolist())
    ]
    return torch.stack(rows).view(eligible.shape).sum(dim=1).cpu()


def _best_of_row(keys: Sequence[Tensor], eligible: Tensor, count: int) -> Tensor:
    """Return which entries are the best, bool. A threshold per key: faster than a sort, and equal keys stay in order.

    The counts are read back from the device: they decide shapes.
    """
    count = min(count, int(eligible.sum()))
    chosen, contenders = torch.zeros_like(eligible), eligible
    for key in keys:
        if count == 0:
            return chosen
        rated = key.masked_fill(~contenders, -torch.inf)
        threshold = rated.kthvalue(rated.numel() - count + 1).values
        above = contenders & (rated > threshold)
        chosen, contenders = chosen | above, contenders & (rated == threshold)
        count -= int(above.sum())
    return chosen | (contenders & (contenders.cumsum(dim=0) <= count))
