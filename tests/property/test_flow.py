"""Information flow: rho against Eq. 6-7, its sampled estimate, and what the ablations must be equal to."""

from __future__ import annotations

import math
from dataclasses import replace

import oracles
import pytest
import torch
from generators import DISTINCT, FLOAT32, SAMPLES, rows_of, samples
from hypothesis import assume, given
from hypothesis import strategies as st
from kvcomp_strategies.observations.cross_modal_flow import CrossModalFlow
from torch import Tensor

import kvcomp
from kvcomp import Modality, Rule
from kvcomp.core.attention import AttentionInputs, observe
from kvcomp.testing import Run, Sample, make_sample, run

RATIO = st.sampled_from((0.1, 0.3, 0.6))


def assert_same(one: Run, other: Run) -> None:
    for name in ("keys", "values", "indices", "counts"):
        assert torch.equal(getattr(one.compressed, name), getattr(other.compressed, name)), name


@given(sample=SAMPLES, ratio=RATIO)
def test_theta_one_makes_every_layer_intra(sample: Sample, ratio: float) -> None:
    strategy = kvcomp.strategy("flowmm", ratio, **{"policy.threshold": 1.0})
    seen = run(strategy, sample)
    assert strategy.policy.plan(seen.view).rule.tolist() == [Rule.INTRA] * sample.keys.shape[0]
    source, target = (
        seen.view.compared_modality[..., None],
        seen.pivots.gather(seen.view.compared_modality)[..., None, :],
    )
    assert not bool(((seen.edges() > 0) & (source != target)).any())


@given(sample=SAMPLES, ratio=RATIO)
def test_theta_zero_makes_every_layer_with_any_flow_cross(sample: Sample, ratio: float) -> None:
    strategy = kvcomp.strategy("flowmm", ratio, **{"policy.threshold": 0.0})
    seen = run(strategy, sample)
    rules, rho = strategy.policy.plan(seen.view).rule.tolist(), seen.plan.rho.tolist()
    assert rules == [Rule.CROSS if flow > 0 else Rule.INTRA for flow in rho]  # NaN is not above 0


@given(sample=SAMPLES, ratio=RATIO)
def test_theta_zero_is_flowmm_without_flow_guidance(sample: Sample, ratio: float) -> None:
    seen = run(kvcomp.strategy("flowmm", ratio, **{"policy.threshold": 0.0, "policy.absent": "any"}), sample)
    assume(not bool((seen.plan.rho == 0).any()))
    assert_same(seen, run(kvcomp.strategy("flowmm-no-flow", ratio), sample))


@given(sample=SAMPLES, ratio=RATIO)
def test_quantile_one_is_flowmm_without_its_gate(sample: Sample, ratio: float) -> None:
    gated = kvcomp.strategy("flowmm", ratio, **{"matcher.quantile": 1.0})
    assert_same(run(gated, sample), run(kvcomp.strategy("flowmm-no-gate", ratio), sample))


@given(sample=SAMPLES, ratio=RATIO)
def test_the_policy_uniform_is_flowmm_without_flow_guidance(sample: Sample, ratio: float) -> None:
    uniform = kvcomp.strategy("flowmm", ratio, policy="uniform")
    assert_same(run(uniform, sample), run(kvcomp.strategy("flowmm-no-flow", ratio), sample))


@given(sample=SAMPLES, ratio=RATIO)
def test_the_gate_never_changes_what_is_kept(sample: Sample, ratio: float) -> None:
    kept = [run(kvcomp.strategy(name, ratio), sample).kept() for name in ("flowmm", "flowmm-no-gate")]
    assert torch.equal(*kept)


@given(sample=DISTINCT, ratio=RATIO)
def test_misaligned_turns_the_rules_round(sample: Sample, ratio: float) -> None:
    rules = []
    for name in ("flowmm", "flowmm-misaligned"):
        strategy = kvcomp.strategy(name, ratio)
        rules.append(strategy.policy.plan(run(strategy, sample).view).rule.tolist())
    turned = {Rule.CROSS: Rule.INTRA, Rule.INTRA: Rule.HETERO}
    rho = run(kvcomp.strategy("flowmm", ratio), sample).plan.rho.tolist()
    expected = [Rule.INTRA if math.isnan(flow) else turned[rule] for rule, flow in zip(rules[0], rho, strict=True)]
    assert rules[1] == expected


@given(sample=samples(dtypes=FLOAT32, fills=("normal", "zero", "equal"), most_held=0))
def test_rho_is_equation_six(sample: Sample) -> None:
    rho = run(kvcomp.strategy("flowmm", 0.5), sample).plan.rho
    for row in range(sample.keys.shape[0]):
        valid = sample.valid[row, 0]
        keys, queries = sample.keys[row][:, valid], sample.queries[row][:, valid]
        group = queries.shape[0] // keys.shape[0]
        attention = [oracles.softmax_attention(queries[h], keys[h // group]) for h in range(queries.shape[0])]
        modality = sample.modality[row, 0, valid].tolist()
        expected = oracles.flow_ratio(attention, modality, modality)
        assert float(rho[row]) == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_rho_is_exact_up_to_512_queries_and_sampled_above() -> None:
    valid = torch.ones(1, 513, dtype=torch.bool)
    assert rows_of(CrossModalFlow(), valid[:, :512]) is None
    assert rows_of(CrossModalFlow(), valid).shape == (1, 128)  # type: ignore[union-attr]
    assert rows_of(CrossModalFlow(rows_used="all"), valid) is None


@given(length=st.integers(513, 3000), other=st.integers(1, 3000), seed=st.integers(0, 9))
def test_a_row_is_sampled_alike_in_any_batch(length: int, other: int, seed: int) -> None:
    flow, width = CrossModalFlow(seed=seed), max(length, other)
    alone = rows_of(flow, torch.ones(1, length, dtype=torch.bool))
    valid = torch.arange(width) >= width - torch.tensor([length, other])[:, None]
    batch = rows_of(flow, valid)
    assert alone is not None
    assert batch is not None
    used = batch[0][batch[0] >= 0] - (width - length)
    assert used.tolist() == alone[0].tolist()
    lone = rows_of(flow, torch.ones(1, other, dtype=torch.bool))
    expected = list(range(other)) if lone is None else lone[0].tolist()
    assert (batch[1][batch[1] >= 0] - (width - other)).tolist() == expected


@given(length=st.integers(513, 5000), seed=st.integers(0, 9))
def test_one_row_is_sampled_in_each_of_128_equal_strata(length: int, seed: int) -> None:
    rows = rows_of(CrossModalFlow(seed=seed), torch.ones(1, length, dtype=torch.bool))
    assert rows is not None
    edges = [stratum * length // 128 for stratum in range(129)]
    assert all(start <= row < end for row, start, end in zip(rows[0].tolist(), edges, edges[1:], strict=False))


def interleaved(seed: int, tokens: int, text: int = 20, image: int = 64) -> AttentionInputs:
    """One row of random attention over images with text between them, a question at the end."""
    generator = torch.Generator().manual_seed(seed)
    modality = torch.tensor([(place - 12) % (text + image) < image and place >= 12 for place in range(tokens)])
    modality[-20:] = False
    modality = modality.to(torch.int8)[None]
    queries, keys = (torch.randn(1, 4, tokens, 16, generator=generator) for _ in range(2))
    bias = torch.randn(1, 4, 2, 16, generator=generator)
    columns, valid = torch.arange(tokens), torch.ones(1, tokens, dtype=torch.bool)
    return AttentionInputs(
        queries=queries + bias[:, :, modality[0].long()],
        keys=keys + bias[:, :, modality[0].long()],
        query_columns=columns,
        key_columns=columns.expand(1, 1, -1),
        query_modality=modality,
        query_valid=valid,
        modality=modality.expand(1, 4, -1),
        valid=valid.expand(1, 4, -1),
        mask=None,
        scaling=0.25,
    )


def errors(tokens: int) -> Tensor:
    """The error of the estimate for 3 prompts and 12 seeds."""
    found = []
    for prompt in range(3):
        exact, *sampled = [CrossModalFlow(rows_used="all"), *[CrossModalFlow(seed=seed) for seed in range(12)]]
        seen = observe(interleaved(prompt, tokens), [exact, *sampled])
        found += [float(seen[estimate].mean() - seen[exact].mean()) for estimate in sampled]
    return torch.tensor(found)


@pytest.mark.parametrize(("tokens", "mean", "worst"), [(1024, 0.010, 0.035), (2048, 0.015, 0.05)])
def test_the_sampled_rho_is_near_and_hardly_biased(tokens: int, mean: float, worst: float) -> None:
    error = errors(tokens)
    assert float(error.abs().mean()) < mean
    assert float(error.abs().max()) < worst
    assert abs(float(error.mean())) < 0.006
    assert float(error.abs().max()) > 0  # an estimate, so this test sees one


def test_a_long_prompt_of_one_modality_has_no_rho() -> None:
    sample = make_sample(0, (600,), modalities=(Modality.IMAGE,), kv_heads=1, group=1)
    assert run(kvcomp.strategy("flowmm", 0.1), sample).plan.rho.isnan().all()


INTRA = {"policy": {"use": "flow-guided", "threshold": 1.0}}
BY_KIND = {
    "flowmm": {},
    "flowmm-misaligned": {},
    "flowmm-no-gate": {"matcher": "nearby"},
    "cam": INTRA,
    "kvmerge": {**INTRA, "selector.borders": "modality"},
}


def test_a_prompt_of_images_and_videos_alone_has_no_rho() -> None:
    sample = make_sample(0, (60,), modalities=(Modality.IMAGE, Modality.VIDEO))
    assert {Modality.IMAGE, Modality.VIDEO} == set(sample.modality.unique().tolist())
    assert run(kvcomp.strategy("flowmm", 0.1), sample).plan.rho.isnan().all()


@given(seed=st.integers(0, 10**6), ratio=RATIO)
@pytest.mark.parametrize("recipe", BY_KIND)
def test_images_and_videos_are_one_kind(recipe: str, seed: int, ratio: float) -> None:
    sample = make_sample(seed, lengths=(60, 41), modalities=(Modality.TEXT, Modality.IMAGE, Modality.VIDEO), held=6)
    strategy = kvcomp.strategy(recipe, ratio, **BY_KIND[recipe])
    visual = sample.modality.masked_fill(sample.modality == Modality.VIDEO, Modality.IMAGE)
    one, other = run(strategy, sample), run(strategy, replace(sample, modality=visual))
    assert_same(one, other)
    torch.testing.assert_close(one.plan.rho, other.plan.rho, equal_nan=True, rtol=0, atol=0)
