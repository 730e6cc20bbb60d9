"""Matching among a few pivots: which ones a run looks at, by an oracle, and with all of them what the gate gives."""

from __future__ import annotations

from dataclasses import replace

import kvcomp_strategies.matchers.nearby as nearby
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvcomp_strategies.matchers.nearby import Nearby
from kvcomp_strategies.matchers.nearest import Nearest
from kvcomp_strategies.matchers.sensitivity_gated import SensitivityGated

from kvcomp import Assignment, LayerView, Matcher, Pivots, Rule, Scores
from kvcomp.testing import make_sample

TOKENS, RUN = 60, 4
RULES = {"cross": Rule.CROSS, "intra": Rule.INTRA, "hetero": Rule.HETERO}


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearby, "RUN", RUN)


def view(seed: int = 0, lengths: tuple[int, ...] = (TOKENS,), kv_heads: int = 1) -> LayerView:
    """Text with two images in it."""
    made = make_sample(seed, lengths, kv_heads=kv_heads).view()
    places = torch.arange(made.shape[2])
    kinds = ((places > 8) & (places < 25)) | ((places > 33) & (places < 40))
    return replace(made, modality=kinds.to(torch.int8).expand(made.shape))


def kept(made: LayerView, share: float = 0.4, seed: int = 1) -> Pivots:
    """Some valid tokens of each head, as many everywhere."""
    luck = torch.rand(made.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~made.valid, -1.0)
    count = int(share * int(made.valid.sum(dim=-1).min()))
    return Pivots(luck.topk(count, dim=-1).indices.sort(dim=-1).values)


def match(
    matcher: Matcher, made: LayerView, pivots: Pivots, rule: Rule = Rule.CROSS, protected: tuple[int, ...] = ()
) -> Assignment:
    importance = torch.rand(made.shape, generator=torch.Generator().manual_seed(7))
    locked = torch.zeros_like(made.valid)
    locked[..., list(protected)] = True
    return matcher.match(made, pivots, Scores(importance, locked), torch.full((made.shape[0],), int(rule)))


def looked_at(run: list[int], opened: list[int], order: dict[int, int], window: int, spread: int) -> set[int]:
    """The pivots that a run of tokens looks at: around its first token, and everywhere."""
    before = sum(order[pivot] < order[run[0]] for pivot in opened)
    around = opened[max(0, before - window) : before + window]
    return {*around, *(opened[place * len(opened) // spread] for place in range(spread) if opened)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("window", "spread"), [(1, 0), (2, 3), (5, 1)])
def test_a_run_looks_at_the_pivots_around_it_and_at_some_everywhere(rule: str, window: int, spread: int) -> None:
    made = view()
    pivots, kinds = kept(made), made.modality[0, 0].tolist()
    edges = match(Nearby(window=window, spread=spread, quantile=1.0), made, pivots, RULES[rule])
    order = {token: kinds[token] * TOKENS + token if rule == "intra" else token for token in range(TOKENS)}
    slots = pivots.indices[0, 0].tolist()
    opened = sorted(slots, key=order.__getitem__)
    sources = sorted(edges.sources[0, 0].tolist(), key=order.__getitem__)
    expected: dict[int, int | None] = {}
    for start in range(0, len(sources), RUN):
        seen = looked_at(sources[start : start + RUN], opened, order, window, spread)
        for source in sources[start : start + RUN]:
            candidates = oracles.allowed(source, sorted(seen), kinds, rule)
            expected[source] = oracles.nearest(source, candidates, made.keys[0, 0])
    found = edges.targets[0, 0, :, 0].tolist()
    assert {
        s: None if t < 0 else slots[t] for s, t in zip(edges.sources[0, 0].tolist(), found, strict=True)
    } == expected
    assert None not in expected.values() or rule != "cross"


@pytest.mark.parametrize("rule", RULES)
def test_with_all_pivots_in_the_window_it_is_the_gate(rule: str) -> None:
    made = view(lengths=(50, TOKENS), kv_heads=2)
    pivots = kept(made)
    for few, every in ((Nearby(window=TOKENS), SensitivityGated()), (Nearby(window=TOKENS, quantile=1.0), Nearest())):
        one, other = (match(matcher, made, pivots, RULES[rule], protected=(55, 57)) for matcher in (few, every))
        assert torch.equal(one.sources, other.sources)
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.weights, other.weights)


def test_protected_and_sensitive_pivots_receive_nothing() -> None:
    made = view()
    pivots = kept(made)
    protected = tuple(pivots.indices[0, 0, :3].tolist())
    slots = set(match(Nearby(window=2), made, pivots, protected=protected).targets.flatten().tolist())
    assert slots.isdisjoint({0, 1, 2})
    assert len(slots) > len(set(match(Nearby(window=2, quantile=0.1), made, pivots).targets.flatten().tolist()))


def test_without_an_open_pivot_everything_is_evicted() -> None:
    made = view()
    edges = match(Nearby(), made, kept(made), protected=tuple(range(TOKENS)))
    assert bool((edges.targets == -1).all())
    assert float(edges.weights.sum()) == 0.0


def test_where_everything_stays_there_is_nothing_to_match() -> None:
    made = view()
    edges = match(Nearby(), made, Pivots(torch.arange(TOKENS)[None, None]))
    assert edges.sources.shape == (1, 1, 0)
    assert edges.targets.shape == (1, 1, 0, 1)


def test_a_token_below_the_floor_is_evicted() -> None:
    made = view()
    every, near = (match(Nearby(floor=floor), made, kept(made)) for floor in (-1.0, 0.5))
    assert 0 < int((near.targets >= 0).sum()) < int((every.targets >= 0).sum())


@given(
    rule=st.sampled_from(list(Rule)), window=st.integers(1, 6), spread=st.integers(0, 6), elements=st.integers(1, 500)
)
def test_chunks_of_any_size_and_rows_of_any_batch_give_the_same(
    rule: Rule, window: int, spread: int, elements: int
) -> None:
    made, matcher = view(lengths=(41, TOKENS), kv_heads=2), Nearby(window=window, spread=spread)
    pivots = kept(made)
    whole = match(matcher, made, pivots, rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearby, "CHUNK_ELEMENTS", elements)
        assert torch.equal(match(matcher, made, pivots, rule).targets, whole.targets)
    importance = torch.rand(made.shape, generator=torch.Generator().manual_seed(7))
    for row in range(2):
        alone = matcher.match(
            replace(
                made,
                **{
                    name: getattr(made, name)[row : row + 1]
                    for name in ("keys", "values", "modality", "valid", "indices", "counts")
                },
            ),
            Pivots(pivots.indices[row : row + 1]),
            Scores(importance[row : row + 1], torch.zeros_like(made.valid[row : row + 1])),
            torch.tensor([int(rule)]),
        )
        width = alone.targets.shape[2]
        assert torch.equal(alone.targets[0], whole.targets[row, :, :width])
