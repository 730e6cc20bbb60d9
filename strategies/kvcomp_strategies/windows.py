"""Windows of recent tokens and sums over query groups: what several scorers share."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Annotated

import torch
from einops import rearrange
from pydantic import AfterValidator, Field
from torch import Tensor

from kvcomp.core.types import LayerView


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError("must be odd, so that the pooled score stays at its token")
    return kernel


Kernel = Annotated[int, Field(ge=1), AfterValidator(_odd)]
"""Width of a pooling window."""


def share_of(slots: Tensor, share: float) -> Tensor:
    """Return floor(share * slots) for the decimal as written, as a budget's slots are: 0.35 of 20 is 7.

    >>> share_of(torch.tensor([20, 100]), 0.35).tolist()
    [7, 35]
    """
    exact = Fraction(str(share))
    return slots * exact.numerator // exact.denominator


def last_tokens(layer: LayerView, count: Tensor) -> Tensor:
    """Return the last `count` valid tokens of each head as a mask, `(batch, kv_heads, tokens)` bool.

    Args:
        layer: what the layer holds.
        count: `(batch,)` or `(batch, kv_heads)`.
    """
    count = count.to(layer.valid.device).reshape(layer.shape[0], -1, 1)
    from_end = layer.valid.flip(-1).cumsum(-1).flip(-1)  # 1 at the last valid token
    return layer.valid & (from_end <= count)


def group_mean(per_head: Tensor, kv_heads: int) -> Tensor:
    """Return the mean over the query heads that share a KV head: `(batch, heads, ...)` to `(batch, kv_heads, ...)`."""
    return rearrange(per_head, "b (kv group) ... -> b kv group ...", kv=kv_heads).mean(dim=2)


def sum_last_rows(rows: Tensor, count: Tensor) -> Tensor:
    """Return the sum of the last `count` rows: `(batch, heads, rows, tokens)` to `(batch, heads, tokens)`.

    Args:
        rows: right-aligned attention rows.
        count: `(batch,)`, how many of them vote.
    """
    from_end = torch.arange(rows.shape[2], 0, -1, device=rows.device)
    votes = (from_end <= count.to(rows.device)[:, None]).to(rows.dtype)  # (batch, rows)
    return torch.einsum("bhrt,br->bht", rows, votes)


def pool_average(scores: Tensor, eligible: Tensor, kernel: int) -> Tensor:
    """Return scores averaged over `kernel` neighbours, `(batch, kv_heads, tokens)`, counting only the eligible ones.

    Neighbours are neighbours among the eligible tokens: padding between two of them does not part them. What is not
    eligible scores 0.
    """
    return _pool(scores, eligible, kernel, _average)


def pool_largest(scores: Tensor, eligible: Tensor, kernel: int) -> Tensor:
    """Return the largest score of `kernel` neighbours, as `pool_average` returns their mean."""
    return _pool(scores, eligible, kernel, _largest)


def _pool(scores: Tensor, eligible: Tensor, kernel: int, pool: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    if kernel == 1:
        return scores.masked_fill(~eligible, 0.0)
    order = (~eligible).to(torch.uint8).argsort(dim=-1, stable=True)  # the eligible first, in order
    there = eligible.gather(-1, order)
    pooled = pool(scores.gather(-1, order), there, kernel).masked_fill(~there, 0.0)
    return torch.zeros_like(pooled).scatter_(-1, order, pooled)


def _average(scores: Tensor, there: Tensor, kernel: int) -> Tensor:
    weight = there.to(scores.dtype)
    return _box_sum(scores * weight, kernel) / _box_sum(weight, kernel).clamp(min=1.0)


def _largest(scores: Tensor, there: Tensor, kernel: int) -> Tensor:
    lowest = scores.masked_fill(~there, -torch.inf)
    return torch.nn.functional.max_pool1d(lowest, kernel, stride=1, padding=kernel // 2)


def _box_sum(values: Tensor, kernel: int) -> Tensor:
    pooled = torch.nn.functional.avg_pool1d(values, kernel, stride=1, padding=kernel // 2, count_include_pad=True)
    return pooled * kernel
