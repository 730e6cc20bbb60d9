"""Pivots that are near in place, and a few from everywhere: matching whose cost grows with the tokens alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Matcher
from kvcomp.core.types import Assignment, LayerView, Pivots, Rule, Scores
from kvcomp_strategies.matching import (
    CHUNK_ELEMENTS,
    LOWEST_ALLOWED,
    TIE,
    comparable,
    edges_to,
    gather_tokens,
    other_tokens,
    scored_quantile,
)

BEHIND = 2**62  # a sort key behind all others
RUN = 64  # tokens that look at the same pivots, so that similarities are products of matrices


class Nearby(Matcher, use="nearby"):
    """FlowMM's gated matching (Eq. 9-10) among a few pivots per token instead of all: ours, in place of
    `sensitivity-gated` or `nearest` for long prompts.

    The tokens that do not stay are taken in runs of 64, in the order of the prompt. A run looks at the `window` open
    pivots before its first token and the `window` ones from there on, and at `spread` open pivots that are evenly
    spread over the prompt, the first included. So matching costs tokens x (2 * window + spread) x head_dim instead of
    tokens x slots x head_dim. Where tokens may only be merged within their modality, one modality follows the other
    here.
    With a `window` as large as the slots, the result is that of `sensitivity-gated`.

    Attributes:
        window: how many open pivots a run looks at on either side.
        spread: how many it looks at wherever it is.
        quantile: pivots whose importance is above this quantile are sensitive and receive nothing, as in
            `sensitivity-gated`; 1.0 leaves all but the protected ones open, as in `nearest`.
        floor: tokens whose best cosine is below it are evicted; -1 for none.
    """

    requires = frozenset({"pivots", "scores", "merging"})
    provides = frozenset({"edges"})

    window: int = Field(default=48, ge=1)
    spread: int = Field(default=32, ge=0)
    quantile: float = Field(default=0.8, ge=0.0, le=1.0)
    floor: float = Field(default=-1.0, ge=-1.0, le=1.0)

    def match(self, layer: LayerView, pivots: Pivots, scores: Scores, rule: Tensor) -> Assignment:
        """Return one edge per token that finds an open pivot among those that it looks at."""
        receiving = pivots.filled() & ~pivots.gather(scores.protected)
        importance = pivots.gather(scores.values)
        eligible = receiving & (importance <= scored_quantile(importance, receiving, self.quantile))
        sources = other_tokens(layer, pivots)
        ordered, back = _in_order(sources, layer, rule)
        candidates = self._candidates(ordered[..., ::RUN], layer, pivots, eligible, rule)
        targets, similarity = _nearest(ordered, candidates, *comparable(layer, pivots, eligible, rule))
        targets, similarity = targets.gather(2, back), similarity.gather(2, back)
        return edges_to(sources, targets.masked_fill((sources < 0) | (similarity < self.floor - TIE), -1))

    def _candidates(
        self, firsts: Tensor, layer: LayerView, pivots: Pivots, eligible: Tensor, rule: Tensor
    ) -> Candidates:
        """Return the pivots that each run looks at, given its first token, `(batch, kv_heads, runs)`."""
        keys = _sort_keys(layer, rule)
        opened = pivots.gather(keys).masked_fill(~eligible, BEHIND)
        opened, slots = opened.sort(dim=-1, stable=True)  # the open pivots first, in order
        count = eligible.sum(dim=-1)[..., None, None]
        at_first = keys.gather(2, firsts.clamp(min=0)).masked_fill(firsts < 0, BEHIND)
        middle = torch.searchsorted(opened, at_first)[..., None]
        around = middle + torch.arange(-self.window, self.window, device=firsts.device)
        everywhere = torch.arange(self.spread, device=firsts.device) * count // max(1, self.spread)
        ranks = torch.cat([everywhere.expand(*around.shape[:3], -1), around], dim=-1)  # (batch, kv_heads, runs, looks)
        seen = (ranks >= 0) & (ranks < count)
        places = ranks.clamp(min=0, max=slots.shape[2] - 1).flatten(2)
        return Candidates(slots.gather(2, places).view(ranks.shape), seen)


class Candidates(NamedTuple):
    """What each run looks at: slot numbers, `(batch, kv_heads, runs, looks)`, and whether there is such a pivot."""

    slots: Tensor
    seen: Tensor


def _sort_keys(layer: LayerView, rule: Tensor) -> Tensor:
    """Return what the order of tokens is by, `(batch, kv_heads, tokens)` int64: their place, in rows that merge within
    modalities one modality after the other.
    """
    tokens = layer.shape[2]
    apart = (rule == Rule.INTRA).view(-1, 1, 1) * layer.compared_modality.long()
    return apart * tokens + torch.arange(tokens, device=rule.device)


def _in_order(sources: Tensor, layer: LayerView, rule: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sources in order, with -1 at the end up to whole runs, and where each of them went."""
    keys = _sort_keys(layer, rule).gather(2, sources.clamp(min=0)).masked_fill(sources < 0, BEHIND)
    order = keys.argsort(dim=-1, stable=True)
    ordered = F.pad(sources.gather(2, order), (0, -sources.shape[2] % RUN), value=-1)
    return ordered, order.argsort(dim=-1)


def _nearest(sources: Tensor, candidates: Candidates, tokens: Tensor, receivers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slot number of the most similar candidate of each source, -1 for none, and its cosine, `(batch,
    kv_heads, sources)`.

    Args:
        sources: `(batch, kv_heads, sources)`, whole runs, -1 as padding.
        candidates: of each run.
        tokens: `(batch, kv_heads, tokens, features)`.
        receivers: `(batch, kv_heads, slots, features)`.
    """
    runs = rearrange(sources, "b kv (runs place) -> b kv runs place", place=RUN)
    looks = candidates.slots[:, :, :1].numel()
    size = max(1, CHUNK_ELEMENTS // (RUN * max(1, looks)))
    pieces = (torch.split(part, size, dim=2) for part in (runs, *candidates))
    found = [
        _nearest_of_runs(chunk, Candidates(slots, seen), tokens, receivers)
        for chunk, slots, seen in zip(*pieces, strict=True)
    ]
    targets, similarity = (torch.cat(each, dim=2).flatten(2) for each in zip(*found, strict=True))
    return targets, similarity


def _nearest_of_runs(runs: Tensor, candidates: Candidates, tokens: Tensor, receivers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same of runs `(batch, kv_heads, runs, 64)`, as `(batch, kv_heads, runs, 64)`."""
    own = gather_tokens(tokens, runs.flatten(2)).view(*runs.shape, tokens.shape[-1])
    theirs = gather_tokens(receivers, candidates.slots.flatten(2)).view(*candidates.slots.shape, receivers.shape[-1])
    similarity = own @ theirs.transpose(-1, -2)  # (batch, kv_heads, runs, 64, looks)
    similarity.masked_fill_(~candidates.seen[..., None, :], -torch.inf)
    best = similarity.amax(dim=-1, keepdim=True)
    none = receivers.shape[2]
    first = torch.where(similarity >= best - TIE, candidates.slots[..., None, :], none).amin(dim=-1)
    best = best.squeeze(-1)
    return first.masked_fill(best <= LOWEST_ALLOWED, -1), best
