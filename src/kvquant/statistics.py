"""Intervals and tests for paired measurements: the same documents, windows or questions under two treatments.

The unit is the item (a document, a window, a question), never the token: tokens of one text err together. A per-token
mean over items is a ratio of sums, sum(x) / sum(n), which the items are resampled for together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

SMALL = 20  # items below which an interval rests on Student's t, since a bootstrap of so few is too narrow
_RESAMPLES = 4999
Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: the point estimate.
        low: lower end; minus infinity where n is 1.
        high: upper end.
        n: items it rests on.
        method: ``t`` or ``bootstrap`` (or ``exact``, for shares).
        confidence: 0.95 unless asked for otherwise.
    """

    estimate: float
    low: float
    high: float
    n: int
    method: str
    confidence: float = 0.95

    def within(self, margin: float) -> bool:
        """Whether the whole interval lies within plus and minus ``margin``."""
        return -margin < self.low and self.high < margin

    def text(self, digits: int = 4) -> str:
        """``estimate [low, high]``, a fixed number of digits."""
        return f"{self.estimate:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """The result of two one-sided tests: p is the larger of the two."""

    interval: Interval
    margin: float
    p: float

    @property
    def holds(self) -> bool:
        """Whether the difference is shown to be smaller than the margin: the interval lies within it."""
        return self.interval.within(self.margin)


def blocks_of(items: ArrayLike, size: int) -> Floats:
    """Sum neighbouring items in blocks of ``size``, for windows of one text that are not independent; [ceil(n/size)]."""
    x = np.asarray(items, dtype=np.float64)
    return np.add.reduceat(x, np.arange(0, len(x), size))


def mean_interval(sums: ArrayLike, counts: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Interval of sum(sums) / sum(counts), for example of a loss difference per token.

    Args:
        sums: of each item, such as the difference of two summed losses, [n].
        counts: tokens of each item, [n].
        confidence: of the interval.
    """
    return ratio_interval(sums, counts, confidence=confidence)


def ratio_interval(above: ArrayLike, below: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Interval of sum(above) / sum(below), both measured on the same items.

    Under 20 items Student's t on the linearised ratio (Cochran, Sampling Techniques, 1977, section 6.4); from 20 on
    the bias-corrected and accelerated bootstrap over items (Efron 1987). The draws are fixed: a table does not change
    from one reading to the next.

    Args:
        above: [n].
        below: [n], with a sum other than 0.
        confidence: of the interval.

    Raises:
        ValueError: no item, or not as many below as above.
    """
    a, b = _paired(above, below)
    estimate = float(a.sum() / b.sum())
    residual = a - estimate * b
    # Without any spread (nothing differs, or all by the same) every resample is the estimate itself.
    if np.allclose(residual, 0, atol=1e-15 * max(1.0, float(np.abs(a).max()))):
        if len(a) == 1:
            return Interval(estimate, -np.inf, np.inf, 1, "t", confidence)
        return Interval(estimate, estimate, estimate, len(a), _method(len(a)), confidence)
    if len(a) < SMALL:
        half = float(stats.t.ppf(0.5 + confidence / 2, len(a) - 1)) * _standard_error(residual, b)
        return Interval(estimate, estimate - half, estimate + half, len(a), "t", confidence)

    def ratio(x: Floats, y: Floats, axis: int = -1) -> Floats:
        return np.asarray(x.sum(axis) / y.sum(axis))

    found = stats.bootstrap(
        (a, b),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(estimate, float(found.low), float(found.high), len(a), "bootstrap", confidence)


def difference_test(sums: ArrayLike, counts: ArrayLike, *, against: float = 0.0) -> float:
    """Two-sided p of sum(sums) / sum(counts) being ``against``: t on the linearised ratio; 1 when nothing varies."""
    a, b = _paired(sums, counts)
    estimate = float(a.sum() / b.sum())
    error = _standard_error(a - estimate * b, b) if len(a) > 1 else np.inf
    if error == 0:
        return 1.0 if estimate == against else 0.0
    return float(2 * stats.t.sf(abs(estimate - against) / error, max(1, len(a) - 1)))


def equivalence(
    sums: ArrayLike, counts: ArrayLike, margin: float, *, confidence: float = 0.95
) -> Equivalence:
    """Two one-sided tests (Schuirmann 1987) that a mean difference per token is within plus and minus ``margin``.

    Args:
        sums: summed difference of each item, [n].
        counts: tokens of each item, [n].
        margin: what counts as equal, above 0.
        confidence: of the interval that must lie within; 0.95 is stricter than the usual 0.90 of the two tests.
    """
    a, b = _paired(sums, counts)
    interval = mean_interval(a, b, confidence=confidence)
    above = _one_sided(a, b, -margin, +1)
    below = _one_sided(a, b, margin, -1)
    return Equivalence(interval, margin, max(above, below))


def _one_sided(a: Floats, b: Floats, bound: float, sign: int) -> float:
    estimate = float(a.sum() / b.sum())
    if len(a) < 2:
        return 1.0
    error = _standard_error(a - estimate * b, b)
    distance = sign * (estimate - bound)
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stats.t.sf(distance / error, len(a) - 1))


def sign_test(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided sign test of paired successes (McNemar's exact form): p; 1 when no pair differs.

    Raises:
        ValueError: not as many in both.
    """
    a, b = _paired(np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64))
    wins, losses = int((a > b).sum()), int((a < b).sum())
    return 1.0 if wins + losses == 0 else float(stats.binomtest(wins, wins + losses).pvalue)


def share_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Clopper-Pearson interval of a share of successes: exact, also at 0 and at n."""
    found = stats.binomtest(successes, n).proportion_ci(confidence_level=confidence, method="exact")
    return Interval(successes / n, float(found.low), float(found.high), n, "exact", confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p values of one table so that the chance of any false claim in it stays below alpha (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return [float(p) for p in adjusted]


def _standard_error(residual: Floats, below: Floats) -> float:
    n = len(residual)
    return float(np.sqrt(n / (n - 1) * np.square(residual).sum()) / abs(below.sum()))


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"paired items must be two equally long lists, got {a.shape} and {b.shape}")
    return a, b


def _method(n: int) -> str:
    return "t" if n < SMALL else "bootstrap"
