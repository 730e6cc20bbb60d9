"""Similar enough, on keys drawn by hand: angles in the plane."""

from __future__ import annotations

from dataclasses import replace
from math import cos, radians, sin

import pytest
import torch
from kvcomp_strategies.matchers.similarity_threshold import SimilarityThreshold

from kvcomp import Assignment, LayerView, Modality, Pivots, Rule, Scores
from kvcomp.testing import make_sample

PIVOTS = Pivots(torch.tensor([[[0, 3]]]))


def heads(*degrees: list[float]) -> LayerView:
    """One row; the keys of each head point in these directions."""
    view = make_sample(0, (len(degrees[0]),), kv_heads=len(degrees), modalities=(Modality.TEXT,)).view()
    keys = [[[cos(radians(angle)), sin(radians(angle))] for angle in head] for head in degrees]
    return replace(view, keys=torch.tensor(keys)[None])


def match(view: LayerView, matcher: SimilarityThreshold, rule: Rule = Rule.CROSS) -> Assignment:
    nobody = torch.zeros_like(view.valid)
    pivots = Pivots(PIVOTS.indices.expand(*view.shape[:2], -1))
    rules = torch.full((view.shape[0],), int(rule))
    return matcher.match(view, pivots, Scores(torch.zeros(view.shape), nobody), rules)


def test_tokens_above_the_mean_similarity_are_merged() -> None:
    """Cosines 0.98, 0.77 and 0.5: their mean is 0.75."""
    edges = match(heads([0, 10, 40, 180, 240]), SimilarityThreshold())
    assert edges.sources.tolist() == [[[1, 2, 4]]]
    assert edges.targets[0, 0, :, 0].tolist() == [0, 0, -1]
    assert edges.weights[0, 0, :, 0].tolist() == [1, 1, 0]


def test_equally_similar_tokens_all_pass() -> None:
    edges = match(heads([0, 30, 30, 180, 30]), SimilarityThreshold())
    assert edges.targets[0, 0, :, 0].tolist() == [0, 0, 0]


def test_the_mean_is_over_the_heads_of_a_row() -> None:
    """The second head is far from its pivots, so that all of the first pass, which would not by its own mean."""
    near, far = [0.0, 10, 20, 180, 20], [0.0, 90, 90, 180, 90]
    assert match(heads(near), SimilarityThreshold()).targets[0, 0, :, 0].tolist() == [0, -1, -1]
    together = match(heads(near, far), SimilarityThreshold())
    assert together.targets[0, :, :, 0].tolist() == [[0, 0, 0], [-1, -1, -1]]


def test_by_rank_the_heads_decide_together() -> None:
    """Ranks: (0.98 + 0) / 2, (0.5 + 0.98) / 2, (0.5 + 0.5) / 2 against a mean of 0.58."""
    view = heads([0, 10, 60, 180, 60], [0, 90, 10, 180, 60])
    assert match(view, SimilarityThreshold()).targets[0, :, :, 0].tolist() == [[0, -1, -1], [-1, 0, -1]]
    by_rank = match(view, SimilarityThreshold(filter="rank"))
    assert by_rank.targets[0, :, :, 0].tolist() == [[-1, 0, -1], [-1, 0, -1]]


def test_rows_have_a_threshold_of_their_own() -> None:
    one, other = heads([0, 10, 40, 180, 240]), heads([0, 90, 90, 180, 90])
    names = ("keys", "values", "modality", "valid", "indices", "counts")
    both = replace(one, **{name: torch.cat([getattr(one, name), getattr(other, name)]) for name in names})
    assert match(both, SimilarityThreshold()).targets[:, 0, :, 0].tolist() == [[0, 0, -1], [0, 0, 0]]


def test_only_tokens_that_find_a_pivot_count_for_the_mean() -> None:
    """Token 4 is alone in its modality: the mean is of 0.98 and 0.77, and 0.77 is below it."""
    view = heads([0, 10, 40, 180, 5])
    view = replace(view, modality=torch.tensor([[[0, 0, 0, 0, 1]]], dtype=torch.int8))
    assert match(view, SimilarityThreshold(), Rule.INTRA).targets[0, 0, :, 0].tolist() == [0, -1, -1]


def test_where_no_pivot_may_receive_nothing_is_merged() -> None:
    assert not bool(match(heads([0, 10, 40, 180, 240]), SimilarityThreshold(), Rule.NONE).merged.any())


def test_the_threshold_is_a_running_mean() -> None:
    """Cosines 0.985, 0.766 and 0.559, their mean 0.770; with 0.3 of an earlier 0, 0.7 or 1 it is 0.54, 0.75 or 0.84."""
    view = heads([0, 10, 40, 180, 236])
    for earlier, passing in ((float("nan"), [0, -1, -1]), (0.0, [0, 0, 1]), (0.7, [0, 0, -1]), (1.0, [0, -1, -1])):
        edges = match(replace(view, memory=torch.tensor([earlier])), SimilarityThreshold())
        assert edges.targets[0, 0, :, 0].tolist() == passing
        assert edges.memory is not None
        mean = (cos(radians(10)) + cos(radians(40)) + cos(radians(56))) / 3
        expected = mean if earlier != earlier else 0.7 * mean + 0.3 * earlier
        torch.testing.assert_close(edges.memory, torch.tensor([expected]))


def test_a_compression_that_finds_no_pivot_leaves_the_threshold() -> None:
    view = replace(heads([0, 10, 40, 180, 240]), memory=torch.tensor([0.4]))
    kept = match(view, SimilarityThreshold(), Rule.NONE).memory
    assert kept is not None
    assert kept.tolist() == pytest.approx([0.4])
    nothing = match(replace(view, memory=None), SimilarityThreshold(), Rule.NONE).memory
    assert nothing is not None
    assert bool(nothing.isnan().all())


@pytest.mark.parametrize("beta", [0.0, 1.1])
def test_beta_is_a_weight(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        SimilarityThreshold(beta=beta)
