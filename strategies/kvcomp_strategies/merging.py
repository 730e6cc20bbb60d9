"""Sums along the edges of an assignment, the mergers that are made of them, and a merger inside another one."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor

from kvcomp.core.interfaces import Merger
from kvcomp.core.types import Assignment, LayerView, Pivots


def _merges(merger: Merger) -> Merger:
    if "merging" not in merger.gives():
        raise ValueError(f"must be a merger that merges, and {merger.use!r} does not")
    return merger


MergingMerger = Annotated[Merger, AfterValidator(_merges)]
"""A merger that another one changes the keys or values of, so it must change some."""


def received_weight(assignment: Assignment, slots: int, per_source: Tensor | None = None) -> Tensor:
    """Return the sum of edge weights that each slot receives, `(batch, kv_heads, slots)` float32.

    Args:
        assignment: the edges.
        slots: number of slots.
        per_source: optional `(batch, kv_heads, others)` factor of each source's edges.
    """
    weights = assignment.weights if per_source is None else assignment.weights * per_source[..., None]
    targets = assignment.targets.clamp(min=0).flatten(2)
    total = torch.zeros(*targets.shape[:2], slots, device=targets.device)
    return total.scatter_add_(2, targets, weights.flatten(2))


def merged_counts(layer: LayerView, pivots: Pivots, assignment: Assignment) -> Tensor:
    """Return how many prompt tokens each slot stands for, `(batch, kv_heads, slots)`: its pivot's and those merged
    into it.
    """
    sources = layer.counts.gather(2, assignment.sources.clamp(min=0))
    received = received_weight(assignment, pivots.indices.shape[2], sources)
    return pivots.gather(layer.counts) + received


def saturated(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the vectors with what the dtype cannot hold as its largest number."""
    largest = torch.finfo(dtype).max
    return vectors.clamp(-largest, largest)


@dataclass(frozen=True, eq=False)
class Shares:
    """What a slot is made of: `own[j] * pivot_j + sum over edges i -> j of shared[j] * weight * source_i`.

    Attributes:
        edges: the edges with their weights.
        own: factor of the pivot itself, `(batch, kv_heads, slots)` float32.
        shared: factor of each unit of received weight, likewise.
    """

    edges: Assignment
    own: Tensor
    shared: Tensor


def blend(vectors: Tensor, pivots: Pivots, shares: Shares) -> Tensor:
    """Return each slot's blend of a pivot and its sources, `(batch, kv_heads, slots, head_dim)` float32.

    Factors are applied before the sum, so that a convex combination of finite vectors stays finite. A slot without
    edges has an own factor of 1 and keeps its pivot's bits.

    Args:
        vectors: keys or values, `(batch, kv_heads, tokens, head_dim)`.
        pivots: what stays.
        shares: of pivots and sources.
    """
    kept = pivots.gather(vectors)
    blended = kept.float() * shares.own[..., None]
    edges = shares.edges
    sources = vectors.gather(2, edges.sources.clamp(min=0)[..., None].expand(-1, -1, -1, vectors.shape[-1]))
    flat = blended.flatten(0, 2)  # a view: one row per slot
    base = torch.arange(kept[..., 0].numel(), device=flat.device).view(kept.shape[:3])[..., :1]
    for targets, weights in zip(edges.targets.unbind(-1), edges.weights.unbind(-1), strict=True):
        factor = weights * shares.shared.gather(2, targets.clamp(min=0))
        rows = (targets.clamp(min=0) + base).flatten()
        flat.index_add_(0, rows, (sources * factor[..., None]).flatten(0, 2).float())
    return blended


class Blending(Merger):
    """A merger whose keys and values are blends of pivots and sources: it says with which shares.

    Vectors that are not `convex` may grow: what would be beyond the largest number of the dtype becomes that number.
    """

    requires = frozenset({"pivots", "edges"})
    provides = frozenset({"merging"})

    @abstractmethod
    def shares(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> Shares:
        """Return the shares of keys, and of values unless `value_shares` says otherwise."""

    def value_shares(self, shares: Shares, assignment: Assignment) -> Shares:
        """Return the shares of values, given those of keys: the same, unless overridden."""
        return shares

    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        """Return the blended keys and values, and the counts."""
        shares = self.shares(layer, pivots, assignment)
        keys = self._blended("keys", layer, pivots, shares)
        values = self._blended("values", layer, pivots, self.value_shares(shares, assignment))
        return keys, values, merged_counts(layer, pivots, assignment)

    def merge_values(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor]:
        """Return the blended values and the counts; keys are read where shares depend on them, and not blended."""
        if type(self).merge is not Blending.merge:  # a subclass does something else with the blends
            return super().merge_values(layer, pivots, assignment)
        shares = self.value_shares(self.shares(layer, pivots, assignment), assignment)
        return self._blended("values", layer, pivots, shares), merged_counts(layer, pivots, assignment)

    def _blended(self, name: Literal["keys", "values"], layer: LayerView, pivots: Pivots, shares: Shares) -> Tensor:
        vectors: Tensor = getattr(layer, name)
        blended = blend(vectors, pivots, shares)
        return blended if name in self.convex else saturated(blended, vectors.dtype)
