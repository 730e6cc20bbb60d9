"""Every merging recipe against an independent naive reference, row by row and head by head.

Float32 against float64: a draw in which two numbers that decide something are nearer than `NEAR`, and not equal, is
discarded. Equal ones (keys that are all equal, or zero) are decided by rules, and stay.
"""

from __future__ import annotations

from dataclasses import replace

import oracles
import oracles_merge
import pytest
import torch
from generators import FLOAT32, samples
from hypothesis import assume, given
from hypothesis import strategies as st
from kvcomp_strategies.selectors.adjacent_clusters import AdjacentClusters
from oracles_merge import Head, Merged
from rows import NEAR, clear, kept_by, row_of, told_apart

import kvcomp
from kvcomp import Rule
from kvcomp.testing import Run, Sample, run, view_for
from kvcomp.testing.runs import run_view

PROMPTS = samples(dtypes=FLOAT32, fills=("normal", "normal", "equal", "zero"), most_held=0)
RATIO = st.integers(1, 100).map(lambda hundredths: hundredths / 100)


def heads_of(sample: Sample, row: int) -> tuple[list[Head], list[int]]:
    """The heads of a row whose scores can be told apart, and its modalities."""
    whole = row_of(sample, row)
    found = [Head(whole.of(head), whole.keys[head], whole.values[head]) for head in range(sample.keys.shape[1])]
    assume(all(clear(head.received()) for head in found))
    return found, whole.modality


def slots_of(seen: Run, row: int) -> list[int]:
    return seen.slots[row].tolist()


def assert_clear_match(heads: list[Head], merged: list[Merged], modality: list[int], rule: str = "cross") -> None:
    """Discard draws in which two pivots are nearly, and not quite, as near to a token, or one is nearly passing."""
    for head, one in zip(heads, merged, strict=True):
        for token in oracles_merge.dropped(head, one.kept):
            allowed = [
                p
                for p in one.kept
                if rule == "cross" or (oracles.kind(modality[p]) == oracles.kind(modality[token])) == (rule == "intra")
            ]
            gaps = [oracles.cosine(head.keys[token], head.keys[pivot]) for pivot in allowed]
            assume(told_apart(sorted(gaps)[-2:]))
        *similar, tau = one.similarity or [0.0]
        assume(all(told_apart([m, tau]) for m in similar))


def assert_same_row(seen: Run, row: int, merged: list[Merged]) -> None:
    for head, expected in enumerate(merged):
        assert kept_by(seen, row, head) == expected.kept
        inside = seen.pivots.filled()[row, head]
        torch.testing.assert_close(seen.compressed.counts[row, head][inside].tolist(), expected.counts)
        for name in ("keys", "values"):
            after = getattr(seen.compressed, name)[row, head][inside]
            torch.testing.assert_close(after.double(), getattr(expected, name), rtol=1e-5, atol=1e-5)


LOOK_M = {"look-m": "pivot", "look-m-mean": "mean", "look-m-weighted": "weighted", "look-m-evict": "evict"}


@pytest.mark.parametrize("recipe", LOOK_M)
@given(sample=PROMPTS, ratio=RATIO)
def test_look_m_keeps_text_first_and_merges_the_rest(recipe: str, sample: Sample, ratio: float) -> None:
    seen = run(kvcomp.strategy(recipe, ratio), sample)
    for row in range(sample.keys.shape[0]):
        heads, modality = heads_of(sample, row)
        merged = oracles_merge.look_m(heads, modality, slots_of(seen, row), LOOK_M[recipe])
        assert_clear_match(heads, merged, modality)
        assert_same_row(seen, row, merged)


@given(sample=PROMPTS, ratio=RATIO)
def test_the_official_budget_of_look_m_keeps_all_text(sample: Sample, ratio: float) -> None:
    seen = run(kvcomp.strategy("look-m", ratio, **{"selector.overflow": True}), sample)
    for row in range(sample.keys.shape[0]):
        heads, modality = heads_of(sample, row)
        for number, (head, slots) in enumerate(zip(heads, slots_of(seen, row), strict=True)):
            assert kept_by(seen, row, number) == oracles_merge.look_m_official_kept(head, modality, slots)


@pytest.mark.parametrize("weighting", ["exp", "cosine_mean"])
@pytest.mark.parametrize("chosen", ["head", "rank"])
@given(sample=PROMPTS, ratio=RATIO)
def test_d2o_merges_what_is_similar_enough(weighting: str, chosen: str, sample: Sample, ratio: float) -> None:
    settings = {"merger.weighting": weighting, "matcher.filter": chosen}
    seen = run(kvcomp.strategy("d2o", ratio, **settings), sample)
    for row in range(sample.keys.shape[0]):
        heads, modality = heads_of(sample, row)
        by_rank = chosen == "rank"
        merged, _ = oracles_merge.d2o(heads, modality, slots_of(seen, row), weighting=weighting, by_rank=by_rank)
        assume(not by_rank or _ranks_are_clear(merged))
        assert_clear_match(heads, merged, modality)
        assert_same_row(seen, row, merged)


def _ranks_are_clear(merged: list[Merged]) -> bool:
    """Whether the mean over heads of each rank is clearly above or below tau, or equal to it."""
    tau = merged[0].similarity[-1]
    most = max(len(one.similarity) for one in merged) - 1
    at_rank = [[one.similarity[rank] for one in merged if rank < len(one.similarity) - 1] for rank in range(most)]
    return all(told_apart([sum(similar) / len(similar), tau]) for similar in at_rank)


@given(sample=PROMPTS, ratio=RATIO, tau=st.floats(-0.5, 1.0), beta=st.sampled_from((0.5, 0.7, 1.0)))
def test_d2o_goes_on_from_the_threshold_of_earlier_compressions(
    sample: Sample, ratio: float, tau: float, beta: float
) -> None:
    strategy = kvcomp.strategy("d2o", ratio, **{"matcher.beta": beta})
    view = view_for(strategy, sample)
    seen = run_view(strategy, replace(view, memory=torch.full((view.shape[0],), tau)))
    for row in range(sample.keys.shape[0]):
        heads, modality = heads_of(sample, row)
        merged, after = oracles_merge.d2o(heads, modality, slots_of(seen, row), tau=tau, beta=beta)
        assert_clear_match(heads, merged, modality)
        assert_same_row(seen, row, merged)
        assert seen.assignment.memory is not None
        assert float(seen.assignment.memory[row]) == pytest.approx(after, abs=1e-5)


@given(sample=PROMPTS, ratio=RATIO)
def test_meda_is_look_ms_average_merge_for_what_a_layer_is_allotted(sample: Sample, ratio: float) -> None:
    seen = run(kvcomp.strategy("meda", ratio), sample)
    for row in range(sample.keys.shape[0]):
        heads, modality = heads_of(sample, row)
        merged = oracles_merge.look_m(heads, modality, slots_of(seen, row), "mean")
        assert_clear_match(heads, merged, modality)
        assert_same_row(seen, row, merged)


@pytest.mark.parametrize("rule", [Rule.INTRA, Rule.HETERO], ids=lambda rule: rule.name)
@given(sample=PROMPTS, ratio=RATIO)
def test_d2o_under_a_rule_of_modalities(rule: Rule, sample: Sample, ratio: float) -> None:
    """As a policy would have it: the mean is of the tokens that find a pivot."""
    strategy = kvcomp.strategy("d2o", ratio)
    seen = run(strategy, sample)
    rules = torch.full((sample.keys.shape[0],), int(rule))
    edges = strategy.matcher.match(seen.view, seen.pivots, seen.scores, rules)
    for row in range(sample.keys.shape[0]):
        heads, modality = heads_of(sample, row)
        merged, _ = oracles_merge.d2o(heads, modality, slots_of(seen, row), rule=rule.name.lower())
        assert_clear_match(heads, merged, modality, rule.name.lower())
        for head, expected in enumerate(merged):
            found = edges.merged[row, head]
            places = seen.view.indices[row, head]
            assert places[edges.sources[row, head][found]].tolist() == list(expected.edges)
            targets = seen.pivots.indices[row, head][edges.targets[row, head][found][:, 0]]
            assert places[targets].tolist() == [next(iter(target)) for target in expected.edges.values()]


KERNELS = {
    "kvmerge": {},
    "paper's sigma": {"merger.sigma": "paper"},
    "scaled values": {"merger.value_scale": "size"},
}


@pytest.mark.parametrize("variant", KERNELS)
@given(sample=PROMPTS, ratio=RATIO)
def test_kvmerge_makes_one_token_of_similar_neighbours(variant: str, sample: Sample, ratio: float) -> None:
    seen = run(kvcomp.strategy("kvmerge", ratio, **KERNELS[variant]), sample)
    options = {path.removeprefix("merger."): value for path, value in KERNELS[variant].items()}
    for row in range(sample.keys.shape[0]):
        heads, _ = heads_of(sample, row)
        for head in heads:
            assume(told_apart([value / 1e6 for value in oracles_merge.adjacent_similarity(head)]))
        sets = [oracles_merge.kvmerge_sets(*pair) for pair in zip(heads, slots_of(seen, row), strict=True)]
        assert [len(one) for one in sets] == slots_of(seen, row)
        merged = [oracles_merge.kvmerge(head, one, **options) for head, one in zip(heads, sets, strict=True)]
        assert_same_row(seen, row, merged)


@given(sample=PROMPTS, ratio=RATIO, threshold=st.sampled_from((-0.3, 0.0, 0.2, 0.75)))
def test_kvmerge_with_a_threshold_scans_from_the_last_token(sample: Sample, ratio: float, threshold: float) -> None:
    settings = {"selector.mode": "threshold", "selector.threshold": threshold}
    seen = run(kvcomp.strategy("kvmerge", ratio, **settings), sample)
    for row in range(sample.keys.shape[0]):
        heads, _ = heads_of(sample, row)
        merged = []
        for head, slots in zip(heads, slots_of(seen, row), strict=True):
            similar = [value / 1e6 for value in oracles_merge.adjacent_similarity(head)]
            assume(all(told_apart([value, threshold]) for value in similar))
            sets = oracles_merge.threshold_sets(head, slots * 35 // 100, slots // 4, threshold)
            merged.append(oracles_merge.kvmerge(head, sets))
        assert_same_row(seen, row, merged)


@given(sample=PROMPTS, tokens=st.integers(1, 40), data=st.data())
def test_clusters_are_exact_whatever_is_protected(sample: Sample, tokens: int, data: st.DataObject) -> None:
    """Scattered protection can part the tokens into more runs than there are slots; the best runs stay."""
    view = view_for(kvcomp.strategy("kvmerge"), sample)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    share = data.draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    held = view.valid.sum(dim=-1)
    slots = torch.full_like(held, tokens).minimum(held)
    wanted = (torch.rand(view.shape, generator=generator) < share) & view.valid
    protected = wanted & (wanted.flip(-1).cumsum(-1).flip(-1) <= slots[..., None])
    values = torch.rand(view.shape, generator=generator)
    pivots = AdjacentClusters().select(view, kvcomp.Scores(values, protected), slots)
    assert torch.equal(pivots.filled().sum(dim=-1), slots)
    assert pivots.groups is not None
    for row in range(view.shape[0]):
        for head in range(view.shape[1]):
            here = (row, head)
            kept = pivots.indices[here][pivots.filled()[here]].tolist()
            assert set(protected[here].nonzero().flatten().tolist()) <= set(kept)
            groups = pivots.groups[here].tolist()
            runs = [[token for token, group in enumerate(groups) if group == slot] for slot in range(len(kept))]
            for pivot, one in zip(kept, runs, strict=True):
                assert one == list(range(one[0], one[-1] + 1))
                assert not protected[here][one].any() or len(one) == 1
                assert pivot == max(one, key=lambda token: (float(values[here][token]), -token))


@given(sample=PROMPTS, ratio=RATIO, window=st.sampled_from((1, 3, 32)))
def test_cam_shares_values_among_those_that_follow(sample: Sample, ratio: float, window: int) -> None:
    seen = run(kvcomp.strategy("cam", ratio, **{"matcher.window": window}), sample)
    for row in range(sample.keys.shape[0]):
        heads, _ = heads_of(sample, row)
        merged = []
        for head, slots in zip(heads, slots_of(seen, row), strict=True):
            chances = oracles_merge.cam_chances(head, oracles_merge.cam_kept(head.tokens, slots), window)
            lots = {token: oracles_merge.lot(token, sample.layer) for token in chances}
            assume(all(abs(lots[token] - chance) > NEAR for token, (_, chance) in chances.items()))
            merged.append(oracles_merge.cam(head, slots, sample.layer, window))
        assert_same_row(seen, row, merged)


@given(sample=PROMPTS, ratio=RATIO)
def test_importance_weighted_goes_by_the_attention_received(sample: Sample, ratio: float) -> None:
    seen = run(kvcomp.strategy("look-m", ratio, merger="importance-weighted"), sample)
    for row in range(sample.keys.shape[0]):
        heads, modality = heads_of(sample, row)
        merged = oracles_merge.look_m(heads, modality, slots_of(seen, row))
        assert_clear_match(heads, merged, modality)
        weights = oracles_merge.attention_weights
        merged = [
            oracles_merge.assemble(head, one.kept, one.edges, weights, weights)
            for head, one in zip(heads, merged, strict=True)
        ]
        assert_same_row(seen, row, merged)


MERGING = ["look-m", "look-m-mean", "look-m-weighted", "d2o", "meda", "kvmerge", "cam"]


@pytest.mark.parametrize("recipe", MERGING)
@given(sample=samples(most_held=0), ratio=RATIO)
def test_where_all_pivots_are_protected_nothing_is_merged(recipe: str, sample: Sample, ratio: float) -> None:
    """Bit for bit what pure eviction of the same tokens leaves."""
    everything = {"use": "received-attention", "recent": 1.0}
    strategy = kvcomp.strategy(recipe, ratio, scorer=everything)
    seen = run(strategy, sample)
    assert not bool(seen.assignment.merged.any())
    evicted = run_view(kvcomp.strategy("h2o", ratio, scorer=everything, allocator=strategy.allocator.dump()), seen.view)
    for name in ("keys", "values", "counts", "indices"):
        assert torch.equal(getattr(seen.compressed, name), getattr(evicted.compressed, name))


@pytest.mark.parametrize("recipe", [name for name in MERGING if name != "cam"])  # which merges only values anyway
@given(sample=samples(most_held=0), ratio=RATIO)
def test_values_only_leaves_keys_as_they_are(recipe: str, sample: Sample, ratio: float) -> None:
    strategy = kvcomp.strategy(recipe, ratio)
    wrapped = kvcomp.strategy(recipe, ratio, merger={"use": "values-only", "merger": strategy.merger.dump()})
    both, values = run(strategy, sample), run(wrapped, sample)
    assert torch.equal(values.compressed.values, both.compressed.values)
    assert torch.equal(values.compressed.counts, both.compressed.counts)
    assert torch.equal(values.compressed.keys, values.pivots.gather(values.view.keys))
