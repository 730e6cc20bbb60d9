"""Reconstruction, value norms and the two stages of CriticalKV against the loops of `oracles_recon`, on one layer.

What the rows are is the runtime's business: here they are those of the prompt itself. `tests/integration/
test_second_pass.py` looks at the rows of a second pass.
"""

from __future__ import annotations

from dataclasses import replace

import oracles
import oracles_recon
import pytest
import torch
from generators import FLOAT32, samples
from hypothesis import assume, given
from hypothesis import strategies as st
from rows import clear, heads, kept_by, row_of

import kvcomp
from kvcomp.testing import Sample, make_sample, run

RATIO = st.integers(1, 100).map(lambda hundredths: str(hundredths / 100))
PROMPTS = samples(dtypes=FLOAT32, fills=("normal",), most_held=0, most_tokens=24)
RECONSTRUCTION = {"use": "reconstruction", "overlap": 0}


def built(scorer: dict, ratio: str) -> kvcomp.Strategy:
    return kvcomp.strategy({"scorer": scorer, "selector": "top-k", "budget": float(ratio)})


def weights_of(sample: Sample, head: int) -> list[torch.Tensor]:
    group = sample.queries.shape[1] // sample.keys.shape[1]
    return list(sample.output[head * group : (head + 1) * group])


def norms_of(sample: Sample, row: int, head: int, norm: str) -> list[float]:
    values = row_of(sample, row).values[head]
    return [oracles_recon.output_norm(value, weights_of(sample, head), norm) for value in values]


def largest(sample: Sample, row: int, head: int) -> list[float]:
    attention = torch.stack(row_of(sample, row).of(head))  # (group, rows, tokens)
    return [float(attention[..., token].max()) for token in range(attention.shape[2])]


@given(sample=PROMPTS, ratio=RATIO)
def test_reconstruction_keeps_what_receives_the_largest_attention(sample: Sample, ratio: str) -> None:
    seen = run(built(RECONSTRUCTION | {"sinks": 2}, ratio), sample)
    for row, head in heads(sample):
        scores = largest(sample, row, head)
        slots = oracles.num_slots(ratio, len(scores))
        assume(clear(scores[2:]))
        assert kept_by(seen, row, head) == oracles_recon.kept(scores, slots, sinks=2)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@given(sample=PROMPTS, ratio=RATIO, power=st.sampled_from((0.5, 1.0, 2.0)))
def test_value_norms_weigh_the_attention_of_any_scorer(norm: str, sample: Sample, ratio: str, power: float) -> None:
    seen = run(built({"use": "value-norm", "scorer": RECONSTRUCTION, "power": power, "norm": norm}, ratio), sample)
    for row, head in heads(sample):
        scores = oracles_recon.weighed(largest(sample, row, head), norms_of(sample, row, head, norm), power)
        valid = sample.valid[row, head]
        expected = torch.tensor(scores).double()
        torch.testing.assert_close(seen.scores.values[row, head, valid].double(), expected, rtol=1e-4, atol=1e-6)
        assume(clear(scores))
        assert kept_by(seen, row, head) == oracles_recon.kept(scores, oracles.num_slots(ratio, len(scores)))


@given(sample=PROMPTS, power=st.sampled_from((0.25, 1.0)))
def test_relative_value_norms_are_shares_of_the_mean_of_their_layer(sample: Sample, power: float) -> None:
    scorer = {"use": "value-norm", "scorer": RECONSTRUCTION, "power": power, "relative": True}
    seen = run(built(scorer, "0.5"), sample)
    for row in range(sample.keys.shape[0]):
        norms = [norms_of(sample, row, head, "l2") for head in range(sample.keys.shape[1])]
        mean = sum(map(sum, norms)) / sum(map(len, norms))
        for head, own in enumerate(norms):
            scores = oracles_recon.weighed(largest(sample, row, head), [norm / mean for norm in own], power)
            found = seen.scores.values[row, head, sample.valid[row, head]].double()
            torch.testing.assert_close(found, torch.tensor(scores).double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@given(sample=PROMPTS, ratio=RATIO, first=st.sampled_from((0.0, 0.5, 0.8, 1.0)))
def test_critical_chooses_by_attention_and_then_by_what_would_be_missed(
    norm: str, sample: Sample, ratio: str, first: float
) -> None:
    window = {"use": "window-attention", "window": 8, "kernel": 1}
    seen = run(built({"use": "critical", "scorer": window, "first": first, "norm": norm}, ratio), sample)
    for row, head in heads(sample):
        attention = row_of(sample, row).of(head)
        tokens = attention[0].shape[1]
        slots = oracles.num_slots(ratio, tokens)
        kept = min(8, slots // 2)
        votes = oracles.snapkv_scores(attention, slots, window=8, kernel=1)
        norms = norms_of(sample, row, head, norm)
        scores = votes + [0.0] * kept
        product = [(received + 1e-4) * norm for received, norm in zip(votes, norms, strict=False)]
        assume(clear(votes) and clear(product))
        expected = oracles_recon.critical_kept(scores, norms, slots, kept, first)
        assert kept_by(seen, row, head) == expected


@pytest.mark.parametrize("fill", ["zero", "equal"])
@pytest.mark.parametrize("scorer", ["value-norm", "critical"])
def test_values_without_a_norm_leave_the_earlier_tokens(scorer: str, fill: str) -> None:
    sample = make_sample(0, (20,), fill=fill)
    inner = {"use": "window-attention", "window": 4, "kernel": 1}
    seen = run(built({"use": scorer, "scorer": inner}, "0.4"), sample)
    if fill == "zero":
        assert seen.compressed.indices[0, 0].tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    assert seen.scores.values.isfinite().all()


def test_one_token_stays() -> None:
    for scorer in ("reconstruction", "value-norm", "critical"):
        seen = run(built({"use": scorer}, "0.2"), make_sample(0, (1,)))
        assert seen.compressed.indices.flatten().tolist() == [0, 0]


def test_a_scorer_inside_must_measure_attention() -> None:
    with pytest.raises(kvcomp.ConfigError) as caught:
        built({"use": "value-norm", "scorer": "position", "power": 3.0}, "0.2")
    message = str(caught.value)
    assert "scorer.scorer: must be a scorer that measures attention, and 'position' does not" in message
    assert "scorer.power: must be in (0, 2], got 3.0" in message


def test_a_model_without_a_known_output_projection_is_refused() -> None:
    sample = replace(make_sample(0, (12,)), output=None)
    with pytest.raises(kvcomp.UnsupportedUseError, match="'value-norm' needs the output projection of attention"):
        run(built({"use": "value-norm"}, "0.5"), sample)


def test_token_ids_are_a_list_in_a_file() -> None:
    strategy = built(RECONSTRUCTION | {"instruction": [7, 8]}, "0.2")
    assert strategy.scorer.instruction == (7, 8)
    assert strategy.dump()["scorer"]["instruction"] == [7, 8]
    assert kvcomp.strategy(strategy.dump()) == strategy
