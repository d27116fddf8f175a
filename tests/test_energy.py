"""Meters: counters against known totals, honest marks, nothing left behind, no network."""

from __future__ import annotations

import logging
import platform
import socket
import threading
import time
from pathlib import Path

import pytest

from kvquant.energy import (
    CarbonIntensity,
    CounterMeter,
    RaplCounter,
    carbon_intensity,
    open_meter,
    open_rapl,
    opening,
)
from kvquant.energy.slurm import sacct_energy_j
from kvquant.energy.windows import MeterWithBeside
from kvquant.errors import ConfigError, CounterReset, MeterError, MeterUnavailable

GRID = CarbonIntensity(500.0, "test grid")


def rapl_zone(root: Path, folder: str, name: str, energy_uj: int, range_uj: int = 1_000_000) -> Path:
    zone = root / folder
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return zone / "energy_uj"


def test_a_counter_window_is_the_difference_of_two_readings() -> None:
    readings = iter([10.0, 10.5, 12.5, 13.0])
    meter = CounterMeter("replay", "measured", GRID, lambda: next(readings))
    with meter.window("outer") as outer, meter.window("inner") as inner:
        pass
    assert inner.energy_j == 2.0
    assert outer.energy_j == 3.0
    assert outer.as_metrics()["carbon_gco2e"] == pytest.approx(3.0 / 3.6e6 * 500)
    assert outer.as_metrics()["energy_kind"] == "measured"


def test_a_window_is_complete_after_an_exception_too() -> None:
    readings = iter([1.0, 4.0])
    meter = CounterMeter("replay", "measured", GRID, lambda: next(readings))
    with pytest.raises(RuntimeError), meter.window("w") as window:
        raise RuntimeError
    assert window.energy_j == 3.0


def test_the_device_is_waited_for_at_both_edges() -> None:
    events: list[str] = []

    def read_j() -> float:
        events.append("read")
        return 0.0

    meter = CounterMeter("replay", "measured", GRID, read_j, synchronize=lambda: events.append("wait"))
    with meter.window("w"):
        events.append("work")
    assert events == ["wait", "read", "work", "wait", "read"]


def test_rapl_adds_packages_and_memory_and_survives_a_wrap(tmp_path: Path) -> None:
    package = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    rapl_zone(tmp_path, "intel-rapl:0:0", "core", 1)
    memory = rapl_zone(tmp_path, "intel-rapl:0:1", "dram", 100)
    counter = RaplCounter(tmp_path)
    package.write_text("100000")  # wrapped at 1,000,000
    memory.write_text("50100")
    assert counter.read_j() == pytest.approx(0.25)
    assert counter.read_j() == pytest.approx(0.25)


def test_rapl_without_zones_or_rights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match="package counter"):
        RaplCounter(tmp_path)
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 1).write_text("not a number")
    with pytest.raises(MeterError, match="try energy.meter=auto"):
        RaplCounter(tmp_path)


def test_rapl_that_root_alone_may_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    read_text = Path.read_text

    def refused(path: Path, *args: object, **kwargs: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(MeterUnavailable, match=r"Permission denied.*run as root or try energy\.meter=auto"):
        open_rapl(GRID, tmp_path)


def test_codecarbon_is_told_the_processors_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo, cpu = pytest.importorskip("cpuinfo"), pytest.importorskip("codecarbon.core.cpu")
    monkeypatch.setattr(cpu, "detect_cpu_model", cpu.detect_cpu_model)
    monkeypatch.setattr("kvquant.energy.codecarbon_meter.cpu_name", lambda: "Intel(R) Xeon(R) Platinum 8480+")
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: pytest.fail("a process of a second, for a name"))
    open_meter("codecarbon")
    assert cpu.TDP().model == "Intel(R) Xeon(R) Platinum 8480+"
    monkeypatch.setattr("kvquant.energy.codecarbon_meter.cpu_name", lambda: platform.machine())
    told = cpu.detect_cpu_model
    open_meter("codecarbon")
    assert cpu.detect_cpu_model is told, "no name is no news"


def test_codecarbon_estimates_offline_and_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def no_network(*args: object) -> None:
        raise AssertionError("a meter must not use the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)
    threads = set(threading.enumerate())
    meter = open_meter("codecarbon")
    start_s = time.perf_counter()
    with meter.window("prefill") as window:
        time.sleep(0.2)
    overhead_s = time.perf_counter() - start_s - window.duration_s
    assert window.kind == "estimated" and "CodeCarbon" in window.source
    assert window.energy_j is not None and 0.1 < window.energy_j < 200
    assert "Poland" in window.intensity.source
    assert overhead_s < 0.2
    with meter.window("outer") as outer:
        for _ in range(2):
            with meter.window("inner"):
                time.sleep(0.1)
        time.sleep(0.1)
    inner_j = sum(w.joules() for w in meter.windows["inner"])
    # Time is cut at every edge, so that three pieces of a tenth of a second each belong to the outer window.
    assert 1.2 * inner_j < outer.joules() < 2 * inner_j
    with pytest.raises(RuntimeError), meter.window("again"):
        raise RuntimeError
    assert meter.windows["again"][0].energy_j is not None
    meter.close()
    deadline_s = time.monotonic() + 5
    while set(threading.enumerate()) - threads:
        # A cancelled timer takes a moment to notice.
        assert time.monotonic() < deadline_s, threading.enumerate()
        time.sleep(0.01)
    out = capfd.readouterr()
    assert out.out == "" and out.err == ""
    assert list(tmp_path.iterdir()) == []


def test_auto_takes_the_next_best_and_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise MeterError("not here")

    monkeypatch.setattr(opening, "open_rapl", broken)
    monkeypatch.setattr(opening, "CodeCarbonMeter", broken)
    meter = open_meter("auto")
    with meter.window("w") as window:
        time.sleep(0.01)
    assert window.kind == "estimated" and "constant 65 W" in window.source
    assert window.energy_j == pytest.approx(65 * window.duration_s, rel=0.2)


def test_a_meter_asked_for_by_name_is_never_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(opening, "open_rapl", lambda intensity: open_rapl(intensity, tmp_path))
    with pytest.raises(MeterError, match="RAPL"):
        open_meter("rapl")


def test_rapl_windows_measure_and_say_when_the_counter_was_reset(tmp_path: Path) -> None:
    package = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000, range_uj=262_000_000_000)
    meter = open_rapl(GRID, tmp_path)
    with meter.window("work") as window:
        package.write_text("3500000")
        time.sleep(0.2)
    # Linear between readings, of which the last comes a little after the edge: later on a busy host.
    assert window.joules() == pytest.approx(2.5, rel=0.4)
    assert window.kind == "measured" and "whole machine" in window.source
    with meter.window("reset") as reset:
        package.write_text("100")
    assert reset.energy_j is None and isinstance(reset.failure, CounterReset)
    with meter.window("after") as after:
        package.write_text("1000100")
        time.sleep(0.2)
    assert after.joules() == pytest.approx(1.0, rel=0.4)
    assert not [t for t in threading.enumerate() if t.name == "kvquant-energy"]


def test_a_meter_beside_is_reported_and_never_added(tmp_path: Path) -> None:
    package = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 0, range_uj=262_000_000_000)
    readings = iter([1.0, 8.0])
    main = CounterMeter("GPU", "measured", GRID, lambda: next(readings))
    meter = MeterWithBeside(main, {"CPU": open_rapl(GRID, tmp_path)})
    with meter.window("work") as window:
        package.write_text("2000000")
        time.sleep(0.2)
    assert window.energy_j == 7.0 and window.beside_j == {"CPU": pytest.approx(2.0, rel=0.4)}
    assert window.as_metrics()["energy_beside_j"] == window.beside_j
    meter.close()


def fake_sacct(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    script = folder / "sacct"
    # Asked for JobID, it would call a member of an array 5_2.
    script.write_text(f"#!/bin/sh\n[ \"$6\" = JobIDRaw,ConsumedEnergyRaw ] && printf '{lines}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_slurm_counts_a_job_or_its_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_sacct(tmp_path, monkeypatch, r"7|1200\n7.batch|1000\n7.0|150\n")
    assert sacct_energy_j("7") == 1200
    fake_sacct(tmp_path, monkeypatch, r"7|\n7.batch|1000\n7.0|150\n")
    assert sacct_energy_j("7") == 1150
    # What Slurm says when nothing counts: nothing, zero, or its mark for "no value".
    fake_sacct(tmp_path, monkeypatch, r"7|18446744073709551614\n7.batch|0\n7.0|\n")
    with pytest.raises(MeterUnavailable, match="AcctGatherEnergyType"):
        sacct_energy_j("7")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MeterUnavailable, match="login node"):
        sacct_energy_j("7")


def test_co2_is_joules_times_intensity_times_pue() -> None:
    readings = iter([0.0, 7.2e6])
    grid = CarbonIntensity(662.0, "test grid", pue=1.5)
    meter = CounterMeter("replay", "measured", grid, lambda: next(readings))
    with meter.window("work") as window:
        pass
    # 7.2 MJ are 2 kWh; the room takes 3; at 662 g each.
    assert window.carbon_gco2e == pytest.approx(1986.0)
    assert window.as_metrics()["pue"] == 1.5
    assert open_meter("none", g_per_kwh=100.0, pue=1.1).intensity == CarbonIntensity(
        100.0, "energy.g_per_kwh, given for POL", 1.1
    )


def test_none_meters_time_alone() -> None:
    with open_meter("none").window("w") as window:
        pass
    assert window.energy_j is None and window.carbon_gco2e is None and window.duration_s > 0


def test_the_grid_is_named_and_must_exist() -> None:
    assert carbon_intensity("POL").g_per_kwh > carbon_intensity("FRA").g_per_kwh > 0
    with pytest.raises(ConfigError, match="got XXX; try POL"):
        open_meter("constant", country="XXX")
    logging.getLogger("codecarbon").setLevel(logging.NOTSET)
