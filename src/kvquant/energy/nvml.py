"""NVIDIA's own counter and power readings of one GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kvquant.energy.gpus import driver_errors, find_gpu, gpus_in_use, other_processes, slowdowns
from kvquant.energy.sampling import SampledMeter, ThreadSampler
from kvquant.energy.traces import CounterLimits, Sample
from kvquant.energy.windows import MEASURED, CarbonIntensity
from kvquant.errors import MeterUnavailable

# Counters of data-centre GPUs change every 20 to 100 ms.
TICK_S = 0.1
# Every look spends a millisecond or more in the driver (1.4 on an H100): five in a second stay below 1% of it. They suffice,
# as each tells the mean over a second. At a window's edges, where the counter's tick matters, nothing else runs and it
# alone is read, far more often.
POLL_S = 0.2
# Between the edges the counter only has to show that it neither stalls nor jumps.
COUNTER_S = 0.39  # every second reading of the power
# Clocks, temperature and processes cost more than power and change more slowly.
STATE_S = 1.0
# Field numbers of nvml.h: average over the last second, and the last reading.
FIELDS = {"average": 185, "instant": 186}
SYSTEMATIC_PERCENT = 5.0


class GpuReader:
    """Takes one sample of a GPU per call: of its counter alone, or of what is due.

    Args:
        nvml: the module pynvml, initialised.
        handle: the GPU.
        gpus_in_use: how many GPUs this process uses.
    """

    def __init__(self, nvml: Any, handle: Any, gpus_in_use: Callable[[], int]) -> None:
        self._nvml, self._handle, self._gpus_in_use = nvml, handle, gpus_in_use
        self._counter_s = self._state_s = float("-inf")
        self._has_fields = bool(self._fields())

    def read(self) -> Sample:
        """Return the counter alone.

        Raises:
            MeterUnavailable: the driver does not answer.
        """
        with driver_errors(self._nvml):
            counter_j = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        # The clock after the counter: a driver that answers late then looks late.
        self._counter_s = time.perf_counter()
        return Sample(self._counter_s, counter_j)

    def look(self, everything: bool) -> Sample:
        """Return power, and counter and state if they are due or ``everything`` is asked for.

        Raises:
            MeterUnavailable: the driver does not answer.
        """
        counter_j = None
        if everything or time.perf_counter() - self._counter_s >= COUNTER_S:
            counter_j = self.read().counter_j
        power_w = self._fields() if self._has_fields else self._power_usage()
        now_s = time.perf_counter() if counter_j is None else self._counter_s
        if not everything and now_s - self._state_s < STATE_S:
            return Sample(now_s, counter_j, power_w)
        self._state_s = now_s
        return Sample(now_s, counter_j, power_w, self._state())

    def _fields(self) -> dict[str, float]:
        """The power fields by name; empty on drivers that do not know them."""
        try:
            values = self._nvml.nvmlDeviceGetFieldValues(self._handle, list(FIELDS.values()))
        except self._nvml.NVMLError:
            return {}
        pairs = zip(FIELDS, values, strict=True)
        return {name: v.value.uiVal / 1000 for name, v in pairs if v.nvmlReturn == 0 and v.value.uiVal}

    def _power_usage(self) -> dict[str, float]:
        # Older drivers have one reading; on A100 it is the last one, elsewhere mostly an average.
        with driver_errors(self._nvml):
            return {"unspecified": self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000}

    def _state(self) -> dict[str, Any]:
        nvml, handle = self._nvml, self._handle
        state: dict[str, Any] = {**slowdowns(nvml, handle), "gpus_in_use": self._gpus_in_use()}
        for key, read in (
            ("sm_clock_mhz", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            ("temperature_c", lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            ("other_processes", lambda: other_processes(nvml, handle)),
        ):
            try:
                state[key] = read()
            except nvml.NVMLError:
                state[key] = None
        return state


def open_nvml(intensity: CarbonIntensity) -> SampledMeter:
    """Open counter and power of the current CUDA device.

    Raises:
        MeterUnavailable: no GPU, no driver, or a GPU without the counter.
    """
    try:
        import pynvml
        import torch

        cuda_uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    # A torch without CUDA asserts; one without a driver raises a RuntimeError.
    except (ImportError, RuntimeError, AssertionError) as error:
        raise MeterUnavailable(
            f"NVML's energy counter must be readable, got {error}; try energy.meter=auto"
        ) from error
    with driver_errors(pynvml):
        pynvml.nvmlInit()
    try:
        return gpu_meter(pynvml, cuda_uuid, intensity, torch.cuda.synchronize, gpus_in_use)
    except BaseException:
        pynvml.nvmlShutdown()
        raise


def gpu_meter(
    nvml: Any,
    cuda_uuid: str,
    intensity: CarbonIntensity,
    synchronize: Callable[[], None],
    gpus_in_use: Callable[[], int],
) -> SampledMeter:
    """Return the meter of one GPU; closing it shuts ``nvml`` down.

    Args:
        nvml: the module pynvml, initialised.
        cuda_uuid: the GPU as CUDA names it.
        intensity: the grid.
        synchronize: waits for the GPU.
        gpus_in_use: how many GPUs this process uses; every window tells the mean.

    Raises:
        MeterUnavailable: NVML does not know the GPU, or it has no such counter.
    """
    handle, identity = find_gpu(nvml, cuda_uuid)
    reader = GpuReader(nvml, handle, gpus_in_use)
    reader.look(True)
    scope = "all slices of a MIG GPU together" if identity.mig else "GPU alone"
    # Twice the limit: short peaks above it are real.
    most_w = 2 * (identity.power_limit_w or 1000)
    meter = SampledMeter(
        f"NVML total energy counter, {identity.name}, {scope}",
        MEASURED,
        intensity,
        ThreadSampler(reader.read, TICK_S, reader.look),
        CounterLimits(TICK_S, most_w),
        poll_s=POLL_S,
        synchronize=synchronize,
        on_close=nvml.nvmlShutdown,
    )
    meter.identity = identity.as_metrics()
    return meter
