"""Keep the pivots as they are."""

from __future__ import annotations

from torch import Tensor

from kvcomp.core.interfaces import Merger
from kvcomp.core.types import Assignment, LayerView, Pivots


class Drop(Merger, use="drop"):
    """Gather keys, values and counts of the pivots; every other token is gone."""

    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pivots' keys, values and counts."""
        return pivots.gather(layer.keys), pivots.gather(layer.values), pivots.gather(layer.counts)
