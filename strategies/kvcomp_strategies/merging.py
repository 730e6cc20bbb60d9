"""Sums along the edges of an assignment, and a merger inside another one."""

from __future__ import annotations

from typing import Annotated

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


def blend(vectors: Tensor, pivots: Pivots, assignment: Assignment, own: Tensor, shared: Tensor) -> Tensor:
    """Return `own[j] * pivot_j + sum over edges i -> j of shared[j] * weight * source_i`, in float32.

    Factors are applied before the sum, so that a convex combination of finite vectors stays finite. A slot without
    edges has an own factor of 1 and keeps its pivot's bits.

    Args:
        vectors: keys or values, `(batch, kv_heads, tokens, head_dim)`.
        pivots: what stays.
        assignment: the edges.
        own: factor of the pivot itself, `(batch, kv_heads, slots)`.
        shared: factor of each unit of received weight, `(batch, kv_heads, slots)`.
    """
    kept = pivots.gather(vectors)
    blended = kept.float() * own[..., None]
    sources = vectors.gather(2, assignment.sources.clamp(min=0)[..., None].expand(-1, -1, -1, vectors.shape[-1]))
    flat = blended.flatten(0, 2)  # a view: one row per slot
    base = torch.arange(kept[..., 0].numel(), device=flat.device).view(kept.shape[:3])[..., :1]
    for targets, weights in zip(assignment.targets.unbind(-1), assignment.weights.unbind(-1), strict=True):
        factor = weights * shared.gather(2, targets.clamp(min=0))
        rows = (targets.clamp(min=0) + base).flatten()
        flat.index_add_(0, rows, (sources * factor[..., None]).flatten(0, 2).float())
    return blended
