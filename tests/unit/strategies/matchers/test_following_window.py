"""Tokens are shared among the pivots that follow, by lot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kvcomp_strategies.matchers.following_window import FollowingWindow
from kvcomp_strategies.observations.received_attention import ReceivedSums
from kvcomp_strategies.observations.window_attention import WindowRows

from kvcomp import Assignment, LayerView, Pivots, Rule, Scores
from kvcomp.testing import make_sample

PIVOTS = Pivots(torch.tensor([[[0, 2, 5, 6, 7]]]))
CERTAIN = [9.0, 9.0, 1.0, 9.0, 9.0, 1.0, 1.0, 1.0]  # what leaves received more than what stays


def prompt(received: list[float], modality: list[int] | None = None) -> LayerView:
    view = make_sample(0, (len(received),), kv_heads=1, group=1).view()
    kinds = torch.tensor(modality or [0] * len(received), dtype=torch.int8)
    seen = torch.tensor(received)[None, None]
    return replace(
        view,
        modality=kinds[None, None],
        observations={ReceivedSums(): seen, WindowRows(count=1): seen.flip(-1)[:, :, None]},
    )


def match(view: LayerView, rule: Rule = Rule.CROSS, protected: tuple[int, ...] = (), **fields: object) -> Assignment:
    locked = torch.zeros_like(view.valid)
    locked[0, 0, list(protected)] = True
    scores = Scores(torch.zeros(view.shape), locked)
    return FollowingWindow(**fields).match(view, PIVOTS, scores, torch.tensor([int(rule)]))


def test_a_token_goes_in_equal_parts_to_the_next_pivots() -> None:
    edges = match(prompt(CERTAIN), window=2)
    assert edges.sources.tolist() == [[[1, 3, 4]]]
    assert edges.targets.tolist() == [[[[1, 2], [2, 3], [2, 3]]]]
    assert edges.weights.tolist() == [[[[0.5, 0.5]] * 3]]


def test_fewer_followers_share_in_larger_parts() -> None:
    edges = match(prompt(CERTAIN), window=32)
    assert [[slot for slot in row if slot >= 0] for row in edges.targets[0, 0].tolist()] == [
        [1, 2, 3, 4],
        [2, 3, 4],
        [2, 3, 4],
    ]
    torch.testing.assert_close(edges.weights.sum(dim=-1), torch.ones(1, 1, 3))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(Rule.INTRA, [[2, 4], [3, -1], [-1, -1]]), (Rule.HETERO, [[1, 3], [2, 4], [2, 3]]), (Rule.NONE, [[-1, -1]] * 3)],
    ids=lambda value: value.name if isinstance(value, Rule) else "",
)
def test_the_rule_limits_the_modalities(rule: Rule, expected: list[list[int]]) -> None:
    """Pivots 0, 2, 5, 6, 7 are of modality 0, 1, 0, 1, 0 and the tokens 1, 3, 4 of 0, 1 and 3."""
    modality = [0, 0, 1, 1, 3, 0, 1, 0]
    edges = match(prompt(CERTAIN, modality), rule, window=2)
    assert edges.targets[0, 0].tolist() == expected


def test_protected_pivots_are_passed_over() -> None:
    assert match(prompt(CERTAIN), protected=(5, 7), window=2).targets[0, 0].tolist() == [[1, 3], [3, -1], [3, -1]]


def test_what_received_nothing_is_evicted() -> None:
    received = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert not bool(match(prompt(received)).merged.any())
    assert not bool(match(prompt([0.0] * 8)).merged.any())


def test_the_lot_takes_as_many_as_the_attention_says() -> None:
    """A quarter of the mean of the followers: over many seeds a quarter of the tokens."""
    received = [1.0, 0.25, 1.0, 0.25, 0.25, 1.0, 1.0, 1.0]
    drawn = [match(prompt(received), seed=seed).merged for seed in range(400)]
    assert 0.21 < float(torch.stack(drawn).float().mean()) < 0.29


def test_the_largest_of_all_pivots_can_be_what_counts() -> None:
    """The mean of the followers is 1, the largest pivot 100, so almost nothing is drawn."""
    received = [100.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert bool(match(prompt(received)).merged.all())
    drawn = [match(prompt(received), seed=seed, denominator="max").merged for seed in range(100)]
    assert float(torch.stack(drawn).float().mean()) < 0.05


def test_the_last_row_can_be_what_counts() -> None:
    """The rows of this view are its sums the other way round."""
    received = [0.0, 0.0, 0.0, 5.0, 5.0, 0.0, 5.0, 0.0]
    assert match(prompt(received), rows="last").merged[0, 0].tolist() == [True, True, True]
    assert match(prompt(received), rows="all").merged[0, 0].tolist() == [False, True, True]


def test_the_same_seed_gives_the_same_lot() -> None:
    received = [1.0, 0.5, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0]
    one, other = (match(prompt(received), seed=3).merged for _ in range(2))
    assert torch.equal(one, other)
    assert len({tuple(match(prompt(received), seed=seed).merged.flatten().tolist()) for seed in range(30)}) > 3
