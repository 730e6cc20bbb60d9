"""A mean in which tokens that received more attention weigh more."""

from __future__ import annotations

from dataclasses import replace

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import Assignment, LayerView, Pivots
from kvcomp_strategies.merging import Blending, Shares, received_weight
from kvcomp_strategies.observations.received_attention import ReceivedSums
from kvcomp_strategies.windows import group_mean

LEAST_IMPORTANCE = 1e-20  # a token that received nothing still has a place in a mean of such tokens


class ImportanceWeighted(Blending, use="importance-weighted"):
    """k_j <- (a_j k_j + sum_i a_i k_i) / (a_j + sum_i a_i), the same for values, with a the attention that a token
    received from all queries (H2O's sums, averaged over the query group).

    Values merged so give, for queries that look as those of the prompt did on average, the attention output of the
    tokens that they stand for. The weight is the attention and not the scorer's score, which may be negative or be a
    rank.
    """

    def observations(self) -> tuple[Observation, ...]:
        """Return the column sums."""
        return (ReceivedSums(),)

    def shares(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> Shares:
        """Return the attention of each member, divided by that of all."""
        importance = group_mean(layer.observations[ReceivedSums()], layer.shape[1]).clamp(min=LEAST_IMPORTANCE)
        own, sources = pivots.gather(importance), importance.gather(2, assignment.sources.clamp(min=0))
        weighted = replace(assignment, weights=assignment.weights * sources[..., None])
        total = own + received_weight(weighted, own.shape[2])
        return Shares(weighted, own=own / total, shared=1.0 / total)
