"""The last rows, one by one."""

import torch
from generators import rows_of
from kvcomp_strategies.observations.window_attention import WindowRows


def test_the_last_valid_queries_are_needed() -> None:
    valid = torch.tensor([[True] * 6, [False] * 4 + [True] * 2])
    assert rows_of(WindowRows(count=3), valid).tolist() == [[3, 4, 5], [-1, 4, 5]]


def test_pads_at_the_end_and_in_the_middle_are_left_out() -> None:
    valid = torch.tensor([[True, False, True, True, False, False]])
    assert rows_of(WindowRows(count=2), valid).tolist() == [[2, 3]]
    assert rows_of(WindowRows(count=5), valid).tolist() == [[-1, -1, 0, 2, 3]]


def test_fewer_queries_than_rows() -> None:
    assert rows_of(WindowRows(count=32), torch.ones(1, 2, dtype=torch.bool)).tolist() == [[0, 1]]


def test_it_does_not_depend_on_the_budget() -> None:
    assert WindowRows(count=32) == WindowRows()
    assert set(WindowRows.model_fields) == {"count"}
