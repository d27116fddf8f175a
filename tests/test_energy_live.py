"""The meter on a real GPU (pytest -m gpu): two methods agree, measuring costs little, nothing is left behind."""

from __future__ import annotations

import random
import statistics
import threading
import time

import pytest
import torch

from kvquant.energy.nvml import open_nvml
from kvquant.energy.protocol import counterbalanced_rounds, fill_window, measure_idle
from kvquant.energy.statistics import coefficient_of_variation, fit_line
from kvquant.energy.validity import disagreement_percent, window_faults
from kvquant.energy.windows import CarbonIntensity
from kvquant.tasks.energy_loads import matrix_load

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def meter():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.cuda.init()
    start_s = time.perf_counter()
    meter = open_nvml(CarbonIntensity(500.0, "test grid"))
    assert time.perf_counter() - start_s < 0.05
    yield meter
    meter.close()
    assert "kvquant-energy" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture(scope="module")
def work(meter):
    multiply = matrix_load(torch.device("cuda"), 8192)
    fill_window(meter, "warm-up", multiply, window_s=10)
    return multiply


def test_counter_and_integrated_power_agree_over_half_a_minute(meter, work) -> None:
    window = fill_window(meter, "agreement", work, window_s=30).window
    assert window_faults(window) == []
    apart = disagreement_percent(window)
    assert apart is not None and abs(apart) < 5
    assert window.state["reading_percent"] < 1


def test_windows_repeat(meter, work) -> None:
    filled = [fill_window(meter, "repeat", work, window_s=5) for _ in range(5)]
    spread = coefficient_of_variation([f.window.joules() / f.repetitions for f in filled])
    assert spread is not None and spread < 0.03


def test_joules_above_idle_are_proportional_to_work(meter, work) -> None:
    idle = measure_idle(meter, cooldown_s=30, idle_s=10)
    assert idle.power_w is not None
    once = fill_window(meter, "once", work, window_s=5).repetitions
    counts = [round(step * once) for step in (2.5, 1.0, 1.9, 1.3, 2.2, 1.6)]
    joules = []
    for count in counts:
        with meter.window("load") as window:
            for _ in range(count):
                work()
        joules.append(window.joules() - idle.power_w * window.duration_s)
    line = fit_line(counts, joules)
    assert line.intercept.low <= 0 <= line.intercept.high
    assert line.max_residual_percent < 3


def test_measuring_costs_less_than_a_hundredth(meter, work) -> None:
    times: dict[str, list[float]] = {"plain": [], "metered": []}
    for order in counterbalanced_rounds(list(times), 6, random.Random(0)):
        for name in order:
            if name == "metered":
                with meter.window("cost") as window:
                    for _ in range(1000):
                        work()
                times[name].append(window.duration_s)
            else:
                torch.cuda.synchronize()
                start_s = time.perf_counter()
                for _ in range(1000):
                    work()
                times[name].append(time.perf_counter() - start_s)
    assert statistics.median(times["metered"]) < 1.01 * statistics.median(times["plain"])
