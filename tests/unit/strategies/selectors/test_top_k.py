"""Keep the best: order, ties, protection, heads that keep fewer."""

from __future__ import annotations

import pytest
import torch
from kvcomp_strategies.selectors.top_k import TopK

from kvcomp import Pivots, Scores
from kvcomp.testing import make_sample


def select(
    values: list[float], slots: int, protected: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> list[int]:
    view = make_sample(0, (len(values),), kv_heads=1).view()
    locked = torch.zeros_like(view.valid)
    locked[0, 0, list(protected)] = True
    scores = Scores(torch.tensor(values, dtype=dtype)[None, None], locked)
    return TopK().select(view, scores, torch.tensor([[slots]])).indices[0, 0].tolist()


CASES = {
    "best by place": ([3, 9, 1, 7], 2, (), [1, 3]),
    "one": ([3, 9, 1, 7], 1, (), [1]),
    "all": ([3, 9, 1, 7], 4, (), [0, 1, 2, 3]),
    "ties to the earlier": ([1, 1, 1, 1], 2, (), [0, 1]),
    "ties below the best": ([1, 5, 1, 1], 2, (), [0, 1]),
    "protected first": ([9, 8, 0, 0], 2, (3,), [0, 3]),
    "all protected": ([9, 8, 0, 0], 2, (2, 3), [2, 3]),
    "negative scores": ([-5, -1, -3], 2, (), [1, 2]),
    "lowest scores beat no token": ([-1e30, -1e30, 0], 2, (), [0, 2]),
    "tiny differences": ([1.0, 1.0 + 1.2e-7, 1.0], 1, (), [1]),
    "huge scores do not beat protection": ([1e38, 1e38, 0], 1, (2,), [2]),
}


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case: str) -> None:
    values, slots, protected, expected = CASES[case]
    assert select(values, slots, protected) == expected


def test_ties_among_many_tokens_go_to_the_earliest() -> None:
    """An unstable sort shows itself only above a few dozen tokens."""
    assert select([0.5] * 3000, 1000) == list(range(1000))


def two_rows(slots: list[int]) -> Pivots:
    """Rows of 3 and 5 tokens on an axis of 5; later tokens score higher."""
    view = make_sample(0, (3, 5), kv_heads=1).view()
    scores = Scores(torch.arange(5.0).expand(2, 1, 5), torch.zeros_like(view.valid))
    return TopK().select(view, scores, torch.tensor(slots)[:, None])


def test_rows_that_keep_fewer_are_masked_at_the_end() -> None:
    pivots = two_rows([1, 3])
    assert pivots.indices.tolist() == [[[4, 0, 0]], [[2, 3, 4]]]
    assert pivots.mask is not None
    assert pivots.mask.tolist() == [[[True, False, False]], [[True, True, True]]]


def test_rows_that_keep_everything_keep_no_pads() -> None:
    pivots = two_rows([3, 5])
    assert pivots.indices.tolist() == [[[2, 3, 4, 0, 0]], [[0, 1, 2, 3, 4]]]


def test_one_row_that_keeps_everything_leaves_the_other_its_best() -> None:
    pivots = two_rows([2, 5])
    assert pivots.indices.tolist() == [[[3, 4, 0, 0, 0]], [[0, 1, 2, 3, 4]]]


def test_equal_numbers_need_no_mask() -> None:
    assert two_rows([2, 2]).mask is None


def test_pads_are_never_kept_though_they_score_higher() -> None:
    view = make_sample(0, (3, 5), kv_heads=1).view()
    scores = Scores(-torch.arange(5.0).expand(2, 1, 5), torch.zeros_like(view.valid))
    pivots = TopK().select(view, scores, torch.tensor([[2], [2]]))
    assert pivots.indices.tolist() == [[[2, 3]], [[0, 1]]]


def test_a_higher_tier_comes_before_any_score() -> None:
    values = torch.tensor([[[9.0, 8.0, 1e-30, 7.0, 0.0, 6.0]]])
    tiers = torch.tensor([[[0, 0, 1, 0, 2, 0]]], dtype=torch.int16)
    nobody = torch.zeros(1, 1, 6, dtype=torch.bool)
    view = make_sample(0, (6,), kv_heads=1).view()
    for count, expected in ((1, [4]), (2, [2, 4]), (3, [0, 2, 4])):
        pivots = TopK().select(view, Scores(values, nobody, tiers), torch.tensor([[count]]))
        assert pivots.indices.tolist() == [[expected]]
    protected = nobody.index_fill(2, torch.tensor(5), True)
    pivots = TopK().select(view, Scores(values, protected, tiers), torch.tensor([[2]]))
    assert pivots.indices.tolist() == [[[4, 5]]]


def test_overflow_keeps_every_token_above_the_lowest_tier() -> None:
    view = make_sample(0, (6,), kv_heads=2).view()
    tiers = torch.tensor([[[1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1]]], dtype=torch.int16)
    scores = Scores(torch.arange(6.0).expand(1, 2, 6), torch.zeros(1, 2, 6, dtype=torch.bool), tiers)
    pivots = TopK(overflow=True).select(view, scores, torch.tensor([[2, 2]]))
    assert [
        row[: int(mask.sum())] for row, mask in zip(pivots.indices[0].tolist(), pivots.filled()[0], strict=True)
    ] == [
        [0, 1, 2, 4],
        [4, 5],
    ]
