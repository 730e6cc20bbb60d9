"""Every token is shared among the pivots that follow it, or not at all, by lot."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Matcher, Observation
from kvcomp.core.types import Assignment, LayerView, Modality, Pivots, Scores
from kvcomp_strategies.hashing import uniform
from kvcomp_strategies.matching import allowed_modalities, other_tokens
from kvcomp_strategies.observations.received_attention import ReceivedSums
from kvcomp_strategies.observations.window_attention import WindowRows
from kvcomp_strategies.windows import group_mean

STREAM = 0xCA3  # so that the lot is not that of the scorer `random`


class FollowingWindow(Matcher, use="following-window"):
    """CaM (cache merging): a token that leaves goes in equal parts to the next `window` pivots, with probability
    p = clamp(a_i / mean(a of those pivots), 0, 1), where a is the attention that a token receives, per KV head.

    Source: zyxxmu/cam, `cam_hf/utils_hh/modify_llama_cam.py` and `cam_hf/utils_lm_eval/modify_llama_cam.py`. What is
    different here, or there in several ways:

    - the official code merges the one token that leaves at a decoded token; here all that leave at a compression go to
      the pivots that follow them, which stay, rather than to the next positions, which may leave as well.
    - `rows` `"all"` takes the sum over all queries (its lm-eval and streaming versions), `"last"` the latest query (its
      generation version).
    - `denominator` `"mean"` of the receiving pivots is the paper's; `"max"` over all kept tokens is what its lm-eval
      version computes (into a variable named mean).
    - fewer than `window` pivots at the end share the token in larger parts, so that all of it goes somewhere.
    - the lot is a hash of seed, layer and logical position: the same for all heads, which differ in p, and for a row in
      any batch. Where no attention is received on either side, p is 0.

    With the merger `sum` inside `values-only`: v_t <- v_t + v_i / window, and keys as they are.

    Attributes:
        window: at most so many pivots share a token: 32 in the generation version, 16 in the streaming one.
        rows: which queries a is summed over.
        denominator: what a is compared with.
        seed: of the lot.
    """

    requires = frozenset({"pivots", "scores", "merging"})
    provides = frozenset({"edges"})

    window: int = Field(default=32, ge=1)
    rows: Literal["all", "last"] = "all"
    denominator: Literal["mean", "max"] = "mean"
    seed: int = Field(default=0, ge=0, lt=2**31)

    def observations(self) -> tuple[Observation, ...]:
        """Return the attention that decides."""
        return (self._seen,)

    @property
    def _seen(self) -> Observation:
        return ReceivedSums() if self.rows == "all" else WindowRows(count=1)

    def match(self, layer: LayerView, pivots: Pivots, scores: Scores, rule: Tensor) -> Assignment:
        """Return edges of equal weight from each token that the lot takes to the pivots that follow it."""
        eligible = pivots.filled() & ~pivots.gather(scores.protected)
        sources = other_tokens(layer, pivots)
        targets = self._following(layer, pivots, sources, eligible, rule)
        merged = (targets >= 0) & self._drawn(layer, pivots, sources, targets)[..., None]
        weights = merged / merged.sum(dim=-1, keepdim=True).clamp(min=1)
        return Assignment(sources, targets.masked_fill(~merged, -1), weights)

    def _following(self, layer: LayerView, pivots: Pivots, sources: Tensor, eligible: Tensor, rule: Tensor) -> Tensor:
        """Return the next slots that may receive each source, `(batch, kv_heads, others, window)`, -1 for none."""
        kinds = torch.arange(len(Modality), device=rule.device)[:, None]  # (modalities, 1)
        same = pivots.gather(layer.compared_modality)[:, :, None] == kinds  # (batch, kv_heads, modalities, slots)
        allowed = eligible[:, :, None] & allowed_modalities(same, rule.view(-1, 1, 1, 1))
        order = (~allowed).to(torch.uint8).argsort(dim=-1, stable=True)  # the allowed slots first, in order
        order = order.masked_fill(~allowed.gather(-1, order), -1).flatten(2)
        kind = layer.compared_modality.gather(2, sources.clamp(min=0)).long()
        slots = allowed.shape[-1]
        before = torch.searchsorted(_ascending(pivots, layer.shape[2]), sources)  # slots before each source
        passed = F.pad(allowed.cumsum(dim=-1), (1, 0)).flatten(2).gather(2, kind * (slots + 1) + before)
        steps = passed[..., None] + torch.arange(self.window, device=rule.device)
        places = (kind[..., None] * slots + steps.clamp(max=slots - 1)).flatten(2)
        found = order.gather(2, places).view(steps.shape)
        return found.masked_fill((steps >= slots) | (sources < 0)[..., None], -1)

    def _drawn(self, layer: LayerView, pivots: Pivots, sources: Tensor, targets: Tensor) -> Tensor:
        """Return which sources the lot takes, `(batch, kv_heads, others)` bool."""
        seen = layer.observations[self._seen]
        received = group_mean(seen.sum(dim=2) if self.rows == "last" else seen, layer.shape[1])
        kept = pivots.gather(received).masked_fill(~pivots.filled(), 0.0)
        own = received.gather(2, sources.clamp(min=0))
        if self.denominator == "max":
            base = kept.amax(dim=-1, keepdim=True).expand_as(own)
        else:
            reached = targets >= 0
            near = kept.gather(2, targets.clamp(min=0).flatten(2)).view(targets.shape).masked_fill(~reached, 0.0)
            base = near.sum(dim=-1) / reached.sum(dim=-1).clamp(min=1)
        places = layer.indices.gather(2, sources.clamp(min=0))
        return uniform(places, self.seed, layer.layer, STREAM) * base < own


def _ascending(pivots: Pivots, tokens: int) -> Tensor:
    """Return the pivots with empty slots after every token, so that each head is ascending."""
    return pivots.indices.masked_fill(~pivots.filled(), tokens).contiguous()
