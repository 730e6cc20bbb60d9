"""Add what leaves to what stays."""

from __future__ import annotations

import torch

from kvcomp.core.types import Assignment, LayerView, Pivots
from kvcomp_strategies.merging import Blending, Shares


class Sum(Blending, use="sum"):
    """k_j <- k_j + sum_i w_ij k_i, the same for values, w being the weights of the edges: CaM's update of values, with
    the matcher `following-window` and inside `values-only` (zyxxmu/cam, `cam_hf/utils_hh/modify_llama_cam.py`).

    Not a mean: a merged slot leaves the convex hull of its members, and equal vectors grow. What would be beyond the
    largest number of the dtype becomes that number.
    """

    @property
    def convex(self) -> frozenset[str]:
        """Return nothing: sums leave the hull."""
        return frozenset()

    def shares(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> Shares:
        """Return the whole of the pivot and of each source."""
        one = torch.ones(pivots.indices.shape, device=layer.keys.device)
        return Shares(assignment, own=one, shared=one)
