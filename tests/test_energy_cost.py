"""What readings cost the work beside them, from when repetitions and readings began and ended."""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
import time

import pytest

from kvquant.bench.meter_cost import PRODUCT_ROWS, main, processor_meter
from kvquant.energy.cost import NEIGHBOURS, Span, reading_cost, repetitions

READ_S, EVERY_S = 0.0014, 0.2


def spans(cost_s: float, *, noise: float = 0.1, seconds: float = 40.0) -> tuple[list[Span], list[Span]]:
    """Repetitions of about 1 ms whose pace drifts by half and jitters, and readings of 1.4 ms that cost the first they hit."""
    rng = random.Random(3)
    reads = [(0.1 + i * EVERY_S, 0.1 + i * EVERY_S + READ_S) for i in range(int(seconds / EVERY_S))]
    left, now_s, repeated = list(reads), 0.0, []
    while now_s < seconds:
        took_s = 0.001 * (1 + 0.5 * now_s / seconds) * (1 + noise * rng.expovariate(1))
        if left and left[0][0] < now_s + took_s:
            left.pop(0)
            took_s += cost_s
        repeated.append((now_s, now_s + took_s))
        now_s += took_s
    return repeated, reads


@pytest.mark.parametrize("cost_s", [0.0, 0.0003, 0.004])
def test_the_cost_of_a_reading_is_found_beside_drift_and_noise(cost_s: float) -> None:
    found = reading_cost(*spans(cost_s))
    assert found is not None and found.n > 190
    assert found.low <= cost_s / EVERY_S <= found.high
    assert found.high - found.low < 0.001  # a tenth of the hundredth that is to be shown


def test_readings_that_touch_nothing_give_no_figure() -> None:
    repeated, reads = spans(0.0, seconds=2.0)
    assert reading_cost(repeated, reads[:1]) is None
    assert reading_cost(repeated[: 2 * NEIGHBOURS], reads) is None


def test_repetitions_are_back_to_back() -> None:
    clock = itertools.count(0.0, 0.25)
    assert repetitions(lambda: None, 0.7, lambda: next(clock)) == [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75)]


def test_a_window_tells_what_its_thread_did() -> None:
    meter = processor_meter(0.01)
    reads = meter.note_reads()
    with meter.window("work") as window:
        time.sleep(0.2)
    assert len(reads) > 2 and all(start <= end for start, end in reads)
    assert 0 < window.state["reading_cpu_percent"] <= 100
    assert window.state["reading_percent"] > 0
    meter.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "kvquant-energy"]


def test_the_cost_is_left_for_work_that_host_and_device_pace(tmp_path, monkeypatch, capsys) -> None:
    left = tmp_path / "cost.json"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # Short work, so that enough neighbours fit between two readings on a busy machine too.
    monkeypatch.setattr("kvquant.bench.meter_cost.OPERATIONS", 10)
    monkeypatch.setitem(PRODUCT_ROWS, "cpu", 64)
    monkeypatch.setattr(sys, "argv", ["meter_cost.py", "--seconds=1.5", "--json", str(left)])
    main()
    found, said = json.loads(left.read_text()), capsys.readouterr().out
    for name in ("host", "device"):
        assert found[name]["share"]["low"] <= found[name]["share"]["value"] <= found[name]["share"]["high"]
        assert f"{name}-bound, {found[name]['text']}" in said
    assert found["source"] == "/proc/stat" and found["seconds"] == 1.5
    assert found["provenance"]["packages"]["torch"]
