"""A mean in which the pivot keeps at least half of the weight."""

from __future__ import annotations

from kvcomp.core.types import Assignment, LayerView, Pivots
from kvcomp_strategies.merging import Blending, Shares, received_weight


class PivotMean(Blending, use="pivot-mean"):
    """LOOK-M's pivot merge: k_j <- k_j (1 + n/2) / (n + 1) + sum_i k_i / (2 (n + 1)), the same for values.

    FlowMM leaves its merge functions f and g (Eq. 5) open; its "pivot set" points to this one (row a of the FlowMM
    card). The pivot's weight is 3/4 for one source and falls towards 1/2. Source: SUSTechBruce/LOOK-M,
    `llava/model/kv_token_merge/modify_llama.py`.
    """

    def shares(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> Shares:
        """Return the half that is the pivot's, and the mean of which it is a member."""
        received = received_weight(assignment, pivots.indices.shape[2])
        return Shares(assignment, own=(1.0 + received / 2) / (received + 1.0), shared=0.5 / (received + 1.0))
