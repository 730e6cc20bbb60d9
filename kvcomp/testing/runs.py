"""One run of a strategy on a sample, stage by stage, so that a promise can look at any of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcomp.core.attention import observe
from kvcomp.core.budget import Budget
from kvcomp.core.errors import BudgetError
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import Assignment, CompressedLayer, LayerView, MergePlan, Pivots, Scores
from kvcomp.testing.failures import fail
from kvcomp.testing.samples import Sample


@dataclass(frozen=True, eq=False)
class Run:
    """What each stage returned. `share` `(batch,)` is the uniform share, `slots` `(batch, kv_heads)` the allotment."""

    strategy: Strategy
    view: LayerView
    share: Tensor
    scores: Scores
    slots: Tensor
    plan: MergePlan
    compressed: CompressedLayer

    @property
    def pivots(self) -> Pivots:
        """Return the pivots."""
        return self.plan.pivots or fail("the plan has no pivots, though the strategy has a selector")

    @property
    def assignment(self) -> Assignment:
        """Return the edges."""
        return self.plan.assignment or fail("the plan has no assignment, though the strategy has a selector")

    def kept(self) -> Tensor:
        """Return which tokens stay, `(batch, kv_heads, tokens)` bool."""
        tokens = self.view.shape[2]
        places = self.pivots.indices.masked_fill(~self.pivots.filled(), tokens)
        kept = torch.zeros(*self.view.shape[:2], tokens + 1, dtype=torch.bool)
        return kept.scatter_(2, places, True)[..., :tokens]

    def protected(self) -> Tensor:
        """Return which tokens are protected for what was allotted; where that is too little, the latest."""
        return self.strategy.for_slots(self.view, self.scores, self.slots).protected

    def edges(self) -> Tensor:
        """Return the weight of each edge, `(batch, kv_heads, tokens, slots)` float64, 0 where there is none."""
        assignment, slots = self.assignment, self.pivots.indices.shape[2]
        table = torch.zeros(*self.view.shape, slots, dtype=torch.float64)
        batch, head, other, edge = (assignment.targets >= 0).nonzero(as_tuple=True)
        sources = assignment.sources[batch, head, other]
        targets = assignment.targets[batch, head, other, edge]
        weights = assignment.weights[batch, head, other, edge].double()
        table.index_put_((batch, head, sources, targets), weights, accumulate=True)
        return table


def view_for(strategy: Strategy, sample: Sample) -> LayerView:
    """Return the view of a sample with exactly the observations that this strategy declares."""
    return replace(sample.view(), observations=observe(sample.inputs(), strategy.observations))


def run(strategy: Strategy, sample: Sample) -> Run:
    """Return what every stage makes of a sample, as the runtime calls them."""
    return run_view(strategy, view_for(strategy, sample))


def run_view(strategy: Strategy, view: LayerView) -> Run:
    """Return what every stage makes of a view; of a budget that is too small for it, at the smallest that is not,
    whether it says `or smallest` or not.
    """
    strategy = replace(strategy, budget=replace(strategy.budget, or_smallest=False))
    try:
        return _run(strategy, view)
    except BudgetError as error:
        if error.smallest is None:
            raise
        return _run(replace(strategy, budget=Budget.parse(error.smallest)), view)


def _run(strategy: Strategy, view: LayerView) -> Run:
    tokens = view.valid.sum(dim=-1).amax(dim=-1)
    share = strategy.slots(tokens, view.form)
    scores = strategy.scores(view, share)
    if strategy.allocator.scope == "model":
        (scores,) = strategy.together([view], [scores])
    slots = strategy.allocate(share, [view], [scores])[0]
    plan = strategy.plan(view, slots, scores)
    return Run(strategy, view, share, scores, slots, plan, strategy.apply(view, plan))
