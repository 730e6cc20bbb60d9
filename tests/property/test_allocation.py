"""Every allocator against an independent naive reference, over several layers at once, row by row."""

from __future__ import annotations

from collections.abc import Callable

import oracles_evict
import pytest
import torch
from generators import BUDGETS
from hypothesis import given
from hypothesis import strategies as st
from layered import Model, models
from torch import Tensor

import kvcomp
from kvcomp import Scores, Strategy


def allotted(strategy: Strategy, model: Model) -> tuple[Tensor, list[Scores], Tensor]:
    """What the strategy's allocator gives, the scores that it saw, and the uniform share of each row."""
    views = model.views(strategy)
    tokens = views[0].valid.sum(dim=-1).amax(dim=-1)
    share = strategy.slots(tokens, views[0].form)
    scores = [strategy.scores(view, share) for view in views]
    return strategy.allocate(share, views, scores), scores, share


def check(strategy: Strategy, model: Model, weights: Callable[[int, list[Scores]], list[list[float]]]) -> None:
    """`weights(row, scores)` are `[layer][kv_head]`."""
    given_out, scores, share = allotted(strategy, model)
    for row in range(len(share)):
        bins = [
            oracles_evict.Bin(
                layer,
                head,
                weight,
                held=model.held(row)[layer][head],
                protected=int(scores[layer].protected[row, head].sum()),
                score=float(scores[layer].values[row, head][model.samples[layer].valid[row, head]].double().sum()),
            )
            for layer, of_heads in enumerate(weights(row, scores))
            for head, weight in enumerate(of_heads)
        ]
        expected = oracles_evict.shares(bins, int(share[row]) * len(bins))
        assert given_out[:, row].flatten().tolist() == expected
        assert sum(expected) == min(int(share[row]) * len(bins), sum(one.held for one in bins))


def per_layer(weights: list[float], model: Model) -> list[list[float]]:
    return [[weight] * model.samples[0].keys.shape[1] for weight in weights]


@given(model=models(), budget=BUDGETS)
def test_variance_is_the_layer_budget_of_d2o(model: Model, budget: kvcomp.Budget) -> None:
    strategy = kvcomp.strategy("h2o", budget, allocator="variance")
    check(strategy, model, lambda row, _: per_layer(oracles_evict.variance_weights(model.attention(row)), model))


@pytest.mark.parametrize("over", ["all", "other-modality"])
@given(model=models(), budget=BUDGETS)
def test_entropy_is_the_layer_budget_of_meda(over: str, model: Model, budget: kvcomp.Budget) -> None:
    strategy = kvcomp.strategy("h2o", budget, allocator={"use": "entropy", "over": over})

    def weights(row: int, _: list[Scores]) -> list[list[float]]:
        attention = model.attention(row)
        if over == "all":
            return per_layer(oracles_evict.entropy_weights(attention), model)
        group = len(attention[0]) // model.samples[0].keys.shape[1]
        entropies = []
        for sample, layer in zip(model.samples, attention, strict=True):
            values = [
                oracles_evict.row_entropy(one, sample.modality[row, 0][sample.valid[row, head // group]].tolist())
                for head, one in enumerate(layer)
            ]
            entropies.append(sum(values) / len(values))
        return per_layer(oracles_evict.softmax(entropies), model)

    check(strategy, model, weights)


BIN = st.tuples(st.sampled_from((0.0, 1.0, 1.0, 2.5)) | st.floats(0.0, 9.0), st.integers(0, 30), st.integers(0, 30))


@given(rows=st.lists(st.lists(BIN, min_size=4, max_size=4), min_size=1, max_size=3), slots=st.integers(1, 30))
def test_shares_are_those_of_the_largest_remainder(rows: list[list[tuple[float, int, int]]], slots: int) -> None:
    from kvcomp_strategies.apportioning import apportion

    weights = torch.tensor([[weight for weight, _, _ in row] for row in rows], dtype=torch.float64)
    most = torch.tensor([[held for _, held, _ in row] for row in rows])
    protected = torch.tensor([[min(kept, held) for _, held, kept in row] for row in rows])
    firm = most.clamp(max=1)
    total = torch.full((len(rows),), slots * 4)
    found = apportion(weights, total, protected.maximum(firm), most, firm=firm)
    for row, of_bins in enumerate(rows):
        bins = [
            oracles_evict.Bin(0, place, weight, held, min(kept, held))
            for place, (weight, held, kept) in enumerate(of_bins)
        ]
        assert found[row].tolist() == oracles_evict.shares(bins, slots * 4)


def seen_scores(model: Model, scores: list[Scores], row: int) -> list[list[list[float]]]:
    """What each head holds of the scores, `[layer][kv_head]`."""
    return [
        [one.values[row, head][sample.valid[row, head]].tolist() for head in range(one.values.shape[1])]
        for sample, one in zip(model.samples, scores, strict=True)
    ]


def seen_protected(model: Model, scores: list[Scores], row: int) -> list[list[list[int]]]:
    """Which places of what each head holds are protected, `[layer][kv_head]`."""
    return [
        [one.protected[row, head][sample.valid[row, head]].nonzero().flatten().tolist() for head in range(heads)]
        for sample, one in zip(model.samples, scores, strict=True)
        for heads in (one.values.shape[1],)
    ]


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
@given(model=models(), budget=BUDGETS)
def test_global_is_one_ranking_of_all_heads_of_all_layers(floor: float, model: Model, budget: kvcomp.Budget) -> None:
    strategy = kvcomp.strategy("h2o", budget, allocator={"use": "global", "floor": floor})
    _, _, share = allotted(strategy, model)

    def weights(row: int, scores: list[Scores]) -> list[list[float]]:
        values, protected = seen_scores(model, scores, row), seen_protected(model, scores, row)
        counts, _ = oracles_evict.global_counts(values, protected, int(share[row]), floor)
        return [[float(count) for count in layer] for layer in counts]

    check(strategy, model, weights)


@pytest.mark.parametrize("normalize", [False, True])
@given(model=models(), budget=BUDGETS, recipe=st.sampled_from(("ada-kv", "h2o")))
def test_ada_heads_is_the_head_budget_of_ada_kv(
    normalize: bool, model: Model, budget: kvcomp.Budget, recipe: str
) -> None:
    strategy = kvcomp.strategy(recipe, budget, allocator={"use": "ada-heads", "normalize": normalize})
    for layer in model.samples:  # each layer has a budget of its own
        alone = Model([layer])
        _, _, share = allotted(strategy, alone)

        def weights(row: int, scores: list[Scores], alone: Model = alone, share: Tensor = share) -> list[list[float]]:
            values, protected = (of(alone, scores, row)[0] for of in (seen_scores, seen_protected))
            return [oracles_evict.ada_quotas(values, protected, int(share[row]), normalize=normalize)[0]]

        check(strategy, alone, weights)


@pytest.mark.parametrize("short", ["clip", "uniform"])
@given(model=models(), budget=BUDGETS)
def test_pyramid_is_the_layer_budget_of_pyramidkv(short: str, model: Model, budget: kvcomp.Budget) -> None:
    strategy = kvcomp.strategy("pyramidkv", budget, **{"allocator.short": short})
    _, _, share = allotted(strategy, model)

    def weights(row: int, scores: list[Scores]) -> list[list[float]]:
        window = max(int(one.protected[row].sum(dim=-1).max()) for one in scores)
        tokens, slots = max(map(max, model.held(row))), int(share[row])
        if short == "uniform" and tokens < 2 * (slots - window):
            return per_layer([1.0] * len(scores), model)
        return per_layer(oracles_evict.pyramid_quotas(slots, window, tokens, len(scores)), model)

    check(strategy, model, weights)


@given(model=models(most_held=0), budget=BUDGETS)
def test_prefix_is_the_layer_budget_of_prefixkv(model: Model, budget: kvcomp.Budget) -> None:
    strategy = kvcomp.strategy("prefixkv", budget)
    _, _, share = allotted(strategy, model)

    def weights(row: int, scores: list[Scores]) -> list[list[float]]:
        layers = [layer[0] for layer in seen_scores(model, scores, row)]
        protected = len(seen_protected(model, scores, row)[0][0])
        return per_layer(list(map(float, oracles_evict.prefix_sizes(layers, protected, int(share[row])))), model)

    check(strategy, model, weights)


@given(model=models(most_held=0), budget=BUDGETS)
def test_sparsity_is_the_layer_budget_of_vl_cache(model: Model, budget: kvcomp.Budget) -> None:
    def weights(row: int, _: list[Scores]) -> list[list[float]]:
        modality = model.samples[0].modality[row, 0][model.samples[0].valid[row, 0]].tolist()
        return per_layer([oracles_evict.density(layer, modality) for layer in model.attention(row)], model)

    check(kvcomp.strategy("vl-cache", budget), model, weights)
