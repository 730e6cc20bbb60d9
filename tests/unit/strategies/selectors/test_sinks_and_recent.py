"""Keep the first and the latest: by hand, with protection, without a scorer, beside the recipe that keeps the same."""

from __future__ import annotations

import pytest
import torch
from kvcomp_strategies.selectors.sinks_and_recent import SinksAndRecent

import kvcomp
from kvcomp import Budget, Pivots, Scores
from kvcomp.testing import make_sample


def select(tokens: tuple[int, ...], slots: list[int], protected: tuple[int, ...] = (), sinks: int = 2) -> Pivots:
    view = make_sample(0, tokens, kv_heads=1).view()
    locked = torch.zeros_like(view.valid)
    locked[0, 0, list(protected)] = True
    scores = Scores(torch.zeros(view.shape), locked)
    return SinksAndRecent(sinks=sinks).select(view, scores, torch.tensor(slots)[:, None])


CASES = {
    "both ends": (8, 5, (), [0, 1, 5, 6, 7]),
    "one recent": (8, 3, (), [0, 1, 7]),
    "no room beside the sinks": (8, 2, (), [6, 7]),
    "one": (8, 1, (), [7]),
    "all": (4, 4, (), [0, 1, 2, 3]),
    "protected before sinks, of which the latest": (8, 3, (4, 5), [1, 4, 5]),
    "protected alone": (8, 3, (3, 4, 5), [3, 4, 5]),
}


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case: str) -> None:
    tokens, slots, protected, expected = CASES[case]
    assert select((tokens,), [slots], protected).indices[0, 0].tolist() == expected


def test_sinks_of_a_padded_row_are_its_own_first_tokens() -> None:
    """A row of 5 tokens has 3 pads before them, and keeps fewer."""
    pivots = select((5, 8), [4, 5])
    assert pivots.mask is not None
    assert pivots.indices[0, 0][pivots.mask[0, 0]].tolist() == [3, 4, 6, 7]
    assert pivots.indices[1, 0].tolist() == [0, 1, 5, 6, 7]


@pytest.mark.parametrize("slots", [1, 3, 4, 5, 9, 20])
def test_it_needs_no_scorer_and_keeps_what_streaming_llm_keeps(slots: int) -> None:
    view = make_sample(1, (20, 13), kv_heads=2).view()
    alone = kvcomp.strategy({"selector": "sinks-and-recent", "budget": {"tokens": slots}})
    recipe = kvcomp.strategy("streaming-llm", budget={"tokens": slots})
    assert alone.scorer is None
    assert alone.budget == Budget.parse({"tokens": slots})
    kept = [strategy.apply(view, strategy.plan(view)).indices.tolist() for strategy in (alone, recipe)]
    assert kept[0] == kept[1]
