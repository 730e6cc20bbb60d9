"""Whole shares of one budget, by hand."""

import pytest
import torch
from kvcomp_strategies.apportioning import allot, apportion, check_room

import kvcomp
from kvcomp import Scores
from kvcomp.testing import make_sample


def shares(weights: list[float], total: int, least: list[int], most: list[int]) -> list[int]:
    bounds = [torch.tensor([numbers]) for numbers in (least, most)]
    firm = bounds[1].clamp(max=1)
    return apportion(torch.tensor([weights], dtype=torch.float64), torch.tensor([total]), *bounds, firm=firm).tolist()[
        0
    ]


CASES = {
    "in proportion": ([3.0, 2.0, 1.0], 12, [1, 1, 1], [9, 9, 9], [6, 4, 2]),
    "the largest remainder gets the rest": ([2.6, 2.4, 4.0], 9, [1, 1, 1], [9, 9, 9], [3, 2, 4]),
    "equal remainders go to the earlier": ([1.0, 1.0, 1.0], 5, [1, 1, 1], [9, 9, 9], [2, 2, 1]),
    "what one cannot hold goes to the others": ([8.0, 1.0, 1.0], 12, [1, 1, 1], [4, 9, 9], [4, 4, 4]),
    "nobody goes without": ([1.0, 0.0, 0.0], 9, [1, 1, 1], [9, 9, 9], [7, 1, 1]),
    "a bin without weight takes what is left": ([1.0, 0.0, 0.0], 9, [1, 1, 1], [3, 9, 9], [3, 3, 3]),
    "no weights at all": ([0.0, 0.0, 0.0], 6, [1, 1, 1], [9, 9, 9], [2, 2, 2]),
    "what is protected is given": ([9.0, 1.0, 1.0], 11, [1, 5, 1], [20, 20, 20], [5, 5, 1]),
    "less than what is protected": ([9.0, 1.0, 1.0], 6, [2, 8, 2], [9, 9, 9], [1, 4, 1]),
    "more than there is": ([1.0, 2.0, 3.0], 99, [1, 1, 1], [2, 3, 4], [2, 3, 4]),
    "an empty head": ([1.0, 1.0, 1.0], 6, [1, 0, 1], [9, 0, 9], [3, 0, 3]),
    "wild weights": ([1e300, 1e-300, 1.0], 9, [1, 1, 1], [9, 9, 9], [7, 1, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_shares(case: str) -> None:
    weights, total, least, most, expected = CASES[case]
    assert shares(weights, total, least, most) == expected


def test_heads_with_equal_remainders_are_served_by_their_scores_and_layers_in_order() -> None:
    view = make_sample(0, (9,), kv_heads=2).view()
    values = torch.zeros(view.shape)
    values[0, 1] = 1.0  # the second head has more score
    scores = Scores(values, torch.zeros_like(view.valid))
    protected = torch.zeros_like(view.valid)
    protected[0, 0, :4] = True
    weights = torch.ones(2, 1, 1, dtype=torch.float64)
    tilted = [Scores(values, protected), scores]  # 4 of 12 slots are bound; 8 are left for three heads
    assert allot(weights, torch.tensor([3]), [view, view], tilted).tolist() == [[[4, 3]], [[2, 3]]]


def test_rows_do_not_mix() -> None:
    sample = make_sample(0, (12, 5), kv_heads=3)
    weights = torch.tensor([[[3.0], [1.0]], [[1.0], [2.0]]])  # (layers, batch, 1)

    def given(rows: list[int], slots: list[int]) -> torch.Tensor:
        view = sample.rows(rows).view()
        scores = Scores(view.keys.sum(dim=-1), torch.zeros_like(view.valid))
        return allot(weights[:, rows], torch.tensor(slots), [view] * 2, [scores] * 2)

    both = given([0, 1], [4, 2])
    assert torch.equal(both[:, :1], given([0], [4]))
    assert torch.equal(both[:, 1:], given([1], [2]))


def test_too_little_room_names_the_smallest_ratio() -> None:
    needed = torch.tensor([[[7, 7]], [[1, 1]]])  # 16 slots of two heads in two layers
    check_room(needed, torch.tensor([7]), torch.tensor([4]), "this")
    rows = torch.cat([needed, needed], dim=1)
    message = (
        r"this, which takes 4 of 7 slots per head and layer, and it has 3; give a ratio of at least 0\.571429, as "
    )
    with pytest.raises(kvcomp.BudgetError, match=message) as caught:
        check_room(rows, torch.tensor([20, 7]), torch.tensor([3, 3]), "this")
    assert caught.value.smallest == 0.571429
