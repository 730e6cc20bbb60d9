"""One budget for many heads: what every allocator other than `uniform` shares.

A *bin* is one KV head of one layer. Whatever the method's weights are, the slots of all bins sum to the budget exactly,
none gets more than it holds, and what one cannot hold goes to the others. Everything here is on the CPU, since slots
decide shapes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from kvcomp.core.errors import BudgetError
from kvcomp.core.interfaces import BudgetAllocator
from kvcomp.core.types import LayerView, Scores

ROUNDING = 1e-9  # remainders (and quotas) nearer than this are equal
FAINTEST = 1e-9  # of the largest weight: a bin without weight still gets what nobody else can hold


class PromptAllocator(BudgetAllocator):
    """Budgets of layers by what the last forward of several tokens tells of them. While tokens are decoded the layers
    share as they did after that: what a layer has given up it could not have back.
    """

    scope = "model"

    def reallocate(
        self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores], granted: Tensor
    ) -> Tensor:
        """Return the slots of each head, `(layers, batch, kv_heads)`, in proportion to what it was given."""
        return allot(granted, slots, layers, scores)


def held_tokens(layers: Sequence[LayerView]) -> Tensor:
    """Return how many tokens each head holds, `(layers, batch, kv_heads)` int64 on the CPU."""
    return torch.stack([layer.valid.sum(dim=-1).cpu() for layer in layers])


def protected_tokens(scores: Sequence[Scores]) -> Tensor:
    """Return how many tokens of each head are protected, `(layers, batch, kv_heads)` int64 on the CPU."""
    return torch.stack([score.protected.sum(dim=-1).cpu() for score in scores])


def allot(
    weights: Tensor,
    slots: Tensor,
    layers: Sequence[LayerView],
    scores: Sequence[Scores],
    whole: Collection[int] = (),
) -> Tensor:
    """Return the slots of each head in proportion to its weight, `(layers, batch, kv_heads)` int64 on the CPU.

    Every head gets at least 1 slot and what is protected, at most what it holds; within these bounds the slots are
    proportional to the weights. Where the budget is below the sum of what is protected, it is divided in proportion to
    that.

    Args:
        weights: `(layers, batch, kv_heads)` or `(layers, batch, 1)`, not negative; only their ratios matter.
        slots: the uniform share, `(batch,)`.
        layers: that share the budget.
        scores: of the same layers.
        whole: places in `layers` of those that keep everything.

    Raises:
        BudgetError: the layers that keep everything leave less than 1 slot to each of the others.
    """
    held, protected = held_tokens(layers), protected_tokens(scores)
    kept_whole = torch.tensor([place in whole for place in range(len(layers))])[:, None, None]
    least = protected.clamp(min=1).minimum(held)
    if whole:
        check_room(needed_beside(held, whole), held.amax(dim=(0, 2)), slots, f"layers {sorted(whole)} kept whole")
    shares = apportion(
        _bins(weights.double().cpu().expand(held.shape)),
        slots * held[:, 0].numel(),
        _bins(torch.where(kept_whole, held, least)),
        _bins(held),
        firm=_bins(torch.where(kept_whole, held, held.clamp(max=1))),
        precedence=_precedence(layers, scores),
    )
    return shares.view(held.shape[1], held.shape[0], held.shape[2]).transpose(0, 1).contiguous()


def check_room(needed: Tensor, tokens: Tensor, slots: Tensor, what: str) -> None:
    """Raise where heads need more slots, `(layers, batch, kv_heads)`, than the budget has.

    Args:
        needed: by each head.
        tokens: that a head of each row holds, `(batch,)`: what a ratio is of.
        slots: the uniform share, `(batch,)`.
        what: takes so many, for the message.

    Raises:
        BudgetError: with the smallest ratio that holds what is needed.
    """
    share = even_share(needed)
    if bool((share <= slots).all()):
        return
    rows = zip(share.tolist(), tokens.tolist(), slots.tolist(), strict=True)
    need, held, given = max(rows, key=lambda row: row[0] / max(row[1], 1))
    smallest = min(1.0, math.ceil(need / max(held, 1) * 10**6 - ROUNDING) / 10**6)
    raise BudgetError(
        f"the budget must hold {what}, which takes {need} of {held} slots per head and layer, and it has {given}; give "
        f"a ratio of at least {smallest:g}, as `budget={smallest:g}` or `--budget {smallest:g}`",
        smallest=smallest,
    )


def needed_beside(held: Tensor, whole: Collection[int]) -> Tensor:
    """Return what heads need where the layers at some places keep everything and the others 1 slot, as `held`."""
    kept_whole = torch.tensor([place in whole for place in range(len(held))])[:, None, None]
    return torch.where(kept_whole, held, held.clamp(max=1))


def even_share(needed: Tensor) -> Tensor:
    """Return the smallest uniform share that sums to what heads need, `(layers, batch, kv_heads)`, as `(batch,)`."""
    heads = needed[:, 0].numel()
    return (needed.sum(dim=(0, 2)) + heads - 1) // heads


def apportion(
    weights: Tensor, total: Tensor, least: Tensor, most: Tensor, *, firm: Tensor, precedence: Tensor | None = None
) -> Tensor:
    """Return whole numbers in proportion to the weights, `(batch, bins)` int64, each between `least` and `most`.

    They are the quotas `clamp(level * weight, least, most)`, with the level at which they sum to the total, rounded by
    largest remainder. Where the total is below the sum of `least`, it is divided in proportion to `least`, from `firm`
    up. The sum is exact: the total, or the sum of `most` where that is less.

    Args:
        weights: `(batch, bins)` float64, not negative.
        total: `(batch,)` int64, at least the sum of `firm`.
        least: `(batch, bins)` int64, at most `most`.
        most: `(batch, bins)` int64.
        firm: `(batch, bins)` int64, what a bin gets even where the total is below the sum of `least`.
        precedence: `(batch, bins)` int64, the bins in the order in which equal remainders are served.

    >>> one, bins = torch.tensor([[1, 1, 1]]), torch.tensor([[6.0, 3.0, 1.0]], dtype=torch.float64)
    >>> apportion(bins, torch.tensor([9]), one, torch.tensor([[4, 9, 9]]), firm=one)
    tensor([[4, 4, 1]])
    """
    total = total.minimum(most.sum(dim=-1))
    forced = (least.sum(dim=-1) > total)[:, None]
    weights = torch.where(forced, least.double(), weights)
    least, most = torch.where(forced, firm, least), torch.where(forced, least, most)
    quotas = _quotas(_positive(weights), total, least, most)
    return _rounded(quotas, total, most, torch.arange(weights.shape[1]) if precedence is None else precedence)


def _positive(weights: Tensor) -> Tensor:
    """Return the weights with those at zero just above it; all equal where all are zero."""
    largest = weights.amax(dim=-1, keepdim=True)
    return torch.where(largest > 0, weights / largest.clamp(min=torch.finfo(weights.dtype).tiny), 1.0).clamp(
        min=FAINTEST
    )


def _quotas(weights: Tensor, total: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Return clamp(level * weight, least, most), `(batch, bins)` float64, at the level where they sum to the total.

    The sum rises with the level along straight lines between the levels at which a bin leaves `least` or reaches
    `most`. The piece on which the total lies is found first; on it the level is the solution of a linear equation.
    """
    low, high = least / weights, most / weights
    bends = torch.cat([low, high], dim=-1).sort(dim=-1).values  # (batch, 2 bins)
    reached = (bends[..., None] * weights[:, None]).clamp(least[:, None], most[:, None]).sum(dim=-1)
    piece = torch.searchsorted(reached, total.double()[:, None]).clamp(1, bends.shape[1] - 1)
    start, end = bends.gather(1, piece - 1), bends.gather(1, piece)
    full, empty = high <= start, low >= end
    free = ~full & ~empty
    settled = torch.where(full, most, least).masked_fill(free, 0).sum(dim=-1)
    level = (total - settled) / (weights * free).sum(dim=-1).clamp(min=FAINTEST)
    level = torch.where(free.any(dim=-1), level, end[:, 0])
    return (level[:, None] * weights).clamp(least, most)


def _rounded(quotas: Tensor, total: Tensor, most: Tensor, precedence: Tensor) -> Tensor:
    """Return whole numbers that sum to the total: rounded down, then one more for the largest remainders."""
    down = (quotas + ROUNDING).floor().long()
    remainder = ((quotas - down).clamp(min=0) / ROUNDING).round().masked_fill(down >= most, -1)
    order = precedence.expand_as(down)
    order = order.gather(1, remainder.gather(1, order).argsort(dim=-1, descending=True, stable=True))
    missing = (total - down.sum(dim=-1))[:, None]
    return down.scatter_add(1, order, (torch.arange(down.shape[1]) < missing).long())


def _precedence(layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
    """Return the bins, layer by layer; within a layer the head with more score first, so that no head's number decides.

    `(batch, bins)` int64.
    """
    sums = [
        score.values.masked_fill(~layer.valid, 0.0).double().sum(dim=-1).cpu()
        for layer, score in zip(layers, scores, strict=True)
    ]
    heads = torch.stack(sums).argsort(dim=-1, descending=True, stable=True)  # (layers, batch, kv_heads)
    return _bins(heads + torch.arange(len(layers))[:, None, None] * heads.shape[2])


def _bins(per_head: Tensor) -> Tensor:
    """Return `(layers, batch, kv_heads)` as `(batch, bins)`."""
    return per_head.transpose(0, 1).flatten(1)
