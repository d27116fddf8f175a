"""Joules from recorded readings: counters that wrap, stall, jump or reset, and power that was polled.

Pure functions over a list of samples, so that live readings and recorded ones take the same path.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kvquant.errors import CounterJumped, CounterReset, CounterStalled, ReadingLate

# What a reading of a power field is the mean of, seconds before it (nvml.h on NVML_FI_DEV_POWER_AVERAGE); a field
# that is not here is a single look.
AVERAGED_S = {"average": 1.0}
# A window shorter than so many of them has too little of its own in such a field.
MIN_MEANS = 3


@dataclasses.dataclass(frozen=True)
class Sample:
    """One reading of a device.

    Attributes:
        time_s: when, on the sampler's clock.
        counter_j: the running total as the device shows it, joules.
        power_w: power by field, watts: ``instant``, or ``average`` over the device's own last second.
        state: clocks, temperature, slowdowns, if they were read this time.
    """

    time_s: float
    counter_j: float | None = None
    power_w: Mapping[str, float] = dataclasses.field(default_factory=dict)
    state: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class CounterLimits:
    """What a counter can do.

    Attributes:
        tick_s: the longest time between two changes of a healthy counter, seconds.
        max_power_w: more than the device can ever draw, watts.
        range_j: where the counter starts again at zero, joules; None: it never does.
    """

    tick_s: float
    max_power_w: float
    range_j: float | None = None

    @property
    def stall_s(self) -> float:
        """Standing still for this long is a stall: ten ticks, and no less than a second."""
        return max(1.0, 10 * self.tick_s)

    def late_s(self, duration_s: float) -> float:
        """The nearest reading may be this far from an edge: two ticks, or 0.5% of a long window."""
        return max(2 * self.tick_s, 0.05, 0.005 * duration_s)


def unwrapped(samples: Sequence[Sample], limits: CounterLimits) -> list[tuple[float, float]]:
    """Return (time_s, joules since the first sample), with wraps undone.

    Raises:
        CounterReset: the counter fell, and a wrap cannot explain it.
        CounterJumped: it rose faster than ``max_power_w``.
    """
    points = [(s.time_s, s.counter_j) for s in samples if s.counter_j is not None]
    if not points:
        return []
    out, total = [(points[0][0], 0.0)], 0.0
    for (t0, before), (t1, now) in itertools.pairwise(points):
        fell = now < before
        step = now - before
        if fell and limits.range_j is not None:
            step += limits.range_j
        # A late reading brings the joules of several ticks at once: they belong to the time since the one before.
        most = limits.max_power_w * (t1 - t0 + 2 * limits.tick_s)
        if fell and not 0 <= step <= most:
            raise CounterReset(
                f"the energy counter must not fall, got {now:.6g} J after {before:.6g} J; measure this window again"
            )
        if step > most:
            raise CounterJumped(
                f"the energy counter must rise by at most {limits.max_power_w:.0f} W, got {step:.6g} J in "
                f"{t1 - t0:.3f} s; measure this window again"
            )
        total += step
        out.append((t1, total))
    return out


def _ticks(points: Sequence[tuple[float, float]], tick_s: float) -> list[tuple[float, float]]:
    """When the total changed: halfway between the reading before and the one that saw it, but within a tick of that.

    A tick between readings far apart is taken from the next one, if that was seen more closely: one tick before it.
    The first point stands for a tick that nobody saw.
    """
    seen: list[tuple[float, float]] = []
    next_s, next_doubt_s = math.inf, math.inf
    for (t0, y0), (t1, y1) in itertools.pairwise(reversed(points)):
        if y0 == y1:
            continue
        # Backwards in time: t0 saw the change, t1 is the reading before it.
        doubt_s = min(t0 - t1, tick_s)
        at_s = t0 - doubt_s / 2
        if next_doubt_s < doubt_s and abs(next_s - tick_s - at_s) <= doubt_s / 2:
            at_s, doubt_s = next_s - tick_s, next_doubt_s
        seen.append((at_s, y0))
        next_s, next_doubt_s = at_s, doubt_s
    return [points[0], *reversed(seen)]


def observed_tick_s(samples: Sequence[Sample]) -> float | None:
    """Median seconds between two changes of the counter; None when it changes faster than it was read, or hardly."""
    points = [(s.time_s, s.counter_j) for s in samples if s.counter_j is not None]
    times = [b[0] for a, b in itertools.pairwise(points) if a[1] != b[1]]
    repeated = len(points) - 1 - len(times)
    # Where (almost) every reading is new, the time between changes is that between readings.
    if len(times) < 3 or repeated < len(times) / 4:
        return None
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def counter_energy(
    samples: Sequence[Sample],
    start_s: float,
    end_s: float,
    limits: CounterLimits,
    tick_s: float | None = None,
) -> float:
    """Joules between two times, the counter taken as linear between its ticks.

    Of a window of many ticks the parts beyond the first and the last are charged at the mean power between those.

    Args:
        samples: in order of time, from before the start to after the end.
        start_s: first edge, on the samples' clock.
        end_s: last edge.
        limits: what the counter can do.
        tick_s: how often it really changes; None: as seldom as it may.

    Raises:
        CounterReset, CounterJumped: see :func:`unwrapped`.
        CounterStalled: it stood still for ``limits.stall_s``.
        ReadingLate: no readings near an edge.
    """
    points = unwrapped(samples, limits)
    if len(points) < 2:
        raise ReadingLate(
            f"a window needs 2 readings of the energy counter, got {len(points)}; lengthen the window"
        )
    since_s, at_j = points[0]
    for now_s, now_j in points[1:]:
        if now_j != at_j:
            since_s, at_j = now_s, now_j
        # Readings in between prove that it stood still; a gap without any proves nothing.
        elif now_s - since_s > limits.stall_s:
            raise CounterStalled(
                f"the energy counter must move within {limits.stall_s:.1f} s, got none for {now_s - since_s:.1f} s; "
                "measure again, or choose another energy.meter"
            )
    late_s = limits.late_s(end_s - start_s)
    for name, edge_s in (("start", start_s), ("end", end_s)):
        gap_s = min(abs(time_s - edge_s) for time_s, _ in points)
        if gap_s > late_s:
            raise ReadingLate(
                f"readings of the energy counter must lie within {late_s:.3f} s of a window's {name}, got "
                f"{gap_s:.3f} s; lengthen the window or free a processor core"
            )
    ticks = _ticks(points, min(tick_s or limits.tick_s, limits.tick_s))
    seen = [(t, y) for t, y in ticks[1:] if start_s - 0.1 * limits.tick_s <= t <= end_s]
    if len(seen) > 1:
        (t0, y0), (t1, y1) = seen[0], seen[-1]
        if max(t0 - start_s, end_s - t1) <= 2 * limits.tick_s < (t1 - t0) / 2:
            # The ticks around an edge hold work and idle alike; the window's own mean power has work alone.
            return (y1 - y0) * (end_s - start_s) / (t1 - t0)
    return _at(ticks, end_s) - _at(ticks, start_s)


def _at(ticks: Sequence[tuple[float, float]], time_s: float) -> float:
    """Linear between ticks, constant beyond them."""
    if time_s <= ticks[0][0]:
        return ticks[0][1]
    for (t0, y0), (t1, y1) in itertools.pairwise(ticks):
        if t0 <= time_s <= t1:
            return y0 + (y1 - y0) * (time_s - t0) / (t1 - t0)
    return ticks[-1][1]


def integrated_power(
    samples: Sequence[Sample], field: str, start_s: float, end_s: float, max_gap_s: float
) -> float | None:
    """Joules by the trapezoid rule over one field of polled power; None when it was not polled densely enough.

    Readings of a field that is itself a mean over the time before (:data:`AVERAGED_S`) hold what went before the
    window at first. Those are left out, and the window is charged at the mean power of the rest.

    Args:
        samples: in order of time.
        field: ``instant`` or ``average``.
        start_s: first edge.
        end_s: last edge.
        max_gap_s: longest time between two polls.
    """
    points = [(s.time_s, s.power_w[field]) for s in samples if field in s.power_w]
    if not points:
        return None
    lead_s = AVERAGED_S.get(field, 0.0)
    if end_s - start_s >= MIN_MEANS * lead_s > 0:
        rest_j = _trapezoid(points, start_s + lead_s, end_s, max_gap_s)
        return None if rest_j is None else rest_j * (end_s - start_s) / (end_s - start_s - lead_s)
    return _trapezoid(points, start_s, end_s, max_gap_s)


def _trapezoid(
    points: Sequence[tuple[float, float]], start_s: float, end_s: float, max_gap_s: float
) -> float | None:
    inside = [(t, w) for t, w in points if start_s < t < end_s]
    path = [(start_s, _at(points, start_s)), *inside, (end_s, _at(points, end_s))]
    if any(b[0] - a[0] > max_gap_s for a, b in itertools.pairwise(path)):
        return None
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(path))
