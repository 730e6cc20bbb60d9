"""Runs of neighbours with similar keys, and one pivot for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import PivotSelector
from kvcomp.core.types import LayerView, Pivots, Scores
from kvcomp_strategies.ranking import best_first
from kvcomp_strategies.windows import share_of

STEP = 1e6  # cosines are compared in millionths, so that equal keys tie in float32
NEVER = float("inf")


@dataclass(frozen=True)
class Row:
    """The valid tokens of every head moved to the front, in order: each `(batch, kv_heads, tokens)`.

    `order` is the place of each on the token axis, `merit` orders them by tier, score and place, `single` is whether
    the scorer protects it, and `similarity` the cosine with the key before it, in millionths.
    """

    order: Tensor
    valid: Tensor
    merit: Tensor
    single: Tensor
    similarity: Tensor


class AdjacentClusters(PivotSelector, use="adjacent-clusters"):
    """KVMerger's merging sets (arXiv:2407.08454, Alg. 1): neighbours with similar keys form a cluster, whose pivot is
    its token with the highest score (of the highest tier, where the scorer makes tiers).

    What the scorer protects (the latest tokens) and the best tokens beyond it (attention-sensitive) are clusters of
    their own and part their neighbours. Between them, the chain of tokens is cut where neighbours are least similar, by
    the cosine of their keys after rotary embedding, per KV head; cutting a chain below a threshold is what the paper's
    scan from the last token to the first does.

    Left open by the paper, or different there:

    - `mode` `"budget"` cuts exactly as often as gives the allotted slots, which is the threshold that a search would
      find; equal cosines (within a millionth) are cut at the earlier place. `"threshold"` cuts where the cosine is at
      most `threshold`: the paper's native regime, in which the number of slots follows from the prompt, per head, and
      may be above or below the budget, which then only sizes the two kept sets.
    - `sensitive` 0.25: with a recent window of 0.35 and 0.40 for clusters it keeps the recalled proportions of the
      paper's 50 % setting (17 : 12 : 21). Where the kept tokens part the others into more runs than there are slots
      left, fewer of them are kept.
    - `borders` `"ignore"`: the paper is text only, so clusters may cross from one modality to another; `"modality"`
      cuts there first.
    - clusters have no largest length. Under padding, neighbours are the nearest valid tokens.

    Where even that leaves too few slots for the runs (a scorer that protects scattered tokens), the runs with the best
    pivots stay and the others are evicted. No official code was found.
    """

    requires = frozenset({"scores"})
    provides = frozenset({"pivots", "groups"})
    by_score = False

    sensitive: float = Field(default=0.25, ge=0.0, le=1.0)
    mode: Literal["budget", "threshold"] = "budget"
    threshold: float = Field(default=0.75, ge=-1.0, le=1.0)
    borders: Literal["ignore", "modality"] = "ignore"

    def select(self, layer: LayerView, scores: Scores, slots: Tensor) -> Pivots:
        """Return one pivot per cluster, and the slot number of the cluster of every token, -1 for none."""
        slots = slots.to(layer.keys.device)
        row = self._row(layer, scores)
        most = share_of(slots, self.sensitive)
        single = _sensitive(row, most, slots if self.mode == "budget" else None)
        starts = self._starts(row, single, slots)
        clusters = torch.where(row.valid, starts.cumsum(dim=-1) - 1, -1)  # numbered by place
        if self.mode == "budget" and bool((starts.sum(dim=-1) > slots).any()):  # a sync, as the shape of the pivots is
            clusters = _best_clusters(clusters, row, slots)
        return _pivots(clusters, row)

    def _row(self, layer: LayerView, scores: Scores) -> Row:
        order = (~layer.valid).to(torch.uint8).argsort(dim=-1, stable=True)
        valid = layer.valid.gather(2, order)
        keys = F.normalize(layer.keys.float(), dim=-1, eps=1e-12)
        keys = keys.gather(2, order[..., None].expand(-1, -1, -1, keys.shape[-1]))
        similarity = F.pad((keys[:, :, 1:] * keys[:, :, :-1]).sum(dim=-1), (1, 0))
        similarity = (similarity * STEP).round()
        if self.borders == "modality":
            borders = F.pad(layer.compared_modality.gather(2, order).diff(dim=-1), (1, 0)) != 0
            similarity = similarity.masked_fill(borders, -NEVER)
        return Row(
            order=order,
            valid=valid,
            merit=-best_first(scores, layer.valid).argsort(dim=-1).gather(2, order).float(),
            single=scores.protected.gather(2, order),
            similarity=similarity,
        )

    def _starts(self, row: Row, single: Tensor, slots: Tensor) -> Tensor:
        """Return where clusters begin, `(batch, kv_heads, tokens)` bool."""
        must = row.valid & (single | F.pad(single[..., :-1], (1, 0), value=True))
        if self.mode == "threshold":
            return must | (row.valid & (row.similarity <= round(self.threshold * STEP)))
        cuts = slots[..., None] - must.sum(dim=-1, keepdim=True)
        ascending = row.similarity.masked_fill(must | ~row.valid, NEVER).argsort(dim=-1, stable=True)
        rank = ascending.argsort(dim=-1)
        return must | (row.valid & (rank < cuts))


def _sensitive(row: Row, most: Tensor, slots: Tensor | None) -> Tensor:
    """Return the protected tokens and the best of the others, `(batch, kv_heads, tokens)` bool.

    Args:
        row: the tokens.
        most: `(batch, kv_heads)`, how many of the others.
        slots: `(batch, kv_heads)`; fewer are taken where no slot is left for every run of tokens between them.
    """
    rest = row.valid & ~row.single
    ranks = row.merit.argsort(dim=-1, descending=True, stable=True)
    ranks = ranks.gather(-1, (~rest).gather(-1, ranks).to(torch.uint8).argsort(dim=-1, stable=True)).argsort(dim=-1)
    taken = torch.arange(1, ranks.shape[-1] + 1, device=ranks.device)
    allowed = taken <= most[..., None]
    if slots is not None:
        kept = row.single.sum(dim=-1, keepdim=True) + taken
        allowed &= _runs(ranks, rest) + kept <= slots[..., None]  # never again, once the sum is above the slots
    return row.single | (rest & (ranks < allowed.sum(dim=-1, keepdim=True)))


def _runs(ranks: Tensor, rest: Tensor) -> Tensor:
    """Return the number of runs of tokens that are left when the best n of the rest are taken, for n from 1.

    A token begins a run if it is not taken and the one before it is taken or none of the rest: for n from the rank of
    the one before, exclusive, to its own, inclusive. The changes of that count are added up for all tokens at once.

    Args:
        ranks: place of each token in the order of scores, `(batch, kv_heads, tokens)`, those of the rest first.
        rest: `(batch, kv_heads, tokens)` bool.
    """
    before = F.pad(ranks[..., :-1], (1, 0)).masked_fill(~F.pad(rest[..., :-1], (1, 0)), -1)
    begins = (rest & (before < ranks)).long()
    changes = F.pad(torch.zeros_like(ranks), (0, 1))
    changes = changes.scatter_add(2, before + 1, begins).scatter_add(2, ranks + 1, -begins)
    return changes.cumsum(dim=-1)[..., 1:]


def _best_clusters(clusters: Tensor, row: Row, slots: Tensor) -> Tensor:
    """Return the clusters numbered anew without those that find no slot: protected tokens first, then the best pivots.

    Only a scorer that protects scattered tokens leaves more runs between them than slots.
    """
    best, _ = _tops(clusters, row)
    locked = torch.zeros_like(best).scatter_reduce(2, clusters.clamp(min=0), row.single.float(), "amax")
    real = torch.arange(best.shape[-1], device=best.device) <= clusters.amax(dim=-1, keepdim=True)
    order = best.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, (locked + real).gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    stays = real & (order.argsort(dim=-1) < slots[..., None])
    number = torch.where(stays, stays.cumsum(dim=-1) - 1, -1)
    return torch.where(clusters >= 0, number.gather(2, clusters.clamp(min=0)), -1)


def _tops(clusters: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """Return the merit of the best token of each cluster, and that token, `(batch, kv_heads, tokens)`."""
    inside, number = clusters >= 0, clusters.clamp(min=0)
    tokens = clusters.shape[-1]
    best = torch.full_like(row.merit, -NEVER)
    best = best.scatter_reduce(2, number, row.merit.masked_fill(~inside, -NEVER), "amax")
    place = torch.arange(tokens, device=clusters.device).expand(clusters.shape)
    place = place.masked_fill(~inside | (row.merit < best.gather(2, number)), tokens)
    return best, torch.full_like(place, tokens).scatter_reduce(2, number, place, "amin")


def _pivots(clusters: Tensor, row: Row) -> Pivots:
    """Return the pivots of clusters that are numbered by place."""
    counts = clusters.amax(dim=-1) + 1
    most = int(counts.max())  # one sync on an accelerator, since it decides a shape
    _, tops = _tops(clusters, row)
    mask = None if int(counts.min()) == most else torch.arange(most, device=tops.device) < counts[..., None]
    tops = tops[..., :most] if mask is None else tops[..., :most].masked_fill(~mask, 0)
    indices = row.order.gather(2, tops)
    return Pivots(
        indices=indices if mask is None else indices.masked_fill(~mask, 0),
        mask=mask,
        groups=torch.full_like(clusters, -1).scatter(2, row.order, clusters),
    )
