"""Peak memory of a piece of work: as the allocator saw it, or as the operating system did."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_MARK = "kvquant.peak_memory.mark"


class PeakMemory:
    """Measures the body of a ``with`` block: how far allocations rose above where they stood at its start.

    Temporaries inside operations are counted, to the byte; what other libraries allocate is not
    (:func:`peak_extra_bytes` sees that too, page by page).

    On a CPU it reads torch's profiler, which slows the body down (measure time apart) and sees only memory that was
    allocated inside the block: what the body frees or replaces must be built inside it too, before :meth:`mark`.

    Args:
        device: whose memory.

    Attributes:
        extra_bytes: highest total of tensors alive at once after the mark (without one: after the start), less what
            was alive then; set when the block ends.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.extra_bytes = 0

    def mark(self) -> None:
        """Count from here on: what is alive now is the baseline."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            with torch.profiler.record_function(_MARK):
                pass

    def __enter__(self) -> PeakMemory:
        if self._device.type != "cuda":
            # Its library writes a line to stderr at every start and stop; read once, when the first profile begins.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profile.__enter__()
        self.mark()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.extra_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._profile.__exit__(*exc)  # type: ignore[arg-type]
        profiler = self._profile.profiler
        assert profiler is not None and profiler.kineto_results is not None
        # The public event list adds allocations up per operation; only the raw events have their order in time.
        events = [event for event in profiler.kineto_results.events() if event.name() in ("[memory]", _MARK)]
        alive = baseline = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == _MARK:
                baseline, self.extra_bytes = alive, 0
            else:
                alive += event.nbytes()  # type: ignore[attr-defined]
                self.extra_bytes = max(self.extra_bytes, alive - baseline)


def peak_extra_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """Run ``work`` and return the most memory it held at once beyond what was held before, all threads included.

    On a CPU that is the growth of the process's resident set, with the allocator's free memory given back first, and
    needs Linux; None elsewhere.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):  # no such file or no glibc
        return None
    before = _status_bytes("VmRSS")
    work()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")
