"""Every allocator against an independent naive reference, over several layers at once, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import oracles
import oracles_evict
import pytest
import torch
from generators import BUDGETS, MODALITIES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kvcomp
from kvcomp import LayerView, Modality, Scores, Strategy
from kvcomp.testing import Sample, make_sample, view_for

LAYERS = 3


@dataclass
class Model:
    """What every layer of a model holds: the same tokens, other vectors; or heads that differ, as after a turn."""

    samples: list[Sample]

    def views(self, strategy: Strategy) -> list[LayerView]:
        return [view_for(strategy, sample) for sample in self.samples]

    def attention(self, row: int) -> list[list[Tensor]]:
        """`[layer][query head]` of one row, `(queries, tokens)`, without what the head does not hold."""
        return [sample_attention(sample, row) for sample in self.samples]

    def held(self, row: int) -> list[list[int]]:
        return [sample.valid[row].sum(dim=-1).tolist() for sample in self.samples]


def sample_attention(sample: Sample, row: int) -> list[Tensor]:
    group = sample.queries.shape[1] // sample.keys.shape[1]
    new = int(sample.valid[row, 0, -sample.queries.shape[2] :].sum())
    heads = []
    for head in range(sample.queries.shape[1]):
        held = sample.valid[row, head // group]
        queries = sample.queries[row, head, -new:]
        heads.append(oracles.softmax_attention(queries, sample.keys[row, head // group, held]))
    return heads


@st.composite
def models(draw: st.DrawFn, most_held: int = 12, modalities: tuple[tuple[Modality, ...], ...] = MODALITIES) -> Model:
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=2))
    shape = {
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 2)),
        "held": draw(st.sampled_from((0, most_held))),
        "modalities": draw(st.sampled_from(modalities)),
    }
    seed = draw(st.integers(0, 2**20))
    tokens = make_sample(seed, lengths, **shape)
    samples = [make_sample(seed + 1000 * number, lengths, layer=number, **shape) for number in range(LAYERS)]
    return Model([replace(sample, modality=tokens.modality) for sample in samples])


def allotted(strategy: Strategy, model: Model) -> tuple[Tensor, list[Scores], Tensor]:
    """What the strategy's allocator gives, the scores that it saw, and the uniform share of each row."""
    views = model.views(strategy)
    tokens = views[0].valid.sum(dim=-1).amax(dim=-1)
    share = strategy.slots(tokens, 1)
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
