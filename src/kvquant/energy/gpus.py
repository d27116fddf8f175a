"""Which GPU is metered and who else draws power from it: by UUID, because indices differ between tools."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from kvquant.errors import MeterUnavailable

# Reasons for lower clocks that make a figure invalid; the software power cap is normal under prefill.
INVALID_SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
NORMAL_SLOWDOWNS = {0x02: "application clocks", 0x04: "software power cap", 0x10: "sync boost"}


@contextlib.contextmanager
def driver_errors(nvml: Any) -> Iterator[None]:
    """Turn whatever NVML raises inside into a :class:`MeterUnavailable`."""
    try:
        yield
    except nvml.NVMLError as error:
        raise MeterUnavailable(
            f"NVML must answer for this GPU, got {error}; measure again, or try energy.meter=auto"
        ) from error


@dataclasses.dataclass(frozen=True)
class GpuIdentity:
    """What a GPU counter's joules belong to.

    Attributes:
        name: the product.
        uuid: of the whole GPU.
        mig: whether it is cut into slices; the counter is then that of all of them together.
        gpus: how many GPUs the machine shows.
        power_limit_w: what the board may draw; None: not told.
        other_processes: processes on it that are not this one; None: the driver does not tell.
    """

    name: str
    uuid: str
    mig: bool
    gpus: int
    power_limit_w: float | None
    other_processes: int | None

    def as_metrics(self) -> dict[str, Any]:
        """Return it as it goes into a result."""
        return dataclasses.asdict(self)


def find_gpu(nvml: Any, cuda_uuid: str) -> tuple[Any, GpuIdentity]:
    """Return NVML's handle of the GPU that CUDA calls ``cuda_uuid``, and who shares it.

    Args:
        nvml: the module pynvml, initialised.
        cuda_uuid: with or without its ``GPU-`` or ``MIG-``.

    Raises:
        MeterUnavailable: NVML knows no such GPU, or does not answer.
    """
    bare = cuda_uuid.removeprefix("GPU-").removeprefix("MIG-")
    handle, is_slice = None, False
    for prefix in ("GPU-", "MIG-"):
        with contextlib.suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetHandleByUUID(f"{prefix}{bare}")
            is_slice = prefix == "MIG-"
            break
    if handle is None:
        raise MeterUnavailable(
            f"NVML must know the GPU that CUDA uses, got none with UUID {cuda_uuid}; try energy.meter=codecarbon"
        )
    with driver_errors(nvml):
        if is_slice:
            handle = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        identity = GpuIdentity(
            name=_text(nvml.nvmlDeviceGetName(handle)),
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            mig=is_slice or _mig_enabled(nvml, handle),
            gpus=nvml.nvmlDeviceGetCount(),
            power_limit_w=_power_limit_w(nvml, handle),
            other_processes=other_processes(nvml, handle),
        )
    return handle, identity


def other_processes(nvml: Any, handle: Any) -> int | None:
    """How many processes use the GPU beside this one; None when the driver does not tell.

    In a container the driver numbers processes as the host does, so that this one cannot find itself: it then takes
    itself for one of those listed.
    """
    try:
        pids = {p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    except nvml.NVMLError:
        return None
    return len(pids - {os.getpid()}) if os.getpid() in pids else max(0, len(pids) - 1)


def gpus_in_use() -> int:
    """How many GPUs this process holds memory on: a meter of one of them misses what the others draw."""
    import torch

    return sum(torch.cuda.memory_reserved(index) > 0 for index in range(torch.cuda.device_count()))


def slowdowns(nvml: Any, handle: Any) -> dict[str, list[str]]:
    """Why clocks are lower than they could be: ``invalid`` reasons and ``normal`` ones."""
    try:
        read = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        bits = (read or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(handle)
    except nvml.NVMLError:
        return {"invalid_slowdowns": [], "normal_slowdowns": ["not told by the driver"]}
    return {
        "invalid_slowdowns": [name for bit, name in INVALID_SLOWDOWNS.items() if bits & bit],
        "normal_slowdowns": [name for bit, name in NORMAL_SLOWDOWNS.items() if bits & bit],
    }


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _mig_enabled(nvml: Any, handle: Any) -> bool:
    try:
        return nvml.nvmlDeviceGetMigMode(handle)[0] == 1
    except nvml.NVMLError:  # GPUs that cannot be cut
        return False


def _power_limit_w(nvml: Any, handle: Any) -> float | None:
    try:
        return nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    except nvml.NVMLError:
        return None
