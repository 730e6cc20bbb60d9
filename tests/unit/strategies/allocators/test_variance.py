"""Layers that D2O's official code leaves alone: inside the budget, or refused."""

import pytest
import torch

import kvcomp
from kvcomp.testing import make_sample, view_for

LAYERS, TOKENS = 3, 20


def allotted(slots: int, budget: str | None = None, **fields: object) -> torch.Tensor:
    strategy = kvcomp.strategy("h2o", budget, allocator={"use": "variance", **fields})
    views = [view_for(strategy, make_sample(layer, (TOKENS,), layer=layer)) for layer in range(LAYERS)]
    share = torch.tensor([slots])
    return strategy.allocate(share, views, [strategy.scores(view, share) for view in views])[:, 0]


def test_skipped_layers_keep_everything_inside_the_budget() -> None:
    assert allotted(15, skip_layers=[0, -1]).tolist() == [[20, 20], [5, 5], [20, 20]]
    assert allotted(15, skip_layers=[7]).sum() == 15 * 2 * LAYERS


def test_a_budget_that_the_skipped_layers_exceed_is_refused_with_the_smallest() -> None:
    with pytest.raises(kvcomp.BudgetError, match=r"layers \[0, 2\] kept whole.*a ratio of at least 0.7,") as caught:
        allotted(13, skip_layers=[0, -1])
    assert caught.value.smallest == 0.7  # (20 + 1 + 20) / 3 slots per layer are 14 of 20
    assert allotted(14, skip_layers=[0, -1]).tolist() == [[20, 20], [2, 2], [20, 20]]
    lenient = allotted(1, "0.1 or smallest", skip_layers=[0, -1])
    assert lenient.tolist() == [[20, 20], [2, 2], [20, 20]]
