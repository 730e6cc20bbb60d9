"""Intervals, tests and means, against values worked out by hand and against naive enumerations."""

import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomp.core.errors import InputError
from kvcomp.lab.statistics import Z95, bootstrap, holm, mcnemar, mean, mean_of_means, sign_flip, wilson


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


# --- paired results ---


def all_resampled_means(groups):
    """Return every mean of means of a resample and its probability, by listing all of them."""
    found = Counter()
    for drawn in itertools.product(*(itertools.product(group, repeat=len(group)) for group in groups)):
        found[round(sum(sum(group) / len(group) for group in drawn) / len(drawn), 12)] += 1
    total = sum(found.values())
    return {value: count / total for value, count in found.items()}


@pytest.mark.parametrize("groups", [[[1.0, 0.0, 0.0, -1.0, 1.0]], [[0.3, 0.7, 0.7], [1.0, -1.0, 0.5]]])
def test_the_bootstrap_interval_is_that_of_all_resamples(groups):
    exact = all_resampled_means(groups)
    for share in (0.5, 0.9):
        low, high = bootstrap(groups, share)
        below = sum(chance for value, chance in exact.items() if value < low - 1e-9)
        above = sum(chance for value, chance in exact.items() if value > high + 1e-9)
        assert below <= (1 - share) / 2 + 0.015  # 10,000 draws of a share: standard error below 0.005
        assert above <= (1 - share) / 2 + 0.015
        inside = sum(chance for value, chance in exact.items() if low + 1e-9 < value < high - 1e-9)
        assert inside <= share + 0.015


def test_the_bootstrap_of_many_samples_nears_the_normal_interval():
    draw = random.Random(0)
    values = [draw.gauss(1.0, 2.0) for _ in range(2000)]
    centre = sum(values) / 2000
    half = Z95 * math.sqrt(sum((value - centre) ** 2 for value in values)) / 2000
    assert bootstrap([values]) == (pytest.approx(centre - half, abs=0.01), pytest.approx(centre + half, abs=0.01))


def test_equal_differences_leave_no_interval_and_the_seed_decides():
    assert bootstrap([[0.25] * 4, [0.75]]) == (pytest.approx(0.5), pytest.approx(0.5))
    spread = [[0.1 * place**2 for place in range(30)]]
    assert bootstrap(spread, seed=3) == bootstrap(spread, seed=3)
    assert bootstrap(spread, seed=3) != bootstrap(spread, seed=4)


def naive_binomial(first_only, second_only):
    """Return the two-sided binomial test by listing every way in which the pairs could have fallen."""
    pairs = first_only + second_only
    distance = abs(first_only - second_only)
    ways = [abs(pairs - 2 * sum(side)) for side in itertools.product((0, 1), repeat=pairs)]
    return sum(way >= distance for way in ways) / len(ways)


@given(st.integers(0, 6), st.integers(0, 6))
def test_mcnemar_is_the_binomial_test_of_discordant_pairs(first_only, second_only):
    assert mcnemar(first_only, second_only) == pytest.approx(naive_binomial(first_only, second_only), abs=1e-12)
    assert mcnemar(first_only, second_only) == mcnemar(second_only, first_only)


def test_mcnemar_of_thousands_of_pairs_nears_the_normal_test():
    statistic = (2100 - 1900 - 1) / math.sqrt(4000)
    assert mcnemar(1900, 2100) == pytest.approx(math.erfc(statistic / math.sqrt(2)), rel=0.01)
    assert mcnemar(0, 5000) == 0.0  # 2 / 2 ** 5000 is below any float
    with pytest.raises(InputError, match="must not be negative, got first_only=-1"):
        mcnemar(-1, 2)


def naive_sign_flip(groups):
    """Return the permutation test by listing every choice of signs."""
    observed = abs(sum(sum(group) / len(group) for group in groups))
    signs = itertools.product(*(itertools.product((1, -1), repeat=len(group)) for group in groups))
    means = [
        abs(
            sum(
                sum(map(float.__mul__, map(float, side), group)) / len(group)
                for side, group in zip(drawn, groups, strict=True)
            )
        )
        for drawn in signs
    ]
    return sum(mean >= observed - 1e-9 for mean in means) / len(means)


@pytest.mark.parametrize(
    "groups",
    [
        [[0.5, 0.25, -0.1, 0.7, 0.3]],
        [[1.0, 1.0, 0.0, 1.0, -1.0, 1.0]],
        [[0.2, 0.4, 0.4], [1.0, -0.5]],
        [[0.0, 0.0]],
    ],
)
def test_sign_flip_is_the_share_of_all_choices_of_signs(groups):
    assert sign_flip(groups) == pytest.approx(naive_sign_flip(groups), abs=0.015)


def test_sign_flip_of_right_and_wrong_is_mcnemar():
    differences = [1.0] * 12 + [-1.0] * 3 + [0.0] * 40
    assert sign_flip([differences]) == pytest.approx(mcnemar(12, 3), abs=0.01)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values, alpha):
    rejected, remaining = set(), sorted(range(len(p_values)), key=p_values.__getitem__)
    while remaining and p_values[remaining[0]] <= alpha / len(remaining):
        rejected.add(remaining.pop(0))
    corrected = holm(p_values)
    sure = [place for place, value in enumerate(corrected) if abs(value - alpha) > 1e-12]  # rounding may go either way
    assert all((corrected[place] <= alpha) == (place in rejected) for place in sure)


def test_groups_weigh_the_same_and_may_not_be_empty():
    assert mean_of_means([[0.0, 0.0, 0.0, 0.0], [1.0]]) == 0.5
    for empty in ([], [[1.0], []]):
        with pytest.raises(InputError, match="every group needs at least one value"):
            bootstrap(empty)
