"""The plain mean of a pivot and what is merged into it."""

from __future__ import annotations

from kvcomp.core.types import Assignment, LayerView, Pivots
from kvcomp_strategies.merging import Blending, Shares, received_weight


class Mean(Blending, use="mean"):
    """LOOK-M's average merge, as intended: k_j <- (k_j + sum_i k_i) / (n_j + 1), the same for values.

    Source: SUSTechBruce/LOOK-M, `llava/model/kv_token_merge/modify_llama.py`, whose own version pairs filtered
        indices with unfiltered sources.
    """

    def shares(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> Shares:
        """Return the same share for the pivot and for each source."""
        share = 1.0 / (received_weight(assignment, pivots.indices.shape[2]) + 1.0)
        return Shares(assignment, own=share, shared=share)
