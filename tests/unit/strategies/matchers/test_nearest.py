"""The nearest pivot, on keys drawn by hand: angles in the plane."""

from __future__ import annotations

from dataclasses import replace
from math import cos, radians, sin

import kvcomp_strategies.matching as matching
import pytest
import torch
from kvcomp_strategies.matchers.nearest import Nearest
from torch import Tensor

from kvcomp import Assignment, LayerView, Pivots, Rule, Scores
from kvcomp.testing import make_sample

PIVOTS = Pivots(torch.tensor([[[0, 2, 4]]]))


def plane(*degrees: float, modality: list[int] | None = None, lengths: list[float] | None = None) -> LayerView:
    """One head whose keys point in these directions."""
    view = make_sample(0, (len(degrees),), kv_heads=1).view()
    lengths = lengths or [1.0] * len(degrees)
    keys = [
        [size * cos(radians(angle)), size * sin(radians(angle))] for angle, size in zip(degrees, lengths, strict=True)
    ]
    kinds = torch.tensor(modality or [0] * len(degrees), dtype=torch.int8)
    return replace(view, keys=torch.tensor(keys)[None, None], modality=kinds[None, None])


def match(
    view: LayerView, pivots: Pivots = PIVOTS, rule: Rule = Rule.CROSS, protected: Tensor | None = None, **fields: float
) -> Assignment:
    nobody = torch.zeros_like(view.valid)
    scores = Scores(torch.zeros(view.shape), nobody if protected is None else protected)
    return Nearest(**fields).match(view, pivots, scores, torch.tensor([int(rule)]))


def targets(edges: Assignment) -> list[int]:
    return edges.targets[0, 0, :, 0].tolist()


def test_each_token_goes_to_the_largest_cosine_whatever_the_lengths() -> None:
    view = plane(0, 85, 90, 20, 180, 170, lengths=[1, 5, 100, 1, 3, 0.01])
    edges = match(view)
    assert edges.sources.tolist() == [[[1, 3, 5]]]
    assert targets(edges) == [1, 0, 2]
    assert edges.weights.flatten().tolist() == [1, 1, 1]


def test_of_two_equally_near_the_earlier() -> None:
    assert targets(match(plane(-45, 0, 45, 0, 45, 45))) == [0, 0, 1]


@pytest.mark.parametrize(("step", "target"), [(5e-7, 0), (5e-5, 1)], ids=["within 1e-6", "clearly nearer"])
def test_cosines_within_a_millionth_are_equal(step: float, target: int) -> None:
    """At 60 degrees a turn by x changes the cosine by 0.87 x."""
    angle = 60 - step * 57.3 / 0.87
    assert targets(match(plane(60, 0, angle, 0, 180))) == [target, target]


def test_protected_pivots_receive_nothing() -> None:
    protected = torch.tensor([[[False, False, True, False, False, False]]])
    assert targets(match(plane(0, 89, 90, 100, 180, 170), protected=protected)) == [0, 2, 2]


def test_no_pivot_is_open_so_nothing_is_merged() -> None:
    view = plane(0, 10, 20, 30, 40)
    edges = match(view, protected=torch.ones_like(view.valid))
    assert targets(edges) == [-1, -1]
    assert edges.weights.sum() == 0


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(Rule.CROSS, [1, 1, 1]), (Rule.INTRA, [0, 1, 2]), (Rule.HETERO, [1, 0, 1]), (Rule.NONE, [-1, -1, -1])],
    ids=lambda value: value.name if isinstance(value, Rule) else "",
)
def test_the_rule_limits_the_modalities(rule: Rule, expected: list[int]) -> None:
    view = plane(0, 44.9 + 1, 90, 80, 185, 120, modality=[0, 0, 1, 1, 3, 3])
    assert targets(match(view, rule=rule)) == expected


def test_each_row_has_its_own_rule() -> None:
    one = plane(0, 80, 90, 80, 180, modality=[0, 0, 1, 0, 0])
    names = ("keys", "values", "modality", "valid", "indices", "counts")
    view = replace(one, **{name: torch.cat([getattr(one, name)] * 4) for name in names})
    scores = Scores(torch.zeros(view.shape), torch.zeros_like(view.valid))
    pivots = Pivots(PIVOTS.indices.expand(4, -1, -1))
    edges = Nearest().match(view, pivots, scores, torch.tensor([0, 1, 2, 3]))
    assert edges.targets[:, 0, 0, 0].tolist() == [1, 0, 1, -1]


def test_zero_keys_are_equally_far_from_everything() -> None:
    view = plane(0, 10, 20, 30, 40, lengths=[1, 0, 1, 0, 1])
    assert targets(match(view)) == [0, 0]


def test_below_the_floor_nothing_is_merged() -> None:
    assert targets(match(plane(0, 61, 91, 29, 180), floor=0.87)) == [-1, 0]


def test_chunks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    view = make_sample(3, (30, 17)).view()
    pivots = Pivots(torch.tensor([[[13, 15, 22, 29]] * 2] * 2))
    scores, rule = Scores(torch.zeros(view.shape), torch.zeros_like(view.valid)), torch.tensor([0, 1])
    whole = Nearest().match(view, pivots, scores, rule)
    monkeypatch.setattr(matching, "CHUNK_ELEMENTS", 1)
    pieces = Nearest().match(view, pivots, scores, rule)
    assert torch.equal(whole.targets, pieces.targets)


def test_where_everything_stays_nothing_is_matched() -> None:
    view = plane(0, 10)
    edges = match(view, Pivots(torch.tensor([[[0, 1]]])))
    assert edges.sources.shape == (1, 1, 0)
    assert edges.targets.shape == (1, 1, 0, 1)
