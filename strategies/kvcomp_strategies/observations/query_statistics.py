"""Mean and covariance of what a head asks for, whatever its position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import AttentionBlock

ROUNDING = 1e-9  # of the size of the queries: what large numbers leave when they cancel


class Moments(NamedTuple):
    """Of the queries so far: how many of each row were seen and counted, `(batch,)`; their mean `(batch, heads,
    head_dim)` and the sum of the products of their distances from it, `(batch, heads, head_dim, head_dim)`, float64.
    """

    seen: Tensor
    counted: Tensor
    mean: Tensor
    scatter: Tensor


class QueryStatistics(Observation, use="query-statistics"):
    """Mean and covariance of the queries before their rotary embedding, times the model's scaling of logits:
    `(batch, heads, 1 + head_dim, head_dim)` float32, the mean in the first row.

    What Expected Attention (arXiv:2510.00636; NVIDIA/kvpress, `kvpress/presses/expected_attention_press.py`) needs of
    the prompt. Both are 0 where a row has no query to count. Blocks are joined by their means (Chan, Golub and LeVeque,
    1979), so that no large numbers are subtracted.

    Attributes:
        sinks: how many of the first queries of each row are left out, as outliers.
    """

    rotary = True
    queries_only = True

    sinks: int = Field(default=4, ge=0)

    def update(self, state: Moments | None, block: AttentionBlock) -> Moments:
        """Return the moments with those of the block's queries."""
        assert block.rotary is not None
        queries = block.rotary.unrotate(block.queries).double() * block.scaling
        seen = block.row_valid.new_zeros(len(queries), dtype=torch.int64) if state is None else state.seen
        place = seen[:, None] + block.row_valid.cumsum(dim=-1)  # 1 for the first query of a row
        counts = block.row_valid & (place > self.sinks)
        found = _moments(queries, counts, seen + block.row_valid.sum(dim=-1))
        return found if state is None else _joined(state, found)

    def result(self, state: Moments) -> Tensor:
        """Return mean and covariance, exactly 0 where they are no more than rounding beside what they are made of."""
        covariance = state.scatter / state.counted.clamp(min=1)[:, None, None, None]
        size = (state.mean.square() + covariance.diagonal(dim1=-2, dim2=-1)).sqrt()
        mean = state.mean.masked_fill(state.mean.abs() < ROUNDING * size, 0.0)
        noise = ROUNDING * size[..., None] * size[:, :, None]
        return torch.cat([mean[:, :, None], covariance.masked_fill(covariance.abs() < noise, 0.0)], dim=2).float()


def _moments(queries: Tensor, counts: Tensor, seen: Tensor) -> Moments:
    """Return the moments of the queries `(batch, heads, rows, head_dim)` that count, `(batch, rows)` bool."""
    counted, weight = counts.sum(dim=-1), counts[:, None, :, None]
    queries = queries.masked_fill(~weight, 0.0)  # what pads hold may be anything
    mean = queries.sum(dim=2) / counted.clamp(min=1)[:, None, None]
    apart = (queries - mean[:, :, None]).masked_fill(~weight, 0.0)
    return Moments(seen, counted, mean, apart.transpose(-1, -2) @ apart)


def _joined(before: Moments, now: Moments) -> Moments:
    """Return the moments of two sets of queries; `now` knows how many were seen in all."""
    total = before.counted + now.counted
    share = (now.counted.double() / total.clamp(min=1))[:, None, None]
    apart = now.mean - before.mean
    between = (before.counted[:, None, None] * share)[..., None] * apart[..., None] * apart[:, :, None]
    return Moments(now.seen, total, before.mean + share * apart, before.scatter + now.scatter + between)
