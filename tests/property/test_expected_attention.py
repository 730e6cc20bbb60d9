"""Expected attention against the loops of `oracles_expected`, on one layer."""

from __future__ import annotations

import oracles
import oracles_expected
import oracles_recon
import pytest
import torch
from generators import FLOAT32, samples
from hypothesis import assume, given
from hypothesis import strategies as st
from rows import clear, heads, kept_by, row_of
from torch import Tensor

import kvcomp
from kvcomp.testing import Sample, make_sample, run

RATIO = st.integers(1, 100).map(lambda hundredths: str(hundredths / 100))
PROMPTS = samples(dtypes=FLOAT32, fills=("normal",), most_held=0, most_tokens=24)
POSITIONS = 16
SETTINGS = {
    "default": {},
    "mean alone": {"covariance": False},
    "no norm": {"value_norm": False},
    "epsilon, no sinks": {"epsilon": 0.01, "sinks": 0},
}


def built(ratio: str, **settings: object) -> kvcomp.Strategy:
    scorer = {"use": "expected-attention", "positions": POSITIONS, **settings}
    return kvcomp.strategy({"scorer": scorer, "selector": "top-k", "budget": float(ratio)})


def scores_of(sample: Sample, row: int, head: int, **settings: object) -> list[float]:
    alone = sample.alone(row)
    tokens, dim = alone.keys.shape[2:]
    pairs = max(1, dim // 2 - 1)  # as kvcomp.testing rotates: the last two coordinates stay

    def angles(position: int) -> list[float]:
        return [position * 1e4 ** -(pair / pairs) for pair in range(pairs)]

    back = [oracles_expected.rotation(angles(token), dim).T for token in range(tokens)]
    turn = sum(oracles_expected.rotation(angles(tokens + ahead), dim) for ahead in range(POSITIONS)) / POSITIONS
    group = alone.queries.shape[1] // alone.keys.shape[1]
    queries = [
        torch.stack([back[token] @ alone.queries[0, one, token].double() for token in range(tokens)])
        for one in range(head * group, (head + 1) * group)
    ]
    keys, values = alone.keys[0, head], alone.values[0, head]
    assert isinstance(turn, Tensor)
    return oracles_expected.expected_scores(queries, keys, values, turn, dim**-0.5, **settings)


@pytest.mark.parametrize("settings", SETTINGS)
@given(sample=PROMPTS, ratio=RATIO)
def test_tokens_that_later_queries_are_expected_to_look_at_stay(settings: str, sample: Sample, ratio: str) -> None:
    given_settings = SETTINGS[settings]
    sinks = given_settings.get("sinks", 4)
    seen = run(built(ratio, **given_settings), sample)
    for row, head in heads(sample):
        assume(len(row_of(sample, row).modality) > sinks + 1)
        scores = scores_of(sample, row, head, **given_settings)
        found = seen.scores.values[row, head, sample.valid[row, head]]
        torch.testing.assert_close(found[sinks:].double(), torch.tensor(scores[sinks:]).double(), rtol=2e-3, atol=1e-5)
        assume(clear(scores[sinks:]))
        slots = oracles.num_slots(ratio, len(scores))
        assert kept_by(seen, row, head) == oracles_recon.kept(scores, slots, sinks=sinks)


@pytest.mark.parametrize("fill", ["zero", "equal", "extreme", "mixed"])
@pytest.mark.parametrize("tokens", [1, 3, 5, 20])
def test_any_vectors_give_finite_scores(tokens: int, fill: str) -> None:
    seen = run(built("0.4"), make_sample(0, (tokens,), fill=fill))
    assert seen.scores.values.isfinite().all()
    assert (seen.scores.values >= 0).all()
