"""Every token goes to the pivot with the most similar key."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Matcher
from kvcomp.core.types import Assignment, LayerView, Pivots, Scores
from kvcomp_strategies.matching import nearest_pivots


class Nearest(Matcher, use="nearest"):
    """Cosine similarity of keys (FlowMM Eq. 9), after rotary embedding, per KV head; values follow their keys.

    Protected pivots (a scorer's window) never receive a token. In place of `sensitivity-gated`: FlowMM without its
    gate.

    Attributes:
        floor: tokens whose best cosine is below it are evicted; -1 for none (row u of the FlowMM card; D2O has one).
    """

    requires = frozenset({"pivots", "scores", "merging"})
    provides = frozenset({"edges"})

    floor: float = Field(default=-1.0, ge=-1.0, le=1.0)

    def match(self, layer: LayerView, pivots: Pivots, scores: Scores, rule: Tensor) -> Assignment:
        """Return one edge per token that finds an eligible pivot."""
        eligible = pivots.filled() & ~pivots.gather(scores.protected)
        return nearest_pivots(layer, pivots, eligible, rule, self.floor)
