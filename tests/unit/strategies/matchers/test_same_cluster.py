"""Tokens follow the clusters that the selector made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kvcomp_strategies.matchers.same_cluster import SameCluster

import kvcomp
from kvcomp import Assignment, Pivots, Rule, Scores
from kvcomp.testing import make_sample

GROUPS = torch.tensor([[[0, 0, 1, 1, 1, -1]]])
PIVOTS = Pivots(torch.tensor([[[1, 3]]]), groups=GROUPS)


def match(rule: Rule = Rule.CROSS, protected: tuple[int, ...] = ()) -> Assignment:
    view = make_sample(0, (6,), kv_heads=1).view()
    view = replace(view, modality=torch.tensor([[[0, 0, 1, 1, 0, 0]]], dtype=torch.int8))
    locked = torch.zeros_like(view.valid)
    locked[0, 0, list(protected)] = True
    return SameCluster().match(view, PIVOTS, Scores(torch.zeros(view.shape), locked), torch.tensor([int(rule)]))


def test_each_token_goes_to_the_pivot_of_its_cluster_and_the_others_nowhere() -> None:
    edges = match()
    assert edges.sources.tolist() == [[[0, 2, 4, 5]]]
    assert edges.targets[0, 0, :, 0].tolist() == [0, 1, 1, -1]
    assert edges.weights[0, 0, :, 0].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(Rule.INTRA, [0, 1, -1, -1]), (Rule.HETERO, [-1, -1, 1, -1]), (Rule.NONE, [-1] * 4)],
    ids=lambda value: value.name if isinstance(value, Rule) else "",
)
def test_the_rule_limits_the_modalities(rule: Rule, expected: list[int]) -> None:
    assert match(rule).targets[0, 0, :, 0].tolist() == expected


def test_protected_pivots_receive_nothing() -> None:
    assert match(protected=(3,)).targets[0, 0, :, 0].tolist() == [0, -1, -1, -1]


def test_a_selector_without_clusters_is_refused_before_anything_runs() -> None:
    document = {"scorer": "position", "selector": "top-k", "matcher": "same-cluster", "merger": "mean"}
    with pytest.raises(kvcomp.ConfigError, match="'same-cluster' needs groups"):
        kvcomp.strategy(document)
