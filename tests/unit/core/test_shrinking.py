"""Strategies whose stores make slots smaller: slots, bytes, and what the store is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kvcomp_strategies.allocators.uniform import UniformAllocator
from kvcomp_strategies.observations.query_peaks import QueryPeaks
from kvcomp_strategies.observations.received_attention import ReceivedSums
from kvcomp_strategies.stores.quantized import QuantizedStore

import kvcomp
from kvcomp import Budget, BudgetError, SlotForm
from kvcomp.core.composition import working
from kvcomp.core.shrinking import concave
from kvcomp.testing import make_sample, view_for

FORM = SlotForm(layers=3, kv_heads=2, key_dim=8, value_dim=8, itemsize=4)
FULL = FORM.heads * FORM.slot_bytes  # bytes of one slot over all heads and layers
H2O = {"scorer": "received-attention", "selector": "top-k"}


class Uneven(UniformAllocator, use="uneven"):
    """Says that heads may get different numbers."""

    even = False


def one_head(form: SlotForm) -> SlotForm:
    """The form of one head of one layer."""
    return replace(form, layers=1, kv_heads=1)


def evicting(budget: object) -> kvcomp.Strategy:
    return kvcomp.strategy("kivi", budget, **H2O, **{"store.evict": True})


def test_a_form_counts_heads_and_bytes() -> None:
    assert (FORM.slot_bytes, FORM.heads, FULL) == (64, 6, 384)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [("full", ["dense"]), ("kivi", ["quantized"]), ("mikv", ["received-attention", "mixed"]), ("h2o", None)],
)
def test_only_parts_that_do_something_work(recipe: str, expected: list[str] | None) -> None:
    strategy = kvcomp.strategy(recipe)
    names = [part.use for part in working(strategy.parts)]
    assert names == ([part.use for part in strategy.parts] if expected is None else expected)


def test_what_nobody_reads_is_not_observed() -> None:
    assert kvcomp.strategy("kivi", scorer="received-attention").observations == ()
    assert set(kvcomp.strategy("mikv").observations) == {QueryPeaks(), ReceivedSums()}


@pytest.mark.parametrize(("recipe", "ignores"), [("full", True), ("kivi", False), ("minicache", False), ("h2o", False)])
def test_a_budget_is_ignored_where_nothing_shrinks_and_nothing_is_evicted(recipe: str, ignores: bool) -> None:
    assert kvcomp.strategy(recipe).ignores_budget == ignores


def test_every_token_stays_and_the_ratio_is_of_bytes() -> None:
    strategy, tokens = kvcomp.strategy("kivi", 0.5), torch.tensor([64, 128])
    assert strategy.slots(tokens, FORM) is tokens
    assert strategy.limit(tokens, FORM).tolist() == [32 * FULL, 64 * FULL]


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    strategy, tokens = kvcomp.strategy("kivi", 0.1), torch.tensor([64, 100])
    with pytest.raises(
        BudgetError, match=r"'kivi' keeps every token, and store 'quantized' cannot hold \d+ t"
    ) as caught:
        strategy.limit(tokens, FORM)
    smallest = caught.value.smallest
    assert smallest is not None
    assert f"`budget={smallest:g}` or `--budget {smallest:g}`" in str(caught.value)
    assert (replace(strategy, budget=Budget.parse(smallest)).limit(tokens, FORM) > 0).all()
    with pytest.raises(BudgetError):
        replace(strategy, budget=Budget.parse(f"{smallest - 1e-6:.6f}")).limit(tokens, FORM)


def test_or_smallest_gives_each_row_what_it_needs_alone() -> None:
    tokens = torch.tensor([10, 400])
    strict, lenient = kvcomp.strategy("kivi", 0.25), kvcomp.strategy("kivi", "0.25 or smallest")
    short, long = lenient.limit(tokens, FORM).tolist()
    assert short == int(lenient.store.smallest(tokens[:1], FORM)) > 0.25 * 10 * FULL
    assert long == int(strict.limit(tokens[1:], FORM)) == 100 * FULL


def test_or_smallest_keeps_a_slot_that_the_bytes_do_not_pay_for() -> None:
    tokens = torch.tensor([10])
    assert kvcomp.strategy("h2o", "1B or smallest").slots(tokens, FORM).tolist() == [1]
    assert evicting("1B or smallest").slots(tokens, FORM).tolist() == [1]


def test_a_ratio_is_of_tokens_beside_a_selector_and_bytes_count_what_the_store_makes_of_them() -> None:
    strategy = kvcomp.strategy("h2o", 0.5, store={"use": "quantized", "bits": 2})
    assert strategy.slots(torch.tensor([100]), FORM).tolist() == [50]
    in_bytes = replace(strategy, budget=Budget.parse({"bytes": 64 * FULL // 2}))
    (slots,) = in_bytes.slots(torch.tensor([1000]), FORM).tolist()
    sizes = strategy.store.smallest(torch.arange(1, 1001), FORM)
    assert sizes[slots - 1] <= 64 * FULL // 2
    assert (sizes[slots:] > 64 * FULL // 2).all()
    assert slots > 64


def test_a_store_that_evicts_is_given_as_many_slots_as_it_can_hold() -> None:
    tokens = torch.tensor([400, 40])
    slots = evicting(0.05).slots(tokens, FORM)
    assert (slots > tokens * 0.05).all()
    assert (slots < tokens).all()
    assert torch.equal(evicting(0.5).slots(tokens, FORM), tokens)
    assert evicting(0.001).slots(tokens, FORM).tolist() == [1, 1]


@pytest.mark.parametrize("bits", [None, 2])
def test_bytes_hold_however_uneven_allocators_divide_the_slots(bits: int | None) -> None:
    strategy = replace(evicting(0.1), allocator=Uneven(), store=QuantizedStore(bits=bits, evict=True))
    tokens = torch.tensor([300])
    (slots,) = strategy.slots(tokens, FORM).tolist()
    limit = 300 * FULL // 10
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        parts = torch.rand(6, generator=generator).pow(4)
        heads = (parts / parts.sum() * slots * 6).long().clamp(1, 300)
        assert strategy.store.smallest(heads, one_head(FORM)).sum() <= limit
    assert slots >= 1


def test_a_concave_majorant_is_above_every_mixture() -> None:
    sizes = torch.tensor([3, 20, 21, 22, 40, 41, 41, 90])
    bound = concave(sizes)
    assert (bound >= sizes).all()
    for one in range(8):
        for other in range(one, 8, 2):
            assert 2 * bound[(one + other) // 2] >= sizes[one] + sizes[other]


def test_bytes_below_one_slot_are_refused() -> None:
    with pytest.raises(BudgetError, match="below one slot per KV head and layer, which takes") as caught:
        evicting({"bytes": 10}).slots(torch.tensor([40]), FORM)
    assert caught.value.smallest is not None
    assert evicting(caught.value.smallest).slots(torch.tensor([40]), FORM).min() >= 1


def test_a_layer_is_left_alone_only_where_the_store_would_change_nothing() -> None:
    tokens = torch.tensor([40])
    assert kvcomp.strategy("kivi", 1.0).keeps_all(tokens, FORM)
    assert not kvcomp.strategy("kivi", 0.99).keeps_all(tokens, FORM)
    assert not kvcomp.strategy("kivi", 1.0, **{"store.bits": 8}).keeps_all(tokens, FORM)
    assert kvcomp.strategy("h2o", 1.0).keeps_all(tokens, FORM)
    assert not kvcomp.strategy("h2o", 0.5).keeps_all(tokens, FORM)


def test_a_dense_store_is_told_nothing() -> None:
    strategy = kvcomp.strategy("h2o", 0.5)
    view = view_for(strategy, make_sample(0, (24,)))
    plan = strategy.plan(view)
    assert strategy.guide(view, plan, strategy.scores(view)) is None


def test_a_guide_shares_the_bytes_by_slots_and_marks_what_is_protected() -> None:
    strategy = kvcomp.strategy("mikv", 0.5)
    view = view_for(strategy, make_sample(0, (40, 20)))
    plan, scores = strategy.plan(view), strategy.scores(view)
    guide = strategy.guide(view, plan, scores)
    assert guide is not None
    full = 2 * 8 * 4  # bytes of one slot of one head
    assert guide.limit.tolist() == [[20 * full] * 2, [10 * full] * 2]
    assert plan.pivots is not None
    filled = plan.pivots.filled()
    assert torch.equal((guide.importance.isinf() & filled).sum(-1), scores.protected.sum(-1))
    assert guide.observations[QueryPeaks()].shape == (2, 4, 8)


def test_a_plan_that_keeps_everything_leaves_the_padding_out() -> None:
    strategy = kvcomp.strategy("kivi", 0.5)
    view = view_for(strategy, make_sample(0, (24, 10)))
    kept = strategy.apply(view, strategy.plan(view))
    assert kept.mask is not None
    assert kept.mask.sum(dim=-1).tolist() == [[24, 24], [10, 10]]
    assert torch.equal(kept.keys[1, :, :10], view.keys[1, :, -10:])
    assert kept.indices[1, 0].tolist() == [*range(10), *[-1] * 14]
