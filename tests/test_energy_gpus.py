"""The NVML meter against a made-up driver: which GPU, whose joules, what is left behind."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import pytest

from kvquant.energy import CarbonIntensity
from kvquant.energy.gpus import find_gpu, other_processes, slowdowns
from kvquant.energy.nvml import gpu_meter
from kvquant.energy.protocol import FilledWindow
from kvquant.energy.validity import window_faults
from kvquant.errors import MeterUnavailable
from kvquant.tasks.energy_summary import summarize_variant

GRID = CarbonIntensity(500.0, "test grid")
POWER_W = 400.0


class NVMLError(Exception):
    """What the driver raises."""


class FakeDriver:
    """Two GPUs whose counters run at 400 W and change every 20 ms; of the module pynvml what is used."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def __init__(
        self, *, pids: list[int] | None = None, mig: int = 0, reasons: int = 4, fields: bool = True
    ) -> None:
        self.pids = [os.getpid()] if pids is None else pids
        self.mig, self.reasons, self.fields = mig, reasons, fields
        self.broken = False
        self.closed = 0
        self.power_w = POWER_W

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in ("GPU-aaaa", "GPU-bbbb", "MIG-cccc"):
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return "GPU-bbbb"

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"Test GPU"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        if self.mig is None:
            raise NVMLError("Not Supported")
        return self.mig, self.mig

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.broken:
            raise NVMLError("GPU is lost")
        return int(1000 * POWER_W * (time.perf_counter() // 0.02) * 0.02)

    def nvmlDeviceGetFieldValues(self, handle: str, ids: list[int]) -> list[SimpleNamespace]:
        if not self.fields:
            raise NVMLError("Not Supported")
        return [
            SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=int(1000 * self.power_w))) for _ in ids
        ]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return int(1000 * self.power_w)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.reasons

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return 1980

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 55

    def nvmlShutdown(self) -> None:
        self.closed += 1


def meter_of(driver: FakeDriver, uuid: str = "aaaa", gpus: int = 1):
    return gpu_meter(driver, uuid, GRID, lambda: None, lambda: gpus)


def sampling_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "kvquant-energy"]


@pytest.mark.parametrize("fields", [True, False])
def test_counter_and_integrated_power_agree(fields: bool) -> None:
    meter = meter_of(FakeDriver(fields=fields))
    assert not sampling_threads()
    with meter.window("work") as window:
        time.sleep(0.5)
        assert len(sampling_threads()) == 1
    assert not sampling_threads()
    assert window.kind == "measured" and "Test GPU, GPU alone" in window.source
    assert window.tick_s == pytest.approx(0.02, abs=0.01)
    # One tick of 20 ms at each edge is 8% of half a second; what is left of it is less.
    assert window.joules() == pytest.approx(POWER_W * window.duration_s, rel=0.04)
    assert set(window.polled_j) == ({"average", "instant"} if fields else {"unspecified"})
    assert all(j == pytest.approx(POWER_W * window.duration_s, rel=0.01) for j in window.polled_j.values())
    assert window.state["sm_clock_mhz"] == 1980
    assert window.state["normal_slowdowns"] == ["software power cap"]
    assert window_faults(window, min_s=0.1) == ["window shorter than 50 ticks of the counter"]
    assert "reading_percent" in window.state


def test_two_methods_that_disagree_make_a_window_invalid() -> None:
    driver = FakeDriver()
    driver.power_w = 1.07 * POWER_W
    with meter_of(driver).window("work") as window:
        time.sleep(0.4)
    assert "integrated power more than 5% from the counter" in window_faults(window)


def test_a_model_on_several_gpus_is_not_charged_to_one() -> None:
    with meter_of(FakeDriver(), gpus=2).window("work") as window:
        time.sleep(0.1)
    assert "this process used several GPUs and one is metered" in window_faults(window)


def test_the_gpu_is_found_by_uuid_and_its_sharing_told() -> None:
    handle, identity = find_gpu(FakeDriver(), "GPU-bbbb")
    assert handle == identity.uuid == "GPU-bbbb" and identity.gpus == 2
    assert identity.other_processes == 0 and not identity.mig
    with pytest.raises(MeterUnavailable, match="UUID dddd"):
        find_gpu(FakeDriver(), "dddd")


def test_a_slice_is_charged_as_what_it_is() -> None:
    for driver, uuid in ((FakeDriver(mig=1), "aaaa"), (FakeDriver(), "cccc"), (FakeDriver(), "MIG-cccc")):
        meter = meter_of(driver, uuid)
        assert meter.identity["mig"] and "all slices of a MIG GPU together" in meter.source
    assert not meter_of(FakeDriver(mig=None)).identity["mig"]


@pytest.mark.parametrize(
    ("pids", "others"),
    [([], 0), ([os.getpid()], 0), ([os.getpid(), 7], 1), ([7], 0), ([7, 8], 1)],
    ids=["unlisted", "alone", "shared", "other namespace", "other namespace, shared"],
)
def test_other_processes_are_counted(pids: list[int], others: int) -> None:
    assert other_processes(FakeDriver(pids=pids), "GPU-aaaa") == others


def test_other_processes_and_heat_make_a_window_invalid() -> None:
    driver = FakeDriver(pids=[os.getpid(), 7], reasons=0x40 | 0x80 | 0x04)
    with meter_of(driver).window("work") as window:
        time.sleep(0.3)
    faults = window_faults(window)
    assert "other processes used the GPU" in faults
    assert "the GPU slowed down: hardware power brake, hardware thermal slowdown" in faults
    assert slowdowns(driver, "GPU-aaaa")["normal_slowdowns"] == ["software power cap"]


def test_what_a_driver_does_not_tell_is_not_taken_for_nothing() -> None:
    driver = FakeDriver()

    def silent(*args: object) -> int:
        raise NVMLError("Not Supported")

    driver.nvmlDeviceGetComputeRunningProcesses = driver.nvmlDeviceGetClockInfo = silent
    with meter_of(driver).window("work") as window:
        time.sleep(0.1)
    assert window.state["other_processes"] is None and window.state["sm_clock_mhz"] is None
    assert "the driver does not tell whether other processes used the GPU" in window_faults(window)
    cell = summarize_variant([FilledWindow(window, 3)] * 2, tokens=10, idle_w=None)
    assert "sm_clock_mhz" not in cell and cell["j_per_token_mean"] > 0


def test_nothing_runs_on_after_an_exception() -> None:
    driver = FakeDriver()
    meter = meter_of(driver)
    with pytest.raises(KeyboardInterrupt), meter.window("outer"), meter.window("inner"):
        raise KeyboardInterrupt
    assert not sampling_threads()
    assert meter.windows["inner"][0].energy_j is not None
    meter.close()
    assert driver.closed == 1


def test_a_gpu_that_is_lost_costs_the_joules_and_not_the_run() -> None:
    driver = FakeDriver()
    meter = meter_of(driver)
    with meter.window("work") as window:
        driver.broken = True
        time.sleep(0.1)
    assert window.energy_j is None and isinstance(window.failure, MeterUnavailable)
    assert "GPU is lost" in str(window.failure)
    assert not sampling_threads()
    driver.broken = False
    with meter.window("work") as again:
        time.sleep(0.05)
    assert again.energy_j is not None


def test_a_gpu_lost_at_a_first_edge_leaves_nothing_either() -> None:
    driver = FakeDriver()
    meter = meter_of(driver)
    answers = iter([False, True])
    original = FakeDriver.nvmlDeviceGetTotalEnergyConsumption

    def lost_after_one(handle: str) -> int:
        driver.broken = next(answers, True)
        return original(driver, handle)

    driver.nvmlDeviceGetTotalEnergyConsumption = lost_after_one
    with pytest.raises(MeterUnavailable, match="GPU is lost"), meter.window("work"):
        pass
    assert not sampling_threads()


def test_nested_windows_share_one_thread() -> None:
    meter = meter_of(FakeDriver())
    with meter.window("run", poll_s=1.0) as run:
        with meter.window("part") as part:
            time.sleep(0.2)
            assert len(sampling_threads()) == 1
        assert len(sampling_threads()) == 1
        time.sleep(0.2)
    assert part.joules() == pytest.approx(POWER_W * part.duration_s, rel=0.1)
    assert run.joules() == pytest.approx(POWER_W * run.duration_s, rel=0.05)
    assert not sampling_threads()
