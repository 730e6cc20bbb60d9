"""A mean in which the pivot keeps at least half of the weight."""

from __future__ import annotations

from torch import Tensor

from kvcomp.core.interfaces import Merger
from kvcomp.core.types import Assignment, LayerView, Pivots
from kvcomp_strategies.merging import blend, merged_counts, received_weight


class PivotMean(Merger, use="pivot-mean"):
    """LOOK-M's pivot merge: k_j <- k_j (1 + n/2) / (n + 1) + sum_i k_i / (2 (n + 1)), the same for values.

    FlowMM leaves its merge functions f and g (Eq. 5) open; its "pivot set" points to this one (row a of the FlowMM
    card). The pivot's weight is 3/4 for one source and falls towards 1/2. Source: SUSTechBruce/LOOK-M,
    `llava/model/kv_token_merge/modify_llama.py`.
    """

    requires = frozenset({"pivots", "edges"})
    provides = frozenset({"merging"})

    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        """Return the blended keys and values, and the counts."""
        received = received_weight(assignment, pivots.indices.shape[2])
        own, shared = (1.0 + received / 2) / (received + 1.0), 0.5 / (received + 1.0)
        keys = blend(layer.keys, pivots, assignment, own=own, shared=shared)
        values = blend(layer.values, pivots, assignment, own=own, shared=shared)
        return keys, values, merged_counts(layer, pivots, assignment)
