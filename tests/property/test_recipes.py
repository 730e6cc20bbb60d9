"""Every promise of the conformance kit, for every registered recipe, on drawn prompts and budgets."""

from dataclasses import replace

import pytest
from generators import BUDGETS, DISTINCT, RECIPES, SAMPLES
from hypothesis import given
from hypothesis import strategies as st

import kvcomp
from kvcomp.core.budget import Budget
from kvcomp.testing import PROMISES, Sample
from kvcomp.testing.conformance import NEEDS_DISTINCT


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize("recipe", RECIPES)
@given(data=st.data(), budget=BUDGETS)
def test_a_recipe_keeps_its_promises(recipe: str, promise: str, data: st.DataObject, budget: Budget) -> None:
    sample: Sample = data.draw(DISTINCT if promise in NEEDS_DISTINCT else SAMPLES)
    PROMISES[promise](replace(kvcomp.strategy(recipe), budget=budget), sample)


@pytest.mark.parametrize("recipe", RECIPES)
@given(budget=BUDGETS)
def test_a_recipe_comes_back_from_its_dump(recipe: str, budget: Budget) -> None:
    strategy = replace(kvcomp.strategy(recipe), budget=budget)
    assert kvcomp.strategy(strategy.dump()) == strategy
    assert kvcomp.strategy(strategy) == strategy


def test_the_registry_has_the_recipes_of_the_paper() -> None:
    assert {"flowmm", "full", "h2o", "random", "snapkv", "streaming-llm"} <= set(RECIPES)
