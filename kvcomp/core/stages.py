"""Which stage of a compression takes how long, measured only while somebody looks.

    with watching() as watch:
        model(**inputs, past_key_values=cache)
    watch.seconds["match"]

While nobody does, a stage costs one look at a context variable per layer and compression.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, ParamSpec, TypeVar, get_args

Stage = Literal["observe", "score", "select", "match", "merge", "store"]
STAGES: tuple[Stage, ...] = get_args(Stage)

P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch:
    """Seconds of every stage. A stage inside another counts for the inner one alone.

    Args:
        clock: returns seconds; on a device that works on its own it must wait for it first.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self._clock = clock
        self._open: list[Stage] = []
        self._since = 0.0

    def enter(self, stage: Stage) -> None:
        """Count for this stage from now on."""
        self._settle()
        self._open.append(stage)

    def leave(self) -> None:
        """Count for the stage around the current one again."""
        self._settle()
        self._open.pop()

    def _settle(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


_watch: ContextVar[Stopwatch | None] = ContextVar("kvcomp_stopwatch", default=None)


@contextmanager
def watching(clock: Callable[[], float] = time.perf_counter) -> Iterator[Stopwatch]:
    """Give a stopwatch that counts what this thread compresses in the block."""
    token = _watch.set(Stopwatch(clock))
    watch = _watch.get()
    assert watch is not None
    try:
        yield watch
    finally:
        _watch.reset(token)


def stage(name: Stage) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator: what the function does is this stage of a compression."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            watch = _watch.get()
            if watch is None:
                return function(*args, **kwargs)
            watch.enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                watch.leave()

        return watched

    return decorate
