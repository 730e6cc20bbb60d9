"""Heavy hitters: the tokens that all queries together look at."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation, Scorer
from kvcomp.core.types import LayerView
from kvcomp_strategies.observations.received_attention import ReceivedSums
from kvcomp_strategies.windows import group_mean, last_tokens, share_of


class ReceivedAttention(Scorer, use="received-attention"):
    """H2O (FMInference/H2O, `h2o_hf/utils_hh/modify_llama.py`): accumulated attention, plus a recent window.

    The sum runs over all queries of the prompt in float32 and is averaged over the query group. Deviations: the
    official code keeps one cache per query head and evicts one token per decoded token as well; here compression
    happens when a forward ends, as in the comparison of FlowMM's Table 1. Its sizes are `int(0.1 * tokens)` twice;
    here the window is a share of the slots.

    Attributes:
        recent: share of the slots that goes to the latest tokens (rounded down), the rest to heavy hitters.
        sinks: how many of the first tokens come right after the recent ones; 0 for H2O, 4 for D2O, which sets their
            scores to infinity.
        window: `"locked"` protects recent tokens and sinks: nothing is merged into them. `"open"` only keeps them
            first, as D2O and LOOK-M do, whose kept tokens all receive.
        latest: at least so many of the latest tokens count as recent, whatever the share; 1 for PrefixKV.
        heads: `"group"` averages over the query heads of a KV head, `"all"` over all of them, so that all KV heads keep
            the same tokens, as in PrefixKV.
        normalize: `"none"` for the raw sum; `"rows"` divides by the number of later tokens, which is no longer H2O.
    """

    provides = frozenset({"scores", "attention"})

    recent: float = Field(default=0.5, ge=0.0, le=1.0)
    sinks: int = Field(default=0, ge=0, le=1024)
    window: Literal["locked", "open"] = "locked"
    latest: int = Field(default=0, ge=0)
    heads: Literal["group", "all"] = "group"
    normalize: Literal["none", "rows"] = "none"

    def observations(self) -> tuple[Observation, ...]:
        """Return the column sums."""
        return (ReceivedSums(),)

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the attention received."""
        kv_heads = layer.shape[1] if self.heads == "group" else 1
        received = group_mean(layer.observations[ReceivedSums()], kv_heads).expand(layer.shape)
        if self.normalize == "rows":
            seen_by = layer.valid.flip(-1).cumsum(-1).flip(-1)  # a token is seen by itself and all later ones
            received = received / seen_by.clamp(min=1)
        return received

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor | None:
        """Return the recent window and the sinks, unless they are open."""
        if self.window == "open":
            return None
        return self._recent(layer, slots) | (layer.valid & (layer.indices < self.sinks))

    def tiers(self, layer: LayerView, slots: Tensor) -> Tensor | None:
        """Return, where they are open, the recent window on top, then the sinks, the earlier first, then the rest."""
        if self.window == "locked":
            return None
        sinks = (self.sinks - layer.indices).clamp(min=0).masked_fill(~layer.valid, 0)
        return sinks.masked_fill(self._recent(layer, slots), self.sinks + 1).to(torch.int16)

    def _recent(self, layer: LayerView, slots: Tensor) -> Tensor:
        return last_tokens(layer, share_of(slots, self.recent).clamp(min=self.latest))
