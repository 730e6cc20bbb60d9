"""The largest query of each channel."""

from __future__ import annotations

from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import AttentionBlock


class QueryPeaks(Observation, use="query-peaks"):
    """The largest magnitude that a channel of the queries has, `(batch, heads, head_dim)` float32, after rotation.

    What MiKV's channel balancer (arXiv:2402.18096) needs of the prompt.
    """

    queries_only = True

    def update(self, state: Tensor | None, block: AttentionBlock) -> Tensor:
        """Return the peaks with the block's rows looked at."""
        seen = block.queries.float().abs().masked_fill(~block.row_valid[:, None, :, None], 0.0).amax(dim=2)
        return seen if state is None else state.maximum(seen)
