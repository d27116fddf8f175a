"""What repeated windows say: spread, the ratio of two methods with its interval, and a line through a known load."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

# Student's t needs scipy, which is imported where it is used: it is heavy.
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its 95% confidence interval over n observations."""

    value: float
    low: float
    high: float
    n: int


def _t(degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, degrees))


def coefficient_of_variation(values: Sequence[float]) -> float | None:
    """Standard deviation over mean; None for fewer than two values."""
    return statistics.stdev(values) / statistics.mean(values) if len(values) > 1 else None


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Mean with Student's interval; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = statistics.mean(values)
    half = _t(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Interval | None:
    """Geometric mean of the pairs' ratios, with Student's interval on their logarithms.

    Pairs cancel what both windows share: temperature, clocks, drift.

    Args:
        numerators: one value per round.
        denominators: the other method's value of the same round.
    """
    logs = mean_interval([math.log(a / b) for a, b in zip(numerators, denominators, strict=True)])
    if logs is None:
        return None
    return Interval(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high), logs.n)


@dataclasses.dataclass(frozen=True)
class Line:
    """Least squares y = intercept + slope * x.

    Attributes:
        intercept: with its interval.
        slope: with its interval.
        max_residual_percent: the largest distance of a point from the line, in percent of the line there.
    """

    intercept: Interval
    slope: Interval
    max_residual_percent: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fit a line, with Student's intervals of both coefficients.

    Raises:
        ValueError: fewer than three points, or all at one x.
    """
    n = len(x)
    if n < 3 or len(set(x)) < 2:
        raise ValueError(f"a line needs 3 points at 2 places, got {n} at {len(set(x))}; measure more loads")
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    sxx = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sxx
    intercept = mean_y - slope * mean_x
    residuals = [b - (intercept + slope * a) for a, b in zip(x, y, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals) / (n - 2))
    half_slope = _t(n - 2) * error / math.sqrt(sxx)
    half_intercept = _t(n - 2) * error * math.sqrt(1 / n + mean_x**2 / sxx)
    return Line(
        Interval(intercept, intercept - half_intercept, intercept + half_intercept, n),
        Interval(slope, slope - half_slope, slope + half_slope, n),
        max(100 * abs(r) / abs(intercept + slope * a) for a, r in zip(x, residuals, strict=True)),
    )
