"""The order of tokens within a head and among heads."""

import torch
from kvcomp_strategies.ranking import best_first, counts_among_best

from kvcomp import Scores


def test_priority_comes_before_score_and_score_before_place() -> None:
    values = torch.tensor([[[5.0, 1.0, 1.0, 9.0, 2.0]]])
    valid = torch.tensor([[[True, True, True, False, True]]])
    protected = torch.tensor([[[False, False, True, False, False]]])
    tiers = torch.tensor([[[0, 1, 0, 0, 0]]], dtype=torch.int16)
    assert best_first(Scores(values, protected), valid).tolist() == [[[2, 0, 4, 1, 3]]]
    assert best_first(Scores(values, protected, tiers), valid).tolist() == [[[2, 1, 0, 4, 3]]]


def counts(keys: list[list[list[float]]], wanted: int, eligible: list[list[bool]] | None = None) -> list[int]:
    tensors = [torch.tensor([key]) for key in keys]
    among = torch.ones_like(tensors[0], dtype=torch.bool) if eligible is None else torch.tensor([eligible])
    return counts_among_best(tensors, among, torch.tensor([wanted])).tolist()[0]


def test_the_best_of_all_bins_are_counted() -> None:
    scores = [[0.9, 0.5], [0.3, 0.8], [0.7, 0.1]]  # two bins of three tokens
    assert [counts([scores], wanted) for wanted in range(7)] == [
        [0, 0],
        [1, 0],
        [1, 1],
        [2, 1],
        [2, 2],
        [3, 2],
        [3, 3],
    ]
    assert counts([scores], 99) == [3, 3]


def test_equal_scores_go_to_the_earlier_token_then_the_earlier_bin() -> None:
    tied = [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    assert [counts([tied], wanted) for wanted in (1, 2, 3, 5)] == [[1, 0], [1, 1], [2, 1], [3, 2]]


def test_an_earlier_key_decides_first() -> None:
    first, second = [[0.0, 1.0], [0.0, 0.0]], [[9.0, 0.0], [1.0, 8.0]]
    assert [counts([first, second], wanted) for wanted in (1, 2, 3)] == [[0, 1], [1, 1], [1, 2]]


def test_what_is_not_eligible_is_never_counted() -> None:
    scores, there = [[9.0, 1.0], [8.0, 2.0]], [[False, True], [True, False]]
    assert [counts([scores], wanted, there) for wanted in (1, 2, 9)] == [[1, 0], [1, 1], [1, 1]]


def test_rows_are_counted_for_themselves() -> None:
    scores = torch.tensor([[[1.0, 2.0]], [[2.0, 1.0]]])
    found = counts_among_best([scores], scores > 0, torch.tensor([1, 1]))
    assert found.tolist() == [[0, 1], [1, 0]]
