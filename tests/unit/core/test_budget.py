"""Budgets: what is read, and one table of what is not."""

import math
from fractions import Fraction

import pytest
import torch

import kvcomp
from kvcomp import Budget, BudgetError

REFUSED = {
    "zero": (0, r"a ratio in \(0, 1\], got 0"),
    "negative": (-0.2, r"got -0\.2"),
    "above one": (1.5, r"got 1\.5; write one of: .*\{tokens: 512\}"),
    "two": (2, r"\{tokens: 512\}"),
    "nan": (math.nan, "nan"),
    "infinite": (math.inf, "inf"),
    "true": (True, "got True"),
    "false": (False, "got False"),
    "none": (None, "got None"),
    "word": ("abc", "got 'abc'"),
    "empty": ("", "got ''"),
    "percent": ("20%", "got '20%'"),
    "list": ([0.2], r"got \[0\.2\]"),
    "zero tokens": ({"tokens": 0}, "a budget in tokens must be at least 1, got 0"),
    "negative tokens": ({"tokens": -4}, "at least 1, got -4"),
    "true tokens": ({"tokens": True}, "got {'tokens': True}"),
    "fractional tokens": ({"tokens": 2.5}, "got {'tokens': 2.5}"),
    "zero t": ("0t", "at least 1, got 0"),
    "zero bytes": ({"bytes": 0}, "a budget in bytes must be at least 1, got 0"),
    "unknown unit": ({"bytes": "3 parsecs"}, "bytes must be a whole number or like '64MiB'"),
    "unknown unit of bytes": ("1xb", r"KiB, MiB, GiB, TiB, KB, MB, GB, TB\); got '1xb'"),
    "unit without number": ("MiB", "like '64MiB'"),
    "unknown key": ({"slots": 3}, "got {'slots': 3}"),
    "two keys": ({"tokens": 3, "bytes": 5}, "a budget must be"),
    "no key": ({}, "got {}"),
    "or nothing": (" or smallest", "got ' or smallest'"),
    "half an or": ("0.2 or small", "got '0.2 or small'"),
    "division by zero": ("1/0", "got '1/0'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message_that_helps(case: str) -> None:
    value, message = REFUSED[case]
    with pytest.raises(BudgetError, match=message):
        Budget.parse(value)


READ = {
    "ratio": (0.2, Budget(ratio=Fraction(1, 5))),
    "text": ("0.2", Budget(ratio=Fraction(1, 5))),
    "scientific": (1e-3, Budget(ratio=Fraction(1, 1000))),
    "whole": (1, Budget(ratio=Fraction(1))),
    "tokens": ({"tokens": 512}, Budget(tokens=512)),
    "t": ("512t", Budget(tokens=512)),
    "spelled out": (" 512 tokens ", Budget(tokens=512)),
    "bytes": ({"bytes": 100}, Budget(bytes=100)),
    "MiB": ("64MiB", Budget(bytes=64 * 2**20)),
    "half a KB": ({"bytes": "0.5KB"}, Budget(bytes=500)),
    "GiB": ("1 GiB", Budget(bytes=2**30)),
    "ratio or smallest": ("0.2 or smallest", Budget(ratio=Fraction(1, 5), or_smallest=True)),
    "tokens or smallest": ("64t or smallest", Budget(tokens=64, or_smallest=True)),
    "bytes or smallest": ("1KiB or smallest", Budget(bytes=1024, or_smallest=True)),
    "plain B": ("17B", Budget(bytes=17)),
    "small letters": ("32kb", Budget(bytes=32_000)),
    "TiB": ({"bytes": "1TiB"}, Budget(bytes=2**40)),
    "digits in a mapping": ({"bytes": "17"}, Budget(bytes=17)),
}


@pytest.mark.parametrize("case", READ)
def test_read(case: str) -> None:
    value, expected = READ[case]
    assert Budget.parse(value) == expected


@pytest.mark.parametrize(
    "text", ["1/3", "1e-400", "1/3 or smallest", "0.2 or smallest", "64t or smallest", "1KiB or smallest"]
)
def test_what_is_accepted_comes_back_from_its_dump(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except BudgetError:
        return
    assert Budget.parse(budget.dump()) == budget


@pytest.mark.parametrize(
    ("ratio", "tokens", "slots"),
    [(0.2, 9, 1), (0.2, 5, 1), (0.2, 4, 1), (0.29, 100, 29), (0.57, 100, 57), (1.0, 7, 7), (0.7, 10, 7), (0.1, 1, 1)],
)
def test_slots_by_hand(ratio: float, tokens: int, slots: int) -> None:
    assert Budget.parse(ratio).slots(torch.tensor([tokens]), slot_bytes=1).tolist() == [slots]


def test_rows_are_counted_by_themselves() -> None:
    assert Budget.parse(0.5).slots(torch.tensor([3, 10, 1]), slot_bytes=1).tolist() == [1, 5, 1]
    assert Budget.parse("4t").slots(torch.tensor([3, 10, 1]), slot_bytes=1).tolist() == [3, 4, 1]
    assert Budget.parse("100B").slots(torch.tensor([3, 10, 1]), slot_bytes=30).tolist() == [3, 3, 1]


def test_too_few_bytes_say_what_a_slot_takes() -> None:
    with pytest.raises(BudgetError, match=r"100 bytes is below one slot .* takes 101 bytes") as caught:
        Budget.parse("100B").slots(torch.tensor([8]), slot_bytes=101)
    assert caught.value.smallest == pytest.approx(0.125, abs=1e-5)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(0.5, [15, 50]), ("0.333333", [9, 33]), ("4t", [30, 40]), ("70B", [70, 70]), (1.0, [30, 100])],
)
def test_a_budget_is_bytes_of_each_row(budget: object, expected: list[int]) -> None:
    assert Budget.parse(budget).nbytes(torch.tensor([3, 10]), slot_bytes=10).tolist() == expected


@pytest.mark.parametrize("fields", [{}, {"tokens": 1, "bytes": 1}], ids=["none", "two"])
def test_a_budget_is_exactly_one_of_three(fields: dict) -> None:
    with pytest.raises(BudgetError, match="exactly one of"):
        Budget(**fields)


@pytest.mark.parametrize(("value", "text"), [(0.25, "0.25"), ("8t", "8t"), ("1KiB", "1024B")])
def test_it_prints_as_it_is_written(value: object, text: str) -> None:
    assert str(Budget.parse(value)) == text


def test_it_is_public() -> None:
    assert kvcomp.Budget is Budget
