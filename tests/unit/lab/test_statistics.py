"""The interval and the means, against values worked out by hand."""

import math

import pytest

from kvcomp.core.errors import InputError
from kvcomp.lab.statistics import Z95, mean, wilson


def test_no_success_in_ten_gives_z_squared_over_n_plus_z_squared():
    low, high = wilson(0, 10)
    assert low == 0.0
    assert high == pytest.approx(Z95**2 / (10 + Z95**2), abs=1e-12)  # 0.2775


def test_half_of_four_is_symmetric_and_follows_the_formula():
    low, high = wilson(2, 4)
    half = Z95 / (1 + Z95**2 / 4) * math.sqrt(0.25 / 4 + Z95**2 / 64)
    assert (low, high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert (round(low, 4), round(high, 4)) == (0.15, 0.85)


@pytest.mark.parametrize("trials", [1, 10, 30, 300])
def test_the_interval_holds_the_share_at_both_ends(trials):
    for successes in (0, trials):
        low, high = wilson(successes, trials)
        assert 0 <= low <= successes / trials <= high <= 1


def test_more_trials_make_it_narrower():
    widths = [high - low for low, high in (wilson(n // 2, n) for n in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 4), (5, 4)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(InputError, match=f"successes={successes}, trials={trials}"):
        wilson(successes, trials)


def test_a_mean_leaves_out_what_was_not_measured():
    assert mean([1.0, None, 2.0]) == 1.5
    assert mean([]) is None
