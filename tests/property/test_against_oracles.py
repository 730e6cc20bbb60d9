"""Every recipe of the papers against an independent naive reference, row by row and head by head.

Float32 against float64: a choice between two scores (or cosines) that are nearer than `NEAR` may go either way, and
such draws are discarded.
"""

from __future__ import annotations

import math
from fractions import Fraction

import oracles
import pytest
import torch
from generators import FLOAT32, samples
from hypothesis import assume, given
from hypothesis import strategies as st
from rows import NEAR, Row, clear, heads, kept_by, row_of

import kvcomp
from kvcomp.testing import Run, Sample, run

PROMPTS = samples(dtypes=FLOAT32, fills=("normal",), most_held=0)
RATIO = st.integers(1, 100).map(lambda hundredths: str(hundredths / 100))


@given(sample=samples(most_held=0), ratio=RATIO)
def test_streaming_llm_keeps_sinks_and_the_latest(sample: Sample, ratio: str) -> None:
    seen = run(kvcomp.strategy("streaming-llm", float(ratio)), sample)
    for row, head in heads(sample):
        tokens = int(sample.valid[row, 0].sum())
        assert kept_by(seen, row, head) == oracles.streaming_kept(tokens, oracles.num_slots(ratio, tokens))


@given(sample=PROMPTS, ratio=RATIO)
def test_h2o_keeps_heavy_hitters_and_the_recent_half(sample: Sample, ratio: str) -> None:
    seen = run(kvcomp.strategy("h2o", float(ratio)), sample)
    for row, head in heads(sample):
        attention = row_of(sample, row).of(head)
        tokens = attention[0].shape[1]
        assume(clear(oracles.h2o_scores(attention)))
        assert kept_by(seen, row, head) == oracles.h2o_kept(attention, oracles.num_slots(ratio, tokens))


@given(sample=PROMPTS, ratio=RATIO)
def test_snapkv_keeps_what_its_window_votes_for(sample: Sample, ratio: str) -> None:
    seen = run(kvcomp.strategy("snapkv", float(ratio)), sample)
    for row, head in heads(sample):
        attention = row_of(sample, row).of(head)
        slots = oracles.num_slots(ratio, attention[0].shape[1])
        scores = oracles.snapkv_scores(attention, slots)
        assume(clear(scores) or len(scores) <= slots - min(32, slots // 2))
        assert kept_by(seen, row, head) == oracles.snapkv_kept(attention, slots)


VARIANTS = {
    "flowmm": {},
    "flowmm-misaligned": {"misaligned": True},
    "flowmm-no-flow": {"threshold": None},
    "flowmm-no-gate": {"share": None},
    "flowmm-no-flow-no-gate": {"threshold": None, "share": None},
}


@pytest.mark.parametrize("recipe", VARIANTS)
@given(sample=PROMPTS, ratio=RATIO, threshold=st.sampled_from((0.1, 0.25, 0.4, 0.6)))
def test_flowmm_does_what_the_paper_says(recipe: str, sample: Sample, ratio: str, threshold: float) -> None:
    variant = dict(VARIANTS[recipe])
    guided = "threshold" not in variant
    overrides = {"policy.threshold": threshold} if guided else {}
    seen = run(kvcomp.strategy(recipe, float(ratio), **overrides), sample)
    variant |= {"threshold": threshold} if guided else {}
    for number in range(sample.keys.shape[0]):
        row = row_of(sample, number)
        rho = oracles.flow_ratio(row.attention, row.modality, row.modality)
        if guided:
            assert float(seen.plan.rho[number]) == pytest.approx(rho, abs=1e-5, nan_ok=True)
            assume(math.isnan(rho) or abs(rho - threshold) > NEAR)
        for head in range(sample.keys.shape[1]):
            _check_head(seen, row, (number, head), rho, ratio, variant)


def _check_head(seen: Run, row: Row, place: tuple[int, int], rho: float, ratio: str, variant: dict) -> None:
    attention, keys, values = row.of(place[1]), row.keys[place[1]], row.values[place[1]]
    slots = oracles.num_slots(ratio, len(row.modality))
    assume(clear(oracles.flowmm_importance(attention, slots)))
    expected = oracles.flowmm(attention, keys, values, row.modality, slots, rho=rho, **variant)
    assert kept_by(seen, *place) == expected.kept
    assert _is_clear_match(expected, attention, keys, row.modality, slots, variant.get("share", 0.8))
    inside = seen.pivots.filled()[place]
    torch.testing.assert_close(seen.compressed.counts[place][inside].tolist(), expected.counts)
    for name in ("keys", "values"):
        merged = getattr(seen.compressed, name)[place][inside]
        torch.testing.assert_close(merged.double(), getattr(expected, name), rtol=1e-5, atol=1e-5)


def _is_clear_match(expected, attention, keys, modality, slots, share) -> bool:  # type: ignore[no-untyped-def]
    """Discard the draw where two pivots are equally near to a token; true otherwise."""
    importance = oracles.flowmm_importance(attention, slots)
    receiving = oracles.eligible_pivots(importance, expected.kept, share)
    for source in set(range(len(modality))) - set(expected.kept):
        candidates = oracles.allowed(source, receiving, modality, expected.rule)
        assume(not candidates or oracles.margin(source, candidates, keys) > NEAR)
    return True


@given(ratio=RATIO, tokens=st.integers(1, 100_000))
def test_slots_are_the_floor_of_the_decimal_as_written(ratio: str, tokens: int) -> None:
    slots = kvcomp.Budget.parse(float(ratio)).slots(torch.tensor([tokens]), slot_bytes=1)
    assert slots.tolist() == [oracles.num_slots(ratio, tokens)]
    assert Fraction(ratio) * tokens - slots.item() < 1
