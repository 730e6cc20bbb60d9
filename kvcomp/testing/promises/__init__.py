"""The pure promises of a strategy, one function each: it takes a strategy and a sample, and raises where they break.

`PROMISES` names them all. A promise about pivots says nothing about a strategy without a selector.
"""

from __future__ import annotations

from collections.abc import Callable

from kvcomp.core.strategy import Strategy
from kvcomp.testing.promises import budget, invariance, merging
from kvcomp.testing.samples import Sample

Promise = Callable[[Strategy, Sample], None]

PROMISES: dict[str, Promise] = {
    "unchanged-inputs": invariance.unchanged_inputs,
    "exact-slots": budget.exact_slots,
    "sorted-pivots": budget.sorted_pivots,
    "earlier-ties": budget.earlier_ties,
    "higher-tiers": budget.higher_tiers,
    "protected-stay": budget.protected_stay,
    "all-kept": budget.all_kept,
    "edges": merging.edges_are_well_formed,
    "modality-rules": merging.modality_rules,
    "locked-pivots": merging.locked_pivots,
    "counts": merging.counts_conserved,
    "convex-hull": merging.convex_hull,
    "equal-vectors": merging.equal_vectors,
    "same-edges": merging.same_edges,
    "same-bits": invariance.same_bits,
    "finite": invariance.finite,
    "permuted-rows": invariance.permuted_rows,
    "permuted-heads": invariance.permuted_heads,
    "row-alone": invariance.row_alone,
}
