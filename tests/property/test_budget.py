"""Budgets: spellings, round trips, and what is refused."""

import math
from fractions import Fraction

import pytest
import torch
from generators import BUDGETS
from hypothesis import given
from hypothesis import strategies as st

from kvcomp import Budget, BudgetError

TOKENS = st.lists(st.integers(1, 10**6), min_size=1, max_size=4).map(torch.tensor)


@given(budget=BUDGETS)
def test_a_budget_comes_back_from_its_dump_and_its_text(budget: Budget) -> None:
    assert Budget.parse(budget.dump()) == budget
    assert Budget.parse(str(budget)) == budget
    assert Budget.parse(budget) is budget


@given(ratio=st.decimals("0.0001", "1", places=4))
def test_a_ratio_is_the_decimal_as_written_in_every_spelling(ratio) -> None:  # type: ignore[no-untyped-def]
    assert Budget.parse(str(ratio)).ratio == Budget.parse(float(ratio)).ratio == Fraction(str(ratio))


@given(budget=BUDGETS, tokens=TOKENS)
def test_slots_are_at_least_one_and_at_most_the_tokens(budget: Budget, tokens: torch.Tensor) -> None:
    slots = budget.slots(tokens, slot_bytes=64)
    assert slots.dtype == torch.int64
    assert bool(((slots >= 1) & (slots <= tokens)).all())


@given(budget=BUDGETS, tokens=TOKENS)
def test_a_row_gets_in_a_batch_what_it_gets_alone(budget: Budget, tokens: torch.Tensor) -> None:
    alone = [budget.slots(row[None], slot_bytes=64).item() for row in tokens]
    assert budget.slots(tokens, slot_bytes=64).tolist() == alone


@given(limit=st.integers(64, 10**9), tokens=TOKENS, slot_bytes=st.integers(1, 64))
def test_bytes_pay_for_whole_slots_and_never_more(limit: int, tokens: torch.Tensor, slot_bytes: int) -> None:
    slots = Budget.parse({"bytes": limit}).slots(tokens, slot_bytes)
    assert slots.tolist() == [min(count, limit // slot_bytes) for count in tokens.tolist()]


@given(limit=st.integers(1, 10**6), tokens=TOKENS)
def test_the_smallest_ratio_of_a_refused_budget_is_accepted(limit: int, tokens: torch.Tensor) -> None:
    with pytest.raises(BudgetError, match="below one slot") as caught:
        Budget.parse({"bytes": limit}).slots(tokens, slot_bytes=limit + 1)
    assert caught.value.smallest is not None
    assert Budget.parse(caught.value.smallest).slots(tokens, slot_bytes=limit + 1).min() >= 1


@given(value=st.one_of(st.floats(max_value=0), st.floats(min_value=1, exclude_min=True), st.just(math.nan)))
def test_a_number_that_is_no_ratio_is_refused_and_shows_the_spellings(value: float) -> None:
    with pytest.raises(BudgetError, match=r"a ratio in \(0, 1\]"):
        Budget.parse(value)


@given(text=st.text(st.characters(codec="ascii"), max_size=8))
def test_any_text_is_a_budget_or_a_budget_error(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except BudgetError:
        budget = Budget.parse(1.0)
    assert Budget.parse(budget.dump()) == budget
