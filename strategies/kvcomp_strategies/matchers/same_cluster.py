"""Every token goes to the pivot of its cluster."""

from __future__ import annotations

from torch import Tensor

from kvcomp.core.interfaces import Matcher
from kvcomp.core.types import Assignment, LayerView, Pivots, Scores
from kvcomp_strategies.matching import allowed_modalities, edges_to, other_tokens


class SameCluster(Matcher, use="same-cluster"):
    """Follow the selector's clusters: a token that does not stay goes to the pivot of its own (KVMerger,
    arXiv:2407.08454, Sec. 4).

    Protected pivots receive nothing, and neither does a pivot that the rule of modalities forbids: such a token is
    evicted, since its cluster has no other pivot.
    """

    requires = frozenset({"pivots", "groups", "merging"})
    provides = frozenset({"edges"})

    def match(self, layer: LayerView, pivots: Pivots, scores: Scores, rule: Tensor) -> Assignment:
        """Return one edge per token whose cluster has a pivot that may receive it."""
        assert pivots.groups is not None
        sources = other_tokens(layer, pivots)
        targets = pivots.groups.gather(2, sources.clamp(min=0)).masked_fill(sources < 0, -1)
        slots = targets.clamp(min=0)
        same = pivots.gather(layer.compared_modality).gather(2, slots) == layer.compared_modality.gather(
            2, sources.clamp(min=0)
        )
        eligible = pivots.filled() & ~pivots.gather(scores.protected)
        open_targets = eligible.gather(2, slots) & allowed_modalities(same, rule.view(-1, 1, 1))
        return edges_to(sources, targets.masked_fill(~open_targets, -1))
