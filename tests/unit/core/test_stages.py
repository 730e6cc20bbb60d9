"""The stopwatch of the stages: who is charged, and that nobody looks at a clock unasked."""

from __future__ import annotations

import threading

import pytest
import torch
from models import text_inputs, tiny_llama

import kvcomp
from kvcomp.core.stages import STAGES, stage, watching


class Clock:
    """Goes on by one whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@stage("score")
def inner() -> str:
    return "seen"


@stage("select")
def outer() -> str:
    return inner() + inner()


def test_a_stage_inside_another_counts_for_itself_alone():
    clock = Clock()
    with watching(clock) as watch:
        assert outer() == "seenseen"
    assert watch.seconds == dict.fromkeys(STAGES, 0.0) | {"select": 3.0, "score": 2.0}
    assert clock.now == 6.0


def test_nobody_looks_at_the_clock_unless_somebody_watches():
    clock = Clock()
    with watching(clock):
        pass
    assert outer() == "seenseen"
    assert clock.now == 0.0


def test_a_stage_that_fails_is_left():
    @stage("match")
    def broken() -> None:
        raise ValueError("no match")

    with watching(Clock()) as watch:
        with pytest.raises(ValueError, match="no match"):
            broken()
        inner()
    assert (watch.seconds["match"], watch.seconds["score"]) == (1.0, 1.0)


def test_another_thread_is_not_watched():
    with watching(Clock()) as watch:
        thread = threading.Thread(target=outer)
        thread.start()
        thread.join()
    assert sum(watch.seconds.values()) == 0.0


@pytest.mark.parametrize(("recipe", "budget", "expected"), [("flowmm", 0.5, set(STAGES)), ("full", 1.0, set())])
def test_every_stage_of_a_compression_is_counted(recipe, budget, expected):
    model = tiny_llama()
    with torch.inference_mode(), kvcomp.compress(model, recipe, budget) as cache, watching() as watch:
        model(**text_inputs(40), past_key_values=cache)
    assert {name for name, seconds in watch.seconds.items() if seconds} == expected
    assert sum(watch.seconds.values()) <= cache.report().seconds * 1.5 + 0.01
