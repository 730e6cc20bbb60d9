"""Clusters of neighbours, on keys drawn by hand: angles in the plane."""

from __future__ import annotations

from dataclasses import replace
from math import cos, radians, sin

import pytest
import torch
from kvcomp_strategies.selectors.adjacent_clusters import AdjacentClusters

from kvcomp import LayerView, Pivots, Scores
from kvcomp.testing import make_sample


def plane(*degrees: float, modality: list[int] | None = None) -> LayerView:
    """One head whose keys point in these directions."""
    view = make_sample(0, (len(degrees),), kv_heads=1).view()
    keys = [[cos(radians(angle)), sin(radians(angle))] for angle in degrees]
    kinds = torch.tensor(modality or [0] * len(degrees), dtype=torch.int8)
    return replace(view, keys=torch.tensor(keys)[None, None], modality=kinds[None, None])


def select(
    view: LayerView, values: list[float], slots: int, protected: tuple[int, ...] = (), **fields: object
) -> tuple[list[int], list[int]]:
    locked = torch.zeros_like(view.valid)
    locked[0, 0, list(protected)] = True
    scores = Scores(torch.tensor(values)[None, None], locked)
    settings = {"sensitive": 0.0} | fields
    pivots = AdjacentClusters(**settings).select(view, scores, torch.tensor([[slots]]))
    assert pivots.groups is not None
    return pivots.indices[0, 0].tolist(), pivots.groups[0, 0].tolist()


STEPS = plane(0, 10, 50, 55, 140, 141)  # neighbours 10, 40, 5, 85, 1 degrees apart


def test_the_chain_is_cut_where_neighbours_are_least_similar() -> None:
    scores = [1.0, 2.0, 5.0, 4.0, 0.0, 1.0]
    assert select(STEPS, scores, 1) == ([2], [0] * 6)
    assert select(STEPS, scores, 2) == ([2, 5], [0, 0, 0, 0, 1, 1])
    assert select(STEPS, scores, 3) == ([1, 2, 5], [0, 0, 1, 1, 2, 2])
    assert select(STEPS, scores, 4) == ([0, 1, 2, 5], [0, 1, 2, 2, 3, 3])
    assert select(STEPS, scores, 6) == (list(range(6)), list(range(6)))


def test_equal_scores_make_the_earlier_token_the_pivot() -> None:
    assert select(STEPS, [1.0] * 6, 2)[0] == [0, 4]


def test_equal_similarities_are_cut_at_the_earlier_place() -> None:
    assert select(plane(*[30.0] * 6), [0.0] * 6, 3)[1] == [0, 1, 2, 2, 2, 2]


def test_protected_tokens_are_alone_and_part_their_neighbours() -> None:
    assert select(plane(*[30.0] * 6), [0.0] * 6, 3, protected=(2,))[1] == [0, 0, 1, 2, 2, 2]


def test_the_tokens_with_the_highest_scores_are_alone() -> None:
    """A half of 4 slots: the two best."""
    scores = [0.0, 0.0, 3.0, 0.0, 0.0, 2.0]
    assert select(plane(*[30.0] * 6), scores, 4, sensitive=0.5) == ([0, 2, 3, 5], [0, 0, 1, 2, 2, 3])


def test_where_the_sensitive_leave_too_few_slots_fewer_of_them_are_kept() -> None:
    """Of 3 slots, tokens 1 and 3 would take two and leave three runs: only token 1 stays alone."""
    scores = [0.0, 4.0, 0.0, 3.0, 0.0, 0.0]
    assert select(plane(*[30.0] * 6), scores, 3, sensitive=0.7) == ([0, 1, 3], [0, 1, 2, 2, 2, 2])


def test_with_more_runs_than_slots_the_best_stay_and_the_others_go() -> None:
    """Tokens 1 and 3 are protected; of the runs 0, 2 and 4-5 the last has the best pivot."""
    scores = [1.0, 0.0, 2.0, 0.0, 3.0, 0.0]
    assert select(plane(*[30.0] * 6), scores, 3, protected=(1, 3)) == ([1, 3, 4], [-1, 0, -1, 1, 2, 2])
    assert select(plane(*[30.0] * 6), scores, 2, protected=(1, 3)) == ([1, 3], [-1, 0, -1, 1, -1, -1])


def test_a_threshold_makes_as_many_clusters_as_there_are() -> None:
    scores = [1.0, 2.0, 5.0, 4.0, 0.0, 1.0]
    assert select(STEPS, scores, 1, mode="threshold") == ([2, 5], [0, 0, 0, 0, 1, 1])
    assert select(STEPS, scores, 1, mode="threshold", threshold=0.9) == ([1, 2, 5], [0, 0, 1, 1, 2, 2])
    assert select(STEPS, scores, 6, mode="threshold", threshold=-1.0) == ([2], [0] * 6)


def test_borders_between_modalities_are_cut_first() -> None:
    view = plane(0, 10, 50, 55, 140, 141, modality=[0, 0, 0, 0, 0, 1])
    assert select(view, [0.0] * 6, 2)[1] == [0, 0, 0, 0, 1, 1]
    assert select(view, [0.0] * 6, 2, borders="modality")[1] == [0, 0, 0, 0, 0, 1]
    assert select(view, [0.0] * 6, 1, borders="modality")[1] == [0] * 6


def test_pads_are_in_no_cluster_and_heads_may_keep_fewer() -> None:
    view = make_sample(0, (3, 6), kv_heads=1).view()
    scores = Scores(torch.zeros(view.shape), torch.zeros_like(view.valid))
    pivots: Pivots = AdjacentClusters().select(view, scores, torch.tensor([[2], [4]]))
    assert pivots.filled().sum(dim=-1).tolist() == [[2], [4]]
    assert pivots.groups is not None
    assert pivots.groups[0, 0, :3].tolist() == [-1] * 3
    assert sorted(set(pivots.groups[1, 0].tolist())) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 5])
def test_everything_stays_where_everything_fits(count: int) -> None:
    view = plane(*range(count))
    assert select(view, [0.0] * count, count, protected=(count - 1,), sensitive=1.0)[0] == list(range(count))


def test_tiers_come_before_scores() -> None:
    """Token 2 is of a higher tier: with one sensitive token it stays alone, with none it is the pivot."""
    view = plane(*[30.0] * 5)
    tiers = torch.tensor([[[0, 0, 1, 0, 0]]], dtype=torch.int16)
    scores = Scores(torch.tensor([[[9.0, 0.0, 1.0, 0.0, 8.0]]]), torch.zeros_like(view.valid), tiers)
    alone = AdjacentClusters(sensitive=0.34).select(view, scores, torch.tensor([[3]]))
    assert alone.indices.tolist() == [[[0, 2, 4]]]
    assert AdjacentClusters(sensitive=0.0).select(view, scores, torch.tensor([[1]])).indices.tolist() == [[[2]]]
