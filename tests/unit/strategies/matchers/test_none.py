"""Pure eviction."""

import torch
from kvcomp_strategies.matchers.none import NoMatch

from kvcomp import Pivots, Scores
from kvcomp.testing import make_sample


def test_every_other_token_is_a_source_without_a_target() -> None:
    view = make_sample(0, (5,), kv_heads=1).view()
    scores = Scores(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5, dtype=torch.bool))
    edges = NoMatch().match(view, Pivots(torch.tensor([[[1, 4]]])), scores, torch.tensor([0]))
    assert edges.sources.tolist() == [[[0, 2, 3]]]
    assert edges.targets.tolist() == [[[[-1], [-1], [-1]]]]
    assert edges.weights.sum() == 0
    assert not edges.merged.any()


def test_pads_are_no_sources() -> None:
    view = make_sample(0, (3, 5), kv_heads=1).view()
    scores = Scores(torch.zeros(2, 1, 5), torch.zeros(2, 1, 5, dtype=torch.bool))
    pivots = Pivots(torch.tensor([[[4, 0]], [[0, 1]]]), torch.tensor([[[True, False]], [[True, True]]]))
    edges = NoMatch().match(view, pivots, scores, torch.tensor([0, 0]))
    assert edges.sources.tolist() == [[[2, 3, -1]], [[2, 3, 4]]]
