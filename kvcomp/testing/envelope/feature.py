"""A feature of the envelope: a name, what it promises, and a function that raises where the promise breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvcomp.testing.envelope.bench import Bench

Trial = Callable[[Bench], None]


@dataclass(frozen=True)
class Feature:
    """One row of the envelope.

    Attributes:
        name: a stable identifier.
        promise: what holds where the cell is green, in one sentence.
        trial: returns where the promise is kept, raises `ConformanceError` where it is broken and `NotClaimedError`
            where it is not made.
        quick: whether it is among the few that `--quick` runs.
    """

    name: str
    promise: str
    trial: Trial
    quick: bool


def feature(name: str, *, quick: bool = False) -> Callable[[Trial], Feature]:
    """Return a decorator that makes a feature of a function; the first line of its docstring is the promise."""
    return lambda trial: Feature(name, (trial.__doc__ or "").strip().partition("\n")[0], trial, quick)
