"""The strategy: what it refuses, what it declares, and how its stages fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from kvcomp_strategies.observations.cross_modal_flow import CrossModalFlow
from kvcomp_strategies.observations.window_attention import WindowRows
from kvcomp_strategies.scorers.position import Position
from torch import Tensor

import kvcomp
from kvcomp import BudgetAllocator, BudgetError, ConfigError, LayerView, Scores, UnsupportedUseError
from kvcomp.core.budget import Budget
from kvcomp.testing import make_sample, run, view_for

CONFLICTS = {
    "matcher without merging": (
        {"scorer": "position", "selector": "top-k", "matcher": "nearest"},
        ["matcher: 'nearest' needs merging"],
    ),
    "merger without edges": (
        {"scorer": "position", "selector": "top-k", "merger": "mean"},
        ["merger: 'mean' needs edges"],
    ),
    "selector without scores": ({"selector": "top-k"}, ["selector: 'top-k' needs scores"]),
    "all at once": (
        {"selector": "top-k", "matcher": "sensitivity-gated"},
        ["selector: 'top-k' needs scores", "matcher: 'sensitivity-gated' needs merging, which no part"],
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_a_pipeline_that_cannot_work_is_refused_with_all_conflicts(case: str) -> None:
    document, expected = CONFLICTS[case]
    with pytest.raises(ConfigError) as caught:
        kvcomp.strategy(document)
    for conflict in expected:
        assert any(fault.startswith(conflict) for fault in caught.value.faults), caught.value.faults


def test_a_merger_after_a_selector_that_is_missing_is_no_conflict() -> None:
    assert kvcomp.strategy("full").selector is None


def test_it_is_frozen_and_equal_by_value() -> None:
    strategy = kvcomp.strategy("flowmm")
    with pytest.raises(FrozenInstanceError):
        strategy.budget = Budget.parse(0.5)  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        strategy.policy.threshold = 0.5
    assert strategy == kvcomp.strategy("flowmm")
    assert hash(strategy) == hash(kvcomp.strategy("flowmm"))
    assert strategy != kvcomp.strategy("flowmm", 0.3)


def test_observations_are_united_and_each_once() -> None:
    assert kvcomp.strategy("flowmm").observations == (CrossModalFlow(), WindowRows(count=32))
    assert kvcomp.strategy("flowmm-no-flow").observations == (WindowRows(count=32),)
    assert kvcomp.strategy("streaming-llm").observations == ()
    assert kvcomp.strategy("full").observations == ()


def test_a_view_needs_what_was_declared_and_no_more() -> None:
    strategy = kvcomp.strategy("flowmm")
    assert set(view_for(strategy, make_sample(0)).observations) == set(strategy.observations)


def test_full_keeps_everything_and_plans_nothing() -> None:
    sample = make_sample(0, (5, 3))
    seen = run(kvcomp.strategy("full", 0.1), sample)
    assert seen.plan.pivots is None
    assert torch.equal(seen.compressed.keys, sample.keys)
    assert seen.compressed.mask is not None
    assert seen.share.tolist() == [5, 3]


def test_a_plan_by_hand() -> None:
    """Position keeps tokens 7 and 8 of 9 at 0.3 without sinks; the logical indices do not count padding."""
    sample = make_sample(0, (9, 12))
    seen = run(kvcomp.strategy("streaming-llm", 0.3, **{"scorer.sinks": 0}), sample)
    assert seen.slots.tolist() == [[2, 2], [3, 3]]
    assert seen.compressed.indices.tolist() == [[[7, 8, -1]] * 2, [[9, 10, 11]] * 2]
    assert seen.pivots.indices.tolist() == [[[10, 11, 0]] * 2, [[9, 10, 11]] * 2]
    assert seen.compressed.counts.tolist() == [[[1, 1, 0]] * 2, [[1, 1, 1]] * 2]


class Everything(Position, use="everything"):
    """Protects every token."""

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor:
        return torch.ones_like(layer.valid)


def test_where_more_is_protected_than_allotted_the_latest_win() -> None:
    strategy = replace(kvcomp.strategy("streaming-llm", "3t"), scorer=Everything())
    assert run(strategy, make_sample(0, (8,))).compressed.indices[0, 0].tolist() == [5, 6, 7]


def test_padding_is_never_protected() -> None:
    strategy = replace(kvcomp.strategy("streaming-llm", 0.5), scorer=Everything())
    sample = make_sample(0, (4, 9))
    assert not bool((run(strategy, sample).scores.protected & ~sample.valid).any())


class Undefined(Position, use="undefined"):
    """Scores NaN and infinity."""

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        scores = torch.arange(layer.shape[2], dtype=torch.float32).expand(layer.shape).clone()
        scores[..., 0], scores[..., 1] = float("nan"), float("inf")
        return scores


def test_scores_are_made_finite() -> None:
    strategy = replace(kvcomp.strategy("streaming-llm", "2t"), scorer=Undefined())
    seen = run(strategy, make_sample(0, (6,)))
    assert seen.scores.values.isfinite().all()
    assert seen.scores.values.dtype == torch.float32
    assert seen.compressed.indices[0, 0].tolist() == [1, 5]


def test_slots_can_differ_by_head() -> None:
    strategy, sample = kvcomp.strategy("streaming-llm", **{"scorer.sinks": 0}), make_sample(0, (6,))
    view = view_for(strategy, sample)
    plan = strategy.plan(view, torch.tensor([[1, 4]]))
    kept = strategy.apply(view, plan)
    assert kept.indices.tolist() == [[[5, -1, -1, -1], [2, 3, 4, 5]]]
    assert kept.mask is not None
    assert kept.mask.tolist() == [[[True, False, False, False], [True] * 4]]


def test_a_head_is_never_allotted_more_than_it_holds() -> None:
    strategy, sample = kvcomp.strategy("h2o", "50t"), make_sample(3, (4,), held=6)
    seen = run(strategy, sample)
    assert torch.equal(seen.slots, sample.valid.sum(dim=-1))


def test_bytes_are_those_of_all_layers_and_heads() -> None:
    sample = make_sample(0, (40,), kv_heads=2, head_dim=8)  # 3 layers, 2 heads, 8 + 8 floats: 384 bytes a slot
    assert run(kvcomp.strategy("h2o", "3840B"), sample).slots.tolist() == [[10, 10]]
    assert run(kvcomp.strategy("h2o", "4223B"), sample).slots.tolist() == [[10, 10]]


def test_nine_tokens_at_a_tenth_keep_one_slot() -> None:
    for recipe in ("flowmm", "h2o", "snapkv", "random", "streaming-llm"):
        seen = run(kvcomp.strategy(recipe, 0.1), make_sample(1, (9,)))
        assert seen.pivots.indices.shape == (1, 2, 1), recipe


class Spendthrift(BudgetAllocator, use="spendthrift"):
    """Gives every head a multiple of its share."""

    factor: int

    def allocate(self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        batch, kv_heads, _ = layers[0].shape
        return self.factor * slots[None, :, None].expand(len(layers), batch, kv_heads)


@pytest.mark.parametrize("factor", [0, 5])
def test_an_allocator_that_gives_nothing_or_too_much_is_refused(factor: int) -> None:
    strategy = replace(kvcomp.strategy("random", 0.2), allocator=Spendthrift(factor=factor))
    with pytest.raises(BudgetError, match="'spendthrift' gave"):
        run(strategy, make_sample(0, (30,)))


def test_a_view_without_the_declared_statistics_is_refused() -> None:
    strategy = kvcomp.strategy("flowmm", 0.3)
    view = replace(view_for(strategy, make_sample(0, (30,))), observations={})
    with pytest.raises(UnsupportedUseError, match="cross-modal-flow, window-attention"):
        strategy.plan(view)
