"""Add what leaves to what stays."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.core.interfaces import Merger
from kvcomp.core.types import Assignment, LayerView, Pivots
from kvcomp_strategies.merging import blend, merged_counts, saturated


class Sum(Merger, use="sum"):
    """k_j <- k_j + sum_i w_ij k_i, the same for values, w being the weights of the edges: CaM's update of values, with
    the matcher `following-window` and inside `values-only` (zyxxmu/cam, `cam_hf/utils_hh/modify_llama_cam.py`).

    Not a mean: a merged slot leaves the convex hull of its members, and equal vectors grow. What would be beyond the
    largest number of the dtype becomes that number.
    """

    requires = frozenset({"pivots", "edges"})
    provides = frozenset({"merging"})

    @property
    def convex(self) -> frozenset[str]:
        """Return nothing: sums leave the hull."""
        return frozenset()

    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of keys and values, and the counts."""
        one = torch.ones(pivots.indices.shape, device=layer.keys.device)
        keys, values = (
            saturated(blend(vectors, pivots, assignment, own=one, shared=one), vectors.dtype)
            for vectors in (layer.keys, layer.values)
        )
        return keys, values, merged_counts(layer, pivots, assignment)
