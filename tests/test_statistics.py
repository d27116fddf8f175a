"""Intervals cover what they claim, tests keep their level, and small cases are those of the textbook."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kvquant.statistics import (
    blocks_of,
    difference_test,
    equivalence,
    holm,
    mean_interval,
    ratio_interval,
    share_interval,
    sign_test,
)


def test_equal_counts_give_the_ordinary_t_interval() -> None:
    x = np.random.default_rng(0).normal(1, 2, 12)
    interval = mean_interval(x * 50, np.full(12, 50))
    expected = stats.ttest_1samp(x, 0).confidence_interval()
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.method == "t" and interval.n == 12
    assert difference_test(x * 50, np.full(12, 50)) == pytest.approx(stats.ttest_1samp(x, 0).pvalue)


@pytest.mark.parametrize("n", [8, 30])
def test_intervals_cover_the_truth_about_as_often_as_they_say(n: int) -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        counts = rng.integers(50, 200, n)
        below = rng.gamma(4, 1, n) * counts
        above = 0.5 * below + rng.normal(0, 0.3, n) * counts
        interval = ratio_interval(above, below)
        hits += interval.low <= 0.5 <= interval.high
    assert 0.90 <= hits / 200 <= 0.99


def test_from_twenty_items_on_they_are_resampled_and_the_draws_are_fixed() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(1, 1, 20), np.ones(20)
    assert ratio_interval(a, b).method == "bootstrap" and ratio_interval(a[:19], b[:19]).method == "t"
    assert ratio_interval(a, b) == ratio_interval(a, b)


def test_one_item_says_nothing_and_no_spread_says_all() -> None:
    assert mean_interval([3.0], [1.0]).low == -np.inf
    assert mean_interval([0.0] * 25, [10] * 25).high == 0


def test_equivalence_needs_the_whole_interval_within_the_margin() -> None:
    rng = np.random.default_rng(3)
    close, counts = rng.normal(0.0002, 0.0005, 30) * 100, np.full(30, 100)
    assert equivalence(close, counts, 0.002).holds and equivalence(close, counts, 0.002).p < 0.025
    far = close + 0.0019 * 100
    assert not equivalence(far, counts, 0.002).holds
    noisy = rng.normal(0, 0.01, 30) * 100
    assert not equivalence(noisy, counts, 0.002).holds, "no difference seen is not equality shown"
    assert equivalence([0.1], [100], 0.002).p == 1


def test_two_one_sided_tests_agree_with_scipy() -> None:
    x = np.random.default_rng(4).normal(0.1, 1, 15)
    p = equivalence(x, np.ones(15), 0.5).p
    expected = max(
        stats.ttest_1samp(x, -0.5, alternative="greater").pvalue,
        stats.ttest_1samp(x, 0.5, alternative="less").pvalue,
    )
    assert p == pytest.approx(expected)


def test_sign_test_counts_discordant_pairs_alone() -> None:
    assert sign_test([True] * 10, [True] * 10) == 1
    assert sign_test([True] * 6 + [True] * 20, [False] * 6 + [True] * 20) == pytest.approx(2 / 2**6)


def test_share_interval_is_exact_at_the_ends() -> None:
    assert share_interval(20, 20).high == 1 and share_interval(20, 20).low == pytest.approx(0.025 ** (1 / 20))


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_blocks_add_neighbours_up() -> None:
    assert blocks_of([1, 2, 3, 4, 5], 2).tolist() == [3, 7, 5]


def test_unpaired_items_are_refused() -> None:
    with pytest.raises(ValueError, match="two equally long lists"):
        ratio_interval([1, 2], [1])
