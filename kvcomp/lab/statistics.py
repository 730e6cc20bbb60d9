"""Small statistics of experiments: an interval for a share, and means that know what was not measured."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kvcomp.core.errors import InputError

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a share, by default at 95 %; it stays inside [0, 1] at either end.

    Raises:
        InputError: there are no trials, or more successes than trials.

    >>> tuple(round(bound, 4) for bound in wilson(8, 10))
    (0.4902, 0.9433)
    """
    if not 0 <= successes <= trials or trials == 0:
        raise InputError(f"a share needs 0 <= successes <= trials and a trial, got {successes=}, {trials=}")
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))  # at 0 and 1 rounding misses it


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of what was measured, None where nothing was.

    >>> mean([0.25, None, 0.75]), mean([None])
    (0.5, None)
    """
    measured = [value for value in values if value is not None]
    return math.fsum(measured) / len(measured) if measured else None
