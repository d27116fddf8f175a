"""The meter on a real GPU (pytest -m gpu): two methods agree, measuring costs little, nothing is left behind.

What was found is printed; pytest shows it with -rP.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from kvquant.bench.meter_cost import WORK, measure
from kvquant.energy import CarbonIntensity, Meter, open_meter, open_nvml
from kvquant.energy.protocol import counterbalanced_rounds, fill_window, measure_idle
from kvquant.energy.statistics import coefficient_of_variation, fit_line, paired_ratio
from kvquant.energy.validity import disagreements_together, window_faults
from kvquant.tasks.energy import LOAD_STEPS
from kvquant.tasks.energy_loads import matrix_load

pytestmark = pytest.mark.gpu

COST_ROUNDS, COST_S, READINGS_S = 8, 1.0, 40.0


@pytest.fixture(scope="module")
def meter() -> Iterator[Meter]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    meter = open_meter("nvml", use_cuda=True, g_per_kwh=500.0)
    yield meter
    meter.close()
    assert not sampling_threads()


@pytest.fixture(scope="module")
def work(meter: Meter) -> Callable[[], None]:
    multiply = matrix_load(torch.device("cuda"), 8192)
    fill_window(meter, "warm-up", multiply, window_s=5)
    return multiply


def sampling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvquant-energy"]


def test_opening_takes_no_time(meter: Meter) -> None:
    again = open_meter("nvml", use_cuda=True, g_per_kwh=500.0)
    again.close()
    print(
        f"opened in {1000 * meter.open_s:.1f} ms, once more in {1000 * again.open_s:.1f} ms; {meter.identity}"
    )
    assert meter.open_s < 0.05


def test_no_thread_is_left_also_after_an_exception(meter: Meter) -> None:
    with pytest.raises(RuntimeError, match="the work failed"), meter.window("fails") as window:
        assert len(sampling_threads()) == 1
        time.sleep(0.3)
        raise RuntimeError("the work failed")
    assert not sampling_threads()
    assert window.energy_j is not None and window.state["other_processes"] in (0, None)


def test_measuring_costs_device_bound_work_less_than_a_hundredth(
    meter: Meter, work: Callable[[], None]
) -> None:
    once = fill_window(meter, "count", work, window_s=COST_S).repetitions

    def took_s() -> float:
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        for _ in range(once):
            work()
        return time.perf_counter() - start_s

    times: dict[str, list[float]] = {"plain": [], "metered": []}
    for order in counterbalanced_rounds(list(times), COST_ROUNDS, random.Random(0)):
        for name in order:
            with contextlib.nullcontext() if name == "plain" else meter.window("cost"):
                times[name].append(took_s())
    ratio = paired_ratio(times["metered"], times["plain"])
    assert ratio is not None
    print(
        f"device-bound work takes {ratio.value:.5f} [{ratio.low:.5f}, {ratio.high:.5f}] times as long while it is "
        f"metered ({COST_ROUNDS} pairs of {COST_S} s)"
    )
    assert ratio.value < 1.01


@pytest.mark.parametrize("pace", WORK)
def test_readings_cost_work_less_than_a_hundredth(pace: str) -> None:
    meter = open_nvml(CarbonIntensity(500.0, "any"))
    try:
        cost, said = measure(meter, WORK[pace]("cuda"), READINGS_S)
    finally:
        meter.close()
    print(f"{pace}-bound, {said}")
    assert cost is not None and cost.high < 0.01


def test_counter_and_integrated_power_agree_over_half_a_minute(
    meter: Meter, work: Callable[[], None]
) -> None:
    window = fill_window(meter, "agreement", work, window_s=30).window
    apart = disagreements_together([window])
    print(
        f"integrated power against the counter over {window.duration_s:.1f} s, percent: {apart}, tick {meter.tick_s}"
    )
    assert window_faults(window) == []
    assert apart and all(abs(percent) < 5 for percent in apart.values())


def test_windows_repeat(meter: Meter, work: Callable[[], None]) -> None:
    filled = [fill_window(meter, "repeat", work, window_s=5) for _ in range(5)]
    spread = coefficient_of_variation([f.window.joules() / f.repetitions for f in filled])
    print(f"coefficient of variation {100 * spread:.2f}%, faults {[window_faults(f.window) for f in filled]}")
    assert all(window_faults(f.window) == [] for f in filled)
    assert spread is not None and spread < 0.03


def test_joules_above_idle_are_proportional_to_work(meter: Meter, work: Callable[[], None]) -> None:
    idle = measure_idle(meter, cooldown_s=20, idle_s=6)
    assert idle.power_w is not None
    once = fill_window(meter, "once", work, window_s=5).repetitions
    counts = [math.ceil(step * once) for step in LOAD_STEPS]
    random.Random(0).shuffle(counts)
    joules = []
    for count in counts:
        with meter.window("load") as window:
            for _ in range(count):
                work()
        assert window_faults(window) == []
        joules.append(window.joules() - idle.power_w * window.duration_s)
    line = fit_line(counts, joules)
    print(f"{line}")
    assert line.intercept.low <= 0 <= line.intercept.high
    assert line.max_residual_percent < 3
