"""Orders, filled windows, statistics and validity, against known numbers."""

from __future__ import annotations

import dataclasses
import functools
import random

import numpy as np
import pytest
from scipy import stats

from kvquant.energy import CarbonIntensity, CounterMeter, Window
from kvquant.energy.protocol import counterbalanced_rounds, fill_window, measure_idle
from kvquant.energy.statistics import coefficient_of_variation, fit_line, mean_interval, paired_ratio
from kvquant.energy.validity import (
    disagreement_percent,
    disagreements_together,
    series_faults,
    window_faults,
)
from kvquant.energy.windows import Meter
from kvquant.errors import CounterStalled

GRID = CarbonIntensity(500.0, "test grid")


class SteppedMeter(Meter):
    """A meter with a clock of its own and a power that may change with time."""

    def __init__(self, power_w) -> None:
        super().__init__("stepped", "measured", GRID)
        self.time_s, self.total_j, self._power_w, self.ticks_s = 0.0, 0.0, power_w, 0.0

    @property
    def tick_s(self) -> float:
        return self.ticks_s

    def sleep(self, seconds: float) -> None:
        self.total_j += self._power_w(self.time_s) * seconds
        self.time_s += seconds

    def now_s(self) -> float:
        return self.time_s

    def _open(self, poll_s):
        return self.total_j

    def _measure(self, window, opened, start_s, end_s) -> None:
        window.energy_j = self.total_j - opened


def test_cooldown_waits_for_a_stable_power_and_no_longer() -> None:
    # 10 W less every 2 s until it stays at 60 W from 10 s on.
    meter = SteppedMeter(lambda t: max(60.0, 110.0 - 10 * (t // 2)))
    idle = measure_idle(meter, cooldown_s=60, idle_s=10, sleep=meter.sleep)
    assert idle.stable and idle.cooldown_s == 14 and idle.power_w == 60
    assert idle.window.duration_s == 10
    warm = SteppedMeter(lambda t: 1000 / (1 + t))
    impatient = measure_idle(warm, cooldown_s=6, idle_s=1, sleep=warm.sleep)
    assert not impatient.stable and impatient.cooldown_s == 6


def test_a_window_is_filled_to_its_length_and_work_is_counted() -> None:
    meter = SteppedMeter(lambda t: 100.0)
    filled = fill_window(meter, "w", lambda: meter.sleep(0.8), window_s=5.0, delay_s=0.05, sleep=meter.sleep)
    assert filled.repetitions == 7 and filled.window.duration_s == pytest.approx(5.6)
    assert filled.window.joules() == pytest.approx(560)
    # Work longer than the window is done once.
    assert fill_window(meter, "w", lambda: meter.sleep(9), window_s=5.0).repetitions == 1


def test_rounds_are_random_and_mirrored() -> None:
    rounds = counterbalanced_rounds(["a", "b", "c"], 5, random.Random(1))
    assert len(rounds) == 5 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert rounds[1] == rounds[0][::-1] and rounds[3] == rounds[2][::-1]
    pairs = {tuple(counterbalanced_rounds(["a", "b"], 2, random.Random(s))[0]) for s in range(20)}
    assert pairs == {("a", "b"), ("b", "a")}


def test_mirrored_rounds_cancel_a_drift_that_pairs_alone_do_not() -> None:
    joules: dict[str, list[float]] = {"a": [], "b": []}
    time = 0
    for order in counterbalanced_rounds(["a", "b"], 6, random.Random(3)):
        for name in order:
            joules[name].append((100 if name == "a" else 80) * np.exp(0.01 * time))
            time += 1
    ratio = paired_ratio(joules["b"], joules["a"])
    assert ratio.value == pytest.approx(0.8, rel=1e-9)
    assert ratio.low < 0.8 < ratio.high


def test_intervals_are_students() -> None:
    values = [3.0, 3.2, 2.9, 3.4, 3.1]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.value, found.low, found.high, found.n) == pytest.approx((np.mean(values), low, high, 5))
    assert mean_interval([1.0]) is None and paired_ratio([1.0], [2.0]) is None
    assert coefficient_of_variation(values) == pytest.approx(np.std(values, ddof=1) / np.mean(values))
    assert coefficient_of_variation([1.0]) is None


def test_the_interval_of_a_ratio_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        # What a round shares, and what each window has of its own.
        shared = rng.normal(0, 0.05, 5)
        one, two = (np.exp(shared + rng.normal(0, 0.01, 5)) for _ in range(2))
        ratio = paired_ratio(list(0.9 * one), list(two))
        hits += ratio.low <= 0.9 <= ratio.high
    assert 0.91 <= hits / 400 <= 0.985


def test_a_line_and_its_intercept() -> None:
    x = [10, 14, 18, 22, 26, 30]
    y = [5.1 * a + e for a, e in zip(x, [0.5, -0.4, 0.2, -0.3, 0.4, -0.2], strict=True)]
    line = fit_line(x, y)
    reference = stats.linregress(x, y)
    t = stats.t.ppf(0.975, 4)
    assert line.slope.value == pytest.approx(reference.slope)
    assert line.intercept.high - line.intercept.value == pytest.approx(t * reference.intercept_stderr)
    assert line.slope.high - line.slope.value == pytest.approx(t * reference.stderr)
    assert line.intercept.low < 0 < line.intercept.high and line.max_residual_percent < 1
    shifted = fit_line(x, [b + 20 for b in y])
    assert shifted.intercept.low > 0
    with pytest.raises(ValueError, match="3 points at 2 places"):
        fit_line([1, 1, 1], [1, 2, 3])


def window(**changes) -> Window:
    fields = {"duration_s": 6.0, "energy_j": 600.0, "tick_s": 0.1, **changes}
    return Window("w", "meter", fields.pop("kind", "measured"), GRID, **fields)


def test_a_sound_window_has_no_faults() -> None:
    assert window_faults(window(polled_j={"instant": 610.0})) == []
    # Single readings miss what varies between them: the average, which does not, decides about one window ...
    chancy = window(polled_j={"instant": 640.0, "average": 610.0})
    assert window_faults(chancy) == []
    assert disagreement_percent(chancy) == pytest.approx(100 * 10 / 600)
    # ... but not where there is too little of it.
    short = window(duration_s=2.0, polled_j={"instant": 610.0, "average": 300.0})
    assert window_faults(short, min_s=1.0) == ["window shorter than 50 ticks of the counter"]
    assert series_faults([window()] * 5) == []


def test_single_readings_must_agree_over_all_windows_of_a_result() -> None:
    fault = "integrated instant power more than 5% from the counter over all windows"
    by_chance = [window(polled_j={"instant": 600.0 + d, "average": 605.0}) for d in (40, -40, 35, -30, 5)]
    assert series_faults(by_chance) == []
    always = [window(polled_j={"instant": 600.0 + d, "average": 605.0}) for d in (40, 45, 35, 30, 25)]
    assert series_faults(always) == [fault]
    # A field that not every window has is no comparison; neither is one without joules.
    assert disagreements_together([*always, window()]) == {}
    assert disagreements_together([*always, window(energy_j=None)]) == {} == disagreements_together([])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"kind": "estimated"}, "estimated, not measured (meter)"),
        ({"duration_s": 4.9, "tick_s": 0.02}, "window shorter than 5 s"),
        ({"tick_s": 0.13}, "window shorter than 50 ticks of the counter"),
        (
            {"polled_j": {"instant": 590.0, "average": 560.0}},
            "integrated power more than 5% from the counter",
        ),
        (
            {"state": {"invalid_slowdowns": ["hardware power brake"]}},
            "the GPU slowed down: hardware power brake",
        ),
        ({"state": {"other_processes": 0.5}}, "other processes used the GPU"),
        ({"energy_j": None}, "not metered"),
        ({"energy_j": None, "failure": CounterStalled("it stood")}, "CounterStalled: it stood"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_fault_is_named(changes: dict, fault: str) -> None:
    assert window_faults(window(**changes)) == [fault]
    assert series_faults([*[window()] * 4, window(**changes)]) == [fault]


def test_a_window_asked_for_as_valid_is_as_long_as_its_counter_needs() -> None:
    meter = SteppedMeter(lambda t: 100.0)
    meter.ticks_s = 0.103
    work = functools.partial(meter.sleep, 0.01)
    filled = fill_window(meter, "w", work, window_s=5.0, sleep=meter.sleep)
    assert window_faults(dataclasses.replace(filled.window, tick_s=0.103)) == []
    assert 50 * 0.103 < filled.window.duration_s < 5.3
    idle = measure_idle(meter, cooldown_s=0, idle_s=5.0, sleep=meter.sleep)
    assert 50 * 0.103 < idle.window.duration_s < 5.3
    # Whoever asks for less than any valid window gets it.
    short = fill_window(meter, "w", work, window_s=0.5, sleep=meter.sleep)
    assert short.window.duration_s == pytest.approx(0.5, abs=0.02)


def test_few_windows_and_slices_are_faults_of_the_series() -> None:
    assert series_faults([window()] * 4) == ["fewer than 5 windows"]
    assert series_faults([window()] * 5, mig=True) == [
        "the counter is that of a whole GPU cut into MIG slices"
    ]


def test_a_meter_of_nothing_has_no_idle_power() -> None:
    meter = CounterMeter("none", "estimated", GRID, None)
    idle = measure_idle(meter, cooldown_s=60, idle_s=0.01, sleep=lambda s: None)
    assert idle.power_w is None and not idle.stable
