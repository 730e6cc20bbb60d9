"""Proxy tokens near the end of the prompt say what matters."""

from __future__ import annotations

from typing import Literal

from einops import rearrange
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation, Scorer
from kvcomp.core.types import LayerView
from kvcomp_strategies.observations.window_attention import WindowRows
from kvcomp_strategies.windows import Kernel, last_tokens, pool_average, share_of, sum_last_rows


class ProxyAttention(Scorer, use="proxy-attention"):
    """FlowMM's token importance (Eq. 8): the attention that a token receives from the proxies.

    Left open by the paper, with our defaults (rows of the FlowMM card):

    - `proxies` 32 (d): the last min(`proxies`, slots // 2) tokens, so that tiny budgets keep pivots; at least one row
      votes.
    - the proxies' own tokens are kept, inside the budget, and only tokens before them are scored (e): tokens among the
      proxies are seen by fewer rows, which would bias their scores.
    - `recent` 0.0 (f): no recent window beyond the proxies; else this share of the slots, proxies included, is kept.
    - `sinks` 0 (g): none forced, since proxies rank the first tokens high by themselves.
    - `group` `"mean"` (i): how the query heads of a KV head are reduced; a sum would only change the units.
    - `kernel` 1 (j): no pooling; SnapKV's is 5.
    """

    provides = frozenset({"scores", "attention"})

    proxies: int = Field(default=32, ge=1)
    recent: float = Field(default=0.0, ge=0.0, le=1.0)
    sinks: int = Field(default=0, ge=0)
    group: Literal["mean", "max"] = "mean"
    kernel: Kernel = 1

    def observations(self) -> tuple[Observation, ...]:
        """Return the last rows."""
        return (WindowRows(count=self.proxies),)

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the attention received from the proxies; tokens of the kept window score 0 and are protected."""
        voting = (slots // 2).clamp(min=1, max=self.proxies)
        votes = sum_last_rows(layer.observations[WindowRows(count=self.proxies)], voting)
        votes = rearrange(votes, "b (kv group) t -> b kv group t", kv=layer.shape[1])
        votes = votes.mean(dim=2) if self.group == "mean" else votes.amax(dim=2)
        before = layer.valid & ~last_tokens(layer, self._kept(slots))
        return pool_average(votes, before, self.kernel)

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the proxies' window and the sinks."""
        window = last_tokens(layer, self._kept(slots))
        return window | (layer.valid & (layer.indices < self.sinks)) if self.sinks else window

    @property
    def protects_by_share(self) -> bool:
        """Return that the window keeps its size, that of its votes, in heads that are allotted more or less."""
        return True

    def _kept(self, slots: Tensor) -> Tensor:
        return (slots // 2).clamp(max=self.proxies).maximum(share_of(slots, self.recent))
