"""The plain mean of a pivot and what is merged into it."""

from __future__ import annotations

from torch import Tensor

from kvcomp.core.interfaces import Merger
from kvcomp.core.types import Assignment, LayerView, Pivots
from kvcomp_strategies.merging import blend, merged_counts, received_weight


class Mean(Merger, use="mean"):
    """LOOK-M's average merge, as intended: k_j <- (k_j + sum_i k_i) / (n_j + 1), the same for values.

    Source: SUSTechBruce/LOOK-M, `llava/model/kv_token_merge/modify_llama.py`, whose own version pairs filtered
        indices with unfiltered sources.
    """

    requires = frozenset({"pivots", "edges"})
    provides = frozenset({"merging"})

    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        """Return the means of keys and values, and the counts."""
        share = 1.0 / (received_weight(assignment, pivots.indices.shape[2]) + 1.0)
        keys = blend(layer.keys, pivots, assignment, own=share, shared=share)
        values = blend(layer.values, pivots, assignment, own=share, shared=share)
        return keys, values, merged_counts(layer, pivots, assignment)
