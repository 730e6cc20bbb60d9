"""Triggers: three spellings, and what cannot go with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kvcomp_strategies.scorers.position import Position

import kvcomp
from kvcomp.core.trigger import Trigger

SPELLED = {
    "prefill-end": Trigger(),
    "over-budget": Trigger(over_budget=True),
    "every": Trigger(every=64),
}


@pytest.mark.parametrize("trigger", SPELLED.values(), ids=SPELLED)
def test_what_is_dumped_is_read_back(trigger: Trigger) -> None:
    assert Trigger.parse(trigger.dump()) == trigger
    strategy = kvcomp.strategy("h2o", trigger=trigger)
    assert kvcomp.strategy(strategy.dump()) == strategy
    assert strategy.trigger == trigger


BAD = [0, True, None, "never", {"every": 0}, {"every": "5"}, {"every": True}, {"every": 2, "more": 1}, {}, ["every"]]


@pytest.mark.parametrize("value", BAD, ids=str)
def test_anything_else_is_refused_with_the_spellings(value: object) -> None:
    with pytest.raises(kvcomp.ConfigError, match=r"trigger: must be prefill-end, over-budget or \{every: N\}"):
        kvcomp.strategy("h2o", trigger=value)


def test_a_near_miss_is_named() -> None:
    with pytest.raises(kvcomp.ConfigError, match="Did you mean 'over-budget'"):
        kvcomp.strategy("h2o", trigger="overbudget")


class Once(Position, use="once-for-tests"):
    """Positions, once."""

    prefill_only = "it looks at the whole prompt"


def test_a_part_that_works_at_the_end_of_a_prefill_only_is_refused_with_its_reason() -> None:
    strategy = kvcomp.strategy("streaming-llm")
    assert replace(strategy, scorer=Once()).trigger == Trigger()
    with pytest.raises(kvcomp.ConfigError) as caught:
        replace(strategy, scorer=Once(), trigger=Trigger(every=8), turns="append")
    assert caught.value.faults == (
        "trigger: scorer 'once-for-tests' cannot compress again while tokens are decoded: it looks at the whole prompt",
        "trigger: every 8 tokens compresses what turns: append says must stay; choose one of them",
    )


def test_conflicts_with_a_trigger_are_listed_with_the_other_faults() -> None:
    with pytest.raises(kvcomp.ConfigError) as caught:
        kvcomp.strategy("h2o", trigger="over-budget", turns="append", name=3)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["name", "trigger"]


@pytest.mark.parametrize(("recipe", "budget", "again"), [("h2o", 0.5, True), ("h2o", 1.0, False), ("full", 1.0, False)])
def test_something_is_compressed_again_only_where_something_is_compressed(
    recipe: str, budget: float, again: bool
) -> None:
    assert kvcomp.strategy(recipe, budget, trigger="over-budget").recompresses is again
    assert not kvcomp.strategy(recipe, budget).recompresses
