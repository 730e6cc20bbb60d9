"""Pure eviction."""

from __future__ import annotations

from torch import Tensor

from kvcomp.core.interfaces import Matcher
from kvcomp.core.types import Assignment, LayerView, Pivots, Scores
from kvcomp_strategies.matching import no_edges


class NoMatch(Matcher, use="none"):
    """Send no token anywhere: what does not stay is evicted."""

    def match(self, layer: LayerView, pivots: Pivots, scores: Scores, rule: Tensor) -> Assignment:
        """Return an assignment without edges."""
        return no_edges(layer, pivots)
