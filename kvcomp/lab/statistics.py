"""Small statistics of experiments: intervals, tests of paired results, and means that know what was not measured.

Paired results come as differences, one per sample, in groups: a group is a task, and what is estimated is the
unweighted mean over the groups of their means. One group is the plain mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvcomp.core.errors import InputError

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
DRAWS = 10_000
TIE = 1e-9  # sums of the same numbers in another order count as equal
Groups = Sequence[Sequence[float]]


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


def mean_of_means(groups: Groups) -> float:
    """Return the unweighted mean over the groups of their means.

    >>> mean_of_means([[1.0, 0.0], [1.0, 1.0, 1.0]])
    0.75
    """
    _check_groups(groups)
    return math.fsum(math.fsum(group) / len(group) for group in groups) / len(groups)


def bootstrap(groups: Groups, share: float = 0.95, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of the mean of means (Efron and Tibshirani 1993, section 13.3).

    Samples are drawn with replacement inside their group; for paired results this is the paired bootstrap, since a
    difference stays whole.

    Args:
        groups: differences, or values, by group.
        share: of the resampled means that lie inside.
        draws: how many times all groups are resampled.
        seed: the same seed and groups give the same interval.

    Raises:
        InputError: there is no group, or an empty one.
    """
    _check_groups(groups)
    generator = np.random.default_rng(seed)
    means = sum(_resampled_means(group, draws, generator) for group in groups) / len(groups)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the two-sided p-value of the exact McNemar test: the binomial test of the discordant pairs.

    It is exact for any count; the chi-square approximation is nowhere used.

    Args:
        first_only: pairs in which the first is right and the second wrong.
        second_only: pairs in which the second is right and the first wrong.

    Raises:
        InputError: a count is negative.

    >>> round(mcnemar(1, 9), 6), mcnemar(0, 0)
    (0.021484, 1.0)
    """
    if first_only < 0 or second_only < 0:
        raise InputError(f"counts of pairs must not be negative, got {first_only=}, {second_only=}")
    pairs, fewer = first_only + second_only, min(first_only, second_only)
    tail, ways = 0, 1
    for count in range(fewer + 1):
        tail += ways
        ways = ways * (pairs - count) // (count + 1)
    return min(1.0, 2 * tail / (1 << pairs))  # exact integers: nothing overflows before the division


def sign_flip(groups: Groups, draws: int = DRAWS, seed: int = 0) -> float:
    """Return the two-sided p-value of the paired permutation test: how often the mean of means is as far from 0 if the
    sign of every difference is drawn anew.

    Signs are drawn at random, and the observed signs count as one draw (Phipson and Smyth 2010), so the value is never
    0. Differences of right and wrong answers in one group are the case that `mcnemar` solves exactly.

    Raises:
        InputError: there is no group, or an empty one.
    """
    _check_groups(groups)
    generator = np.random.default_rng(seed)
    flipped = sum(_flipped_means(group, draws, generator) for group in groups) / len(groups)
    observed = abs(mean_of_means(groups))
    extreme = int((np.abs(flipped) >= observed - TIE).sum())
    return (extreme + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the order given: those below alpha can be believed
    together, with a chance of at most alpha that any of them is wrong.

    >>> [round(value, 6) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def _check_groups(groups: Groups) -> None:
    if not groups or not all(groups):
        raise InputError(f"every group needs at least one value, and there must be a group; got sizes {_sizes(groups)}")


def _sizes(groups: Groups) -> list[int]:
    return [len(group) for group in groups]


def _resampled_means(group: Sequence[float], draws: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return the mean of each resample: how often each distinct value comes is multinomial."""
    values, counts = np.unique(np.asarray(group, dtype=np.float64), return_counts=True)
    times = generator.multinomial(len(group), counts / len(group), size=draws)
    means: NDArray[np.float64] = times @ values / len(group)
    return means


def _flipped_means(group: Sequence[float], draws: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return the mean of each draw of signs: how many of each distinct size stay positive is binomial."""
    sizes, counts = np.unique(np.abs(np.asarray(group, dtype=np.float64)), return_counts=True)
    positive = generator.binomial(counts, 0.5, size=(draws, len(counts)))
    means: NDArray[np.float64] = (2 * positive - counts) @ sizes / len(group)
    return means
