"""Recorded counters: known joules to 0.1%, also across a wrap; a typed error for everything that cannot be joules."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from kvquant.energy import CarbonIntensity, CounterLimits, ReplayClock, Sample, load_trace, replay_meter
from kvquant.energy.traces import counter_energy, integrated_power, observed_tick_s
from kvquant.energy.validity import window_faults
from kvquant.energy.windows import Window
from kvquant.errors import (
    CounterJumped,
    CounterReset,
    CounterStalled,
    MeterError,
    MeterUnavailable,
    ReadingLate,
)

GRID = CarbonIntensity(500.0, "test grid", pue=1.2)
TICK_S, POLL_S = 0.02, 0.01
IDLE_W, WORK_W = 80.0, 300.0
# Idle, work from 2 s to 32 s, idle.
START_S, END_S, LAST_S = 2.0, 32.0, 34.0
TRUE_J = WORK_W * (END_S - START_S)


def total_j(time_s: float) -> float:
    """Joules that the recorded device had drawn by then."""
    work_s = min(max(time_s - START_S, 0), END_S - START_S)
    return IDLE_W * (time_s - work_s) + WORK_W * work_s


def record(counter: Callable[[float, float], float], *, polls: Callable[[float], bool] = lambda t: True):
    """Samples of a counter that changes at its ticks; ``counter`` maps (time, joules) to what it shows."""
    samples = []
    for index in range(round(LAST_S / POLL_S) + 1):
        time_s = index * POLL_S
        if polls(time_s):
            # Half a tick past, so that rounding does not decide which tick was last.
            tick_s = int((time_s + POLL_S / 2) / TICK_S) * TICK_S
            power_w = WORK_W if START_S <= time_s < END_S else IDLE_W
            samples.append(Sample(time_s, counter(tick_s, total_j(tick_s)), {"instant": power_w}))
    return samples


def measured(trace: list[Sample], limits: CounterLimits | None = None) -> Window:
    clock = ReplayClock(START_S)
    meter = replay_meter(trace, clock, limits or CounterLimits(TICK_S, 700.0), GRID)
    with meter.window("work") as window:
        clock.advance(END_S - START_S)
    return window


def test_a_healthy_counter_gives_known_joules_to_a_thousandth() -> None:
    window = measured(record(lambda t, j: 1e6 + j))
    assert window.failure is None
    assert window.joules() == pytest.approx(TRUE_J, rel=1e-3)
    assert window.polled_j["instant"] == pytest.approx(TRUE_J, rel=1e-3)
    assert window.tick_s == pytest.approx(TICK_S, rel=0.01)
    assert window.carbon_gco2e == pytest.approx(TRUE_J / 3.6e6 * 1.2 * 500, rel=1e-3)


@pytest.mark.parametrize("wraps_at_s", [5.0, 2.005, 31.999])
def test_a_counter_that_wraps_gives_the_same(wraps_at_s: float) -> None:
    # 4,000 J of range: it wraps twice within the window's 9,000 J.
    range_j = 4000.0
    offset = range_j - total_j(wraps_at_s)
    window = measured(
        record(lambda t, j: (j + offset) % range_j), CounterLimits(TICK_S, 700.0, range_j=range_j)
    )
    assert window.joules() == pytest.approx(TRUE_J, rel=1e-3)


def test_a_counter_that_starts_again_is_told_from_one_that_wraps() -> None:
    reset = record(lambda t, j: 5e5 + j if t < 17 else j - total_j(17))
    for limits in (CounterLimits(TICK_S, 700.0), CounterLimits(TICK_S, 700.0, range_j=1e6)):
        window = measured(reset, limits)
        assert window.energy_j is None and isinstance(window.failure, CounterReset)
    with pytest.raises(CounterReset, match=r"must not fall, got .* after"):
        window.joules()
    assert "CounterReset" in window.as_metrics()["energy_failure"]


def test_a_counter_that_stands_still_is_a_stall() -> None:
    frozen = total_j(10)
    lost = total_j(13) - frozen
    window = measured(record(lambda t, j: j if t < 10 else frozen if t < 13 else j - lost))
    assert window.energy_j is None and isinstance(window.failure, CounterStalled)
    # Half a second is within what a busy driver may do, and loses nothing when the counter catches up.
    short = measured(
        record(lambda t, j: j if t < 10 else total_j(10) if t < 10.3 else j), CounterLimits(TICK_S, 7000.0)
    )
    assert short.joules() == pytest.approx(TRUE_J, rel=1e-3)


def test_a_counter_that_never_moves_is_a_stall() -> None:
    assert isinstance(measured(record(lambda t, j: 42.0)).failure, CounterStalled)


def test_a_counter_that_jumps_is_refused() -> None:
    window = measured(record(lambda t, j: j + (1000 if t >= 20 else 0)))
    assert isinstance(window.failure, CounterJumped) and "700 W" in str(window.failure)


def test_late_readings_inside_cost_nothing_and_at_an_edge_everything() -> None:
    inside = measured(record(lambda t, j: j, polls=lambda t: not 15 < t < 16.5))
    assert inside.joules() == pytest.approx(TRUE_J, rel=1e-3)
    # Power was not polled for longer than it may be.
    assert "instant" not in inside.polled_j
    for low, high in ((1.5, 2.6), (31.5, 40.0)):
        late = measured(record(lambda t, j: j, polls=lambda t, a=low, b=high: not a < t < b))
        assert late.energy_j is None and isinstance(late.failure, ReadingLate)
    assert isinstance(measured([]).failure, ReadingLate)


def test_nested_windows_share_a_trace() -> None:
    clock = ReplayClock(START_S)
    meter = replay_meter(record(lambda t, j: j), clock, CounterLimits(TICK_S, 700.0), GRID)
    with meter.window("both") as both:
        for _ in range(2):
            with meter.window("part"):
                clock.advance(10.0)
        clock.advance(10.0)
    assert [round(w.joules()) for w in meter.windows["part"]] == [3000, 3000]
    assert both.joules() == pytest.approx(TRUE_J, rel=1e-3)


def sparse_trace(start_s: float, end_s: float, phase_s: float) -> list[Sample]:
    """As a GPU is read: power every 0.1 s, its counter (a tick of 0.1 s) every 0.5 s, and densely at both edges.

    Power swings between 200 and 400 W twice a second; ``average`` is the mean of the last second, ``instant`` a look.
    """

    def true_j(time_s: float) -> float:
        work_s = min(max(time_s - start_s, 0.0), end_s - start_s)
        halves, rest_s = divmod(work_s, 0.25)
        swing_j = 100 * (0.25 * (halves % 2) + (rest_s if halves % 2 == 0 else -rest_s))
        return IDLE_W * (time_s - work_s) + WORK_W * work_s + swing_j

    def shown_j(time_s: float) -> float:
        return true_j((time_s - phase_s) // 0.1 * 0.1 + phase_s)

    dense = [e + k * 0.003 for e in (start_s - 0.11, end_s) for k in range(41)]
    seldom = [start_s + 0.5 * k for k in range(1, int((end_s - start_s) / 0.5) + 1)]
    polls = [start_s + 0.1 * k for k in range(int((end_s - start_s) / 0.1) + 1)]
    readings = [Sample(t, shown_j(t)) for t in (*dense, *seldom)]
    for t in polls:
        power_w = {"average": true_j(t) - true_j(t - 1), "instant": (true_j(t) - true_j(t - 0.025)) / 0.025}
        readings.append(Sample(t, None, power_w))
    return sorted(readings, key=lambda s: s.time_s)


@pytest.mark.parametrize("into_tick_s", [0.001, 0.03, 0.055, 0.099])
def test_a_seldom_read_counter_is_exact_by_its_edges_and_an_average_by_its_last_second(into_tick_s) -> None:
    # The meter waits for a tick before it opens a window, so that the start follows one; the end comes at any phase.
    start_s, end_s = 10.0, 15.3 + into_tick_s
    trace = sparse_trace(start_s, end_s, phase_s=10.0 - 0.002)
    true_j = WORK_W * (end_s - start_s)
    found_j = counter_energy(trace, start_s, end_s, CounterLimits(0.1, 1000.0), tick_s=0.1)
    # The last half swing may be incomplete: it is 100 W over at most a quarter of a second.
    assert found_j == pytest.approx(true_j, abs=26)
    average_j = integrated_power(trace, "average", start_s, end_s, 0.5)
    assert average_j == pytest.approx(true_j, rel=0.01)
    # Without leaving out the first second its readings would be of the idle before, for half a second on average.
    lagging_j = integrated_power(
        [Sample(s.time_s, None, {"lagging": s.power_w["average"]}) for s in trace if s.power_w],
        "lagging", start_s, end_s, 0.5,
    )  # fmt: skip
    assert lagging_j == pytest.approx(true_j - (WORK_W - IDLE_W) / 2, rel=0.01)


def test_a_tick_between_far_readings_is_taken_from_the_next_one() -> None:
    # Ticks at 0.08, 0.18, ...; 100 W; read at 0.5 s, at the window's end and then every 3 ms until the tick at 5.28.
    def shown_j(time_s: float) -> float:
        return 100 * ((time_s - 0.08) // 0.1 * 0.1 + 0.08)

    end_s = 5.27
    times = [0.06, 0.079, 0.081, *(0.5 * k for k in range(1, 11)), *(end_s + 0.003 * k for k in range(6))]
    # After the end the device idles, which the tick at 5.28 already knows.
    trace = [Sample(t, shown_j(t) - (0.6 if t > 5.28 else 0.0)) for t in times]
    found_j = counter_energy(trace, 0.0815, end_s, CounterLimits(0.1, 700.0), tick_s=0.1)
    assert found_j == pytest.approx(100 * (end_s - 0.0815), rel=1e-3)


def test_trapezoid_of_a_ramp_is_exact() -> None:
    ramp = [Sample(t / 10, None, {"average": 10 * t}) for t in range(51)]
    # 100 W per second: the integral of 100 t from 1.05 to 4.
    assert integrated_power(ramp, "average", 1.05, 4.0, 0.5) == pytest.approx(50 * (16 - 1.05**2))
    assert integrated_power(ramp, "instant", 1.0, 4.0, 0.5) is None
    assert integrated_power(ramp[:20] + ramp[30:], "average", 1.0, 4.0, 0.5) is None
    # Three seconds and more of a mean over a second: the first is left out, 50 (16 - 1) J of two seconds remain.
    assert integrated_power(ramp, "average", 0.0, 4.0, 0.5) == pytest.approx(50 * (16 - 1) / 3 * 4)


def test_a_counter_read_seldom_is_not_taken_for_a_slow_one() -> None:
    fresh = [Sample(float(t), 80.0 * t) for t in range(36)]
    clock = ReplayClock(START_S)
    meter = replay_meter(fresh, clock, CounterLimits(0.001, 700.0), GRID)
    with meter.window("work") as window:
        clock.advance(6.0)
    assert window.tick_s is None and window.joules() == pytest.approx(480.0)
    assert window_faults(window) == []
    assert observed_tick_s(record(lambda t, j: j)) == pytest.approx(TICK_S)
    assert observed_tick_s(fresh) is None and observed_tick_s([]) is None


def test_a_trace_is_read_from_json_lines(tmp_path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"time_s": s.time_s, "counter_j": s.counter_j, "power_w": dict(s.power_w)}
        for s in record(lambda t, j: j)
    ]
    path.write_text("\n".join(map(json.dumps, reversed(lines))))
    assert measured(load_trace(path)).joules() == pytest.approx(TRUE_J, rel=1e-3)
    path.write_text('{"counter_j": 1}')
    with pytest.raises(MeterUnavailable, match="JSON lines"):
        load_trace(path)


def test_every_failure_is_a_meter_error() -> None:
    for kind in (CounterJumped, CounterReset, CounterStalled, MeterUnavailable, ReadingLate):
        assert issubclass(kind, MeterError)
