"""Timing takes turns, and leaves the model as it was."""

import random
import time
from types import SimpleNamespace

import pytest
import torch

import kvcomp
from kvcomp.core.errors import BudgetError
from kvcomp.lab import grid
from kvcomp.lab.threads import torch_threads
from kvcomp.lab.timing import clock_for, decode_seconds


def test_every_strategy_gets_one_time_per_token(bed, echo):
    inputs = bed.encode([echo().sample("demo", 0)])
    seconds = decode_seconds(bed.model, inputs, grid(["full", "h2o"], [1.0, 0.2]), 5, random.Random(0))
    assert [len(times) for times in seconds] == [5, 5, 5]
    assert all(time > 0 for times in seconds for time in times)
    assert bed.model.get_decoder().config._attn_implementation == "sdpa"


def test_a_strategy_that_fails_leaves_the_model_as_it_was(bed, echo):
    inputs = bed.encode([echo().sample("demo", 0)])
    with pytest.raises(BudgetError, match="below one slot"):
        decode_seconds(bed.model, inputs, [kvcomp.strategy("snapkv", {"bytes": 10})], 2, random.Random(0))
    assert bed.model.get_decoder().config._attn_implementation == "sdpa"


def test_one_cpu_thread_is_timed_by_its_own_clock_and_all_else_by_the_wall():
    on_cpu, on_gpu = (SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda"))
    assert clock_for(on_cpu) is time.thread_time
    assert clock_for(on_gpu) is time.perf_counter
    with torch_threads(2):
        assert clock_for(on_cpu) is time.perf_counter
