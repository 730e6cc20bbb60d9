"""The eviction recipes against independent naive references: what every head of every layer keeps, index by index.

Float32 against float64: a choice between two scores that differ by less than `NEAR` and are not equal may go either
way, and such draws are discarded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import oracles
import oracles_evict
import pytest
from generators import RATIOS
from hypothesis import assume, given
from hypothesis import strategies as st
from layered import LAYERS, Model, models
from oracles_evict import Bin, Kept, keep, shares
from torch import Tensor

import kvcomp
from kvcomp import Modality, Strategy

NEAR = 1e-6


@dataclass
class Row:
    """One row: `attention[layer][query head]`, `keys[layer][kv_head]`, the modality of its tokens."""

    attention: list[list[Tensor]]
    keys: list[list[Tensor]]
    modality: list[int]
    slots: int

    @property
    def tokens(self) -> int:
        return len(self.modality)

    @property
    def kv_heads(self) -> int:
        return len(self.keys[0])

    def group(self, layer: int, head: int) -> list[Tensor]:
        size = len(self.attention[layer]) // self.kv_heads
        return self.attention[layer][head * size : (head + 1) * size]

    def per_head(self, score: Callable[[int, int], list[float]]) -> list[list[list[float]]]:
        return [[score(layer, head) for head in range(self.kv_heads)] for layer in range(LAYERS)]


def row_of(model: Model, number: int, ratio: str) -> Row:
    samples = model.samples
    valid = samples[0].valid[number, 0]
    modality = samples[0].modality[number, 0, valid].tolist()
    keys = [[head[valid] for head in sample.keys[number]] for sample in samples]
    return Row(model.attention(number), keys, modality, oracles.num_slots(ratio, len(modality)))


def kept_by(strategy: Strategy, model: Model) -> list[list[list[list[int]]]]:
    """`[row][layer][head]`, through the stages that the runtime goes through."""
    views = model.views(strategy)
    share = strategy.slots(views[0].valid.sum(dim=-1).amax(dim=-1), views[0].form)
    scores = [strategy.scores(view, share) for view in views]
    if strategy.allocator.scope == "model":
        scores = strategy.together(views, scores)
    allotted = strategy.allocate(share, views, scores)
    plans = [strategy.plan(*one) for one in zip(views, allotted, scores, strict=True)]
    indices = [strategy.apply(*one).indices.tolist() for one in zip(views, plans, strict=True)]
    return [
        [[[index for index in head if index >= 0] for head in layer[row]] for layer in indices]
        for row in range(len(share))
    ]


def select(
    row: Row,
    scores: list[list[list[float]]],
    window: Callable[[int], list[int]] = lambda slots: [],
    sizes: list[list[int]] | None = None,
    *,
    clear: float = float("inf"),
) -> Kept:
    """The best of each head; `window` says what is protected in a head of so many slots."""
    sizes = sizes or [[row.slots] * row.kv_heads] * LAYERS
    chosen = [
        [keep(values, window(size), size) for values, size in zip(*of_layer, strict=True)]
        for of_layer in zip(scores, sizes, strict=True)
    ]
    margin = min(clear, *(gap for layer in chosen for _, gap in layer))
    return Kept([[places for places, _ in layer] for layer in chosen], margin)


def divided(row: Row, quotas: list[list[float]], scores: list[list[list[float]]], protected: int) -> list[list[int]]:
    """What each head gets of one budget over the layers given here."""
    bins = [
        Bin(layer, head, quota, row.tokens, min(protected, row.tokens), sum(scores[layer][head]))
        for layer, of_layer in enumerate(quotas)
        for head, quota in enumerate(of_layer)
    ]
    flat = shares(bins, row.slots * len(bins))
    return [flat[start : start + row.kv_heads] for start in range(0, len(flat), row.kv_heads)]


def latest(row: Row, count: int) -> list[int]:
    return list(range(row.tokens - count, row.tokens))


def tova(row: Row) -> Kept:
    return select(row, row.per_head(lambda layer, _: oracles_evict.last_row(row.attention[layer])))


def recency(row: Row) -> Kept:
    return select(row, row.per_head(lambda *_: [float(place) for place in range(row.tokens)]))


def key_norm(row: Row) -> Kept:
    return select(row, row.per_head(lambda layer, head: oracles_evict.key_norms(row.keys[layer][head])))


def keydiff(row: Row) -> Kept:
    return select(row, row.per_head(lambda layer, head: oracles_evict.key_differences(row.keys[layer][head])))


def _votes(row: Row, kernel: int, pooling: str) -> tuple[list[list[list[float]]], list[int]]:
    window = min(32, row.slots // 2)
    votes = row.per_head(
        lambda layer, head: oracles_evict.window_votes(row.group(layer, head), row.slots, 32, kernel, pooling)[0]
    )
    return votes, latest(row, window)


def pyramidkv(row: Row) -> Kept:
    votes, window = _votes(row, 5, "average")
    quotas = oracles_evict.pyramid_quotas(row.slots, len(window), row.tokens, LAYERS)
    sizes = divided(row, [[quota] * row.kv_heads for quota in quotas], votes, len(window))
    return select(row, votes, lambda _: window, sizes)


def ada_kv(row: Row) -> Kept:
    votes, window = _votes(row, 7, "max")
    sizes, clear = [], float("inf")
    for layer in range(LAYERS):
        quotas, gap = oracles_evict.ada_quotas(votes[layer], [window] * row.kv_heads, row.slots)
        sizes += divided(row, [quotas], [votes[layer]], len(window))
        clear = min(clear, gap)
    return select(row, votes, lambda _: window, sizes, clear=clear)


def vl_cache(row: Row) -> Kept:
    scores = row.per_head(lambda layer, head: oracles_evict.post_vision_scores(row.group(layer, head), row.modality))
    quotas = [[oracles_evict.density(heads, row.modality)] * row.kv_heads for heads in row.attention]
    sizes = divided(row, quotas, scores, row.slots // 10)
    return select(row, scores, lambda slots: latest(row, slots // 10), sizes)


def prefixkv(row: Row) -> Kept:
    everywhere = [oracles.h2o_scores(row.attention[layer]) for layer in range(LAYERS)]
    protected = sorted({*range(min(4, row.tokens)), row.tokens - 1})
    counts = oracles_evict.prefix_sizes(everywhere, len(protected), row.slots)
    scores = row.per_head(lambda layer, _: everywhere[layer])
    sizes = divided(row, [[float(count)] * row.kv_heads for count in counts], scores, len(protected))
    return select(row, scores, lambda _: protected, sizes)


ORACLES = {
    "tova": tova,
    "recency": recency,
    "key-norm": key_norm,
    "keydiff": keydiff,
    "pyramidkv": pyramidkv,
    "ada-kv": ada_kv,
    "vl-cache": vl_cache,
    "prefixkv": prefixkv,
}
RATIO = RATIOS.filter(lambda ratio: float(ratio) >= 0.02)


@pytest.mark.parametrize("recipe", ORACLES)
@given(model=models(most_held=0), ratio=RATIO)
def test_a_recipe_keeps_what_its_paper_says(recipe: str, model: Model, ratio: str) -> None:
    _check(recipe, model, ratio)


def _check(recipe: str, model: Model, ratio: str) -> None:
    rows = [row_of(model, number, ratio) for number in range(model.samples[0].keys.shape[0])]
    expected = [ORACLES[recipe](row) for row in rows]
    assume(all(kept.margin > NEAR for kept in expected))
    assert kept_by(kvcomp.strategy(recipe, float(ratio)), model) == [kept.indices for kept in expected]


@pytest.mark.parametrize("fill", ["zero", "equal"])
@pytest.mark.parametrize("recipe", sorted(set(ORACLES) - {"pyramidkv"}))  # its average of equal votes rounds
@given(data=st.data(), ratio=RATIO)
def test_ties_go_to_the_earlier_token(recipe: str, fill: str, data: st.DataObject, ratio: str) -> None:
    _check(recipe, data.draw(models(most_held=0, fill=fill)), ratio)


@pytest.mark.parametrize("modality", [Modality.TEXT, Modality.IMAGE])
@pytest.mark.parametrize("recipe", ORACLES)
@given(data=st.data(), ratio=RATIO)
def test_prompts_of_one_modality(recipe: str, modality: Modality, data: st.DataObject, ratio: str) -> None:
    _check(recipe, data.draw(models(most_held=0, modalities=((modality,),))), ratio)


@pytest.mark.parametrize("first", [1, 2])
@given(model=models(most_held=0), ratio=RATIO)
def test_fastv_drops_images_in_the_later_layers_or_says_the_smallest_budget(
    first: int, model: Model, ratio: str
) -> None:
    strategy = kvcomp.strategy("fastv", float(ratio), **{"scorer.layer": first})
    rows = [row_of(model, number, ratio) for number in range(model.samples[0].keys.shape[0])]
    smallest = max(oracles_evict.fastv_smallest(row.modality, LAYERS, first) for row in rows)
    expected = [oracles_evict.fastv_kept(row.attention, row.modality, row.slots, first) for row in rows]
    if any(kept is None for kept in expected):
        with pytest.raises(kvcomp.BudgetError, match="never drops") as caught:
            kept_by(strategy, model)
        assert caught.value.smallest == smallest
        ratio = str(smallest)
        rows = [row_of(model, number, ratio) for number in range(len(rows))]
        expected = [oracles_evict.fastv_kept(row.attention, row.modality, row.slots, first) for row in rows]
        strategy = kvcomp.strategy(strategy, smallest)
    assume(all(kept.margin > NEAR for kept in expected))
    heads = model.samples[0].keys.shape[1]
    assert kept_by(strategy, model) == [[[layer] * heads for layer in kept.indices] for kept in expected]


@pytest.mark.parametrize("recipe", ORACLES)
@given(data=st.data())
def test_one_token_stays(recipe: str, data: st.DataObject) -> None:
    model = data.draw(models(most_held=0, most_tokens=1))
    kept = kept_by(kvcomp.strategy(recipe, 0.01), model)
    assert {index for row in kept for layer in row for head in layer for index in head} == {0}
