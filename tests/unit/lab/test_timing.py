"""Timing takes turns, and leaves the model as it was."""

import random

import pytest

from kvcomp.core.errors import BudgetError
from kvcomp.lab import grid
from kvcomp.lab.timing import decode_seconds


def test_every_strategy_gets_one_time_per_token(bed, echo):
    inputs = bed.encode([echo().sample("demo", 0)])
    seconds = decode_seconds(bed.model, inputs, grid(["full", "h2o"], [1.0, 0.2]), 5, random.Random(0))
    assert [len(times) for times in seconds] == [5, 5, 5]
    assert all(time > 0 for times in seconds for time in times)
    assert bed.model.get_decoder().config._attn_implementation == "sdpa"


def test_a_strategy_that_fails_leaves_the_model_as_it_was(bed, echo):
    import kvcomp

    inputs = bed.encode([echo().sample("demo", 0)])
    with pytest.raises(BudgetError, match="below one slot"):
        decode_seconds(bed.model, inputs, [kvcomp.strategy("snapkv", {"bytes": 10})], 2, random.Random(0))
    assert bed.model.get_decoder().config._attn_implementation == "sdpa"
