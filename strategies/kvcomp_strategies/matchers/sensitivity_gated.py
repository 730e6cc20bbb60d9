"""Nearest pivot, but sensitive pivots are left alone."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvcomp.core.interfaces import Matcher
from kvcomp.core.types import Assignment, LayerView, Pivots, Rule, Scores
from kvcomp_strategies.matching import nearest_pivots, scored_quantile


class SensitivityGated(Matcher, use="sensitivity-gated"):
    """FlowMM's sensitivity-adaptive token matching (Eq. 9-10): the most similar pivot whose importance is at most tau.

    Pivots above tau are sensitive: they receive nothing and stay as they are, bit for bit. Protected pivots (the
    proxies) neither.

    Left open by the paper, with our defaults (rows of the FlowMM card):

    - `quantile` 0.8 and `units` `"quantile"` (b): tau is this quantile (linear interpolation, float32) of the
      importance of the scored pivots, per KV head, the proxies left out: importance is a sum over the proxies with a
      heavy tail that depends on the prompt's length, so an absolute tau does not transfer. `units: mean` makes tau
      `threshold` times the mean of the same pivots, `units: absolute` makes it `threshold`. Quantile 1.0 locks nothing.
    - tau filters the targets (c), as Eq. 10's index says.
    - `fallback` `"evict"` (k): a token without an eligible pivot is evicted; `"nearest"` sends it to the nearest
      pivot that is not protected, whatever its importance and modality.
    - `blocked` `"next-best"` (l): where the most similar pivot is locked, the next best eligible one receives the
      token; `"skip"` evicts the token instead.
    - `floor` -1 (u): no least similarity.
    """

    requires = frozenset({"pivots", "scores", "merging"})
    provides = frozenset({"edges"})

    quantile: float = Field(default=0.8, ge=0.0, le=1.0)
    units: Literal["quantile", "mean", "absolute"] = "quantile"
    threshold: float | None = Field(default=None, ge=0.0)
    fallback: Literal["evict", "nearest"] = "evict"
    blocked: Literal["next-best", "skip"] = "next-best"
    floor: float = Field(default=-1.0, ge=-1.0, le=1.0)

    @model_validator(mode="after")
    def _threshold_fits_units(self) -> SensitivityGated:
        if (self.threshold is None) != (self.units == "quantile"):
            raise ValueError("threshold must be given with units 'mean' or 'absolute', and only then")
        return self

    def match(self, layer: LayerView, pivots: Pivots, scores: Scores, rule: Tensor) -> Assignment:
        """Return one edge per token that finds an eligible pivot."""
        receiving = pivots.filled() & ~pivots.gather(scores.protected)
        importance = pivots.gather(scores.values)
        eligible = receiving & (importance <= self._tau(importance, receiving))
        if self.blocked == "skip":
            edges = nearest_pivots(layer, pivots, receiving, rule, self.floor)
            open_targets = eligible.gather(2, edges.targets.squeeze(-1).clamp(min=0))[..., None]
            edges = _only(edges, open_targets)
        else:
            edges = nearest_pivots(layer, pivots, eligible, rule, self.floor)
        if self.fallback == "nearest":
            anywhere = nearest_pivots(layer, pivots, receiving, torch.full_like(rule, Rule.CROSS), self.floor)
            targets = torch.where(edges.targets >= 0, edges.targets, anywhere.targets)
            edges = Assignment(edges.sources, targets, (targets >= 0).float())
        return edges

    def _tau(self, importance: Tensor, scored: Tensor) -> Tensor:
        """Return the threshold of each head, `(batch, kv_heads, 1)`; NaN (nothing is eligible) where no pivot is
        scored.
        """
        if self.threshold is None:
            return scored_quantile(importance, scored, self.quantile)
        if self.units == "mean":
            return self.threshold * importance.masked_fill(~scored, float("nan")).nanmean(dim=-1, keepdim=True)
        return torch.full_like(importance[..., :1], self.threshold)


def _only(edges: Assignment, keep: Tensor) -> Assignment:
    targets = edges.targets.masked_fill(~keep, -1)
    return Assignment(edges.sources, targets, (targets >= 0).float())
