"""Peak memory of a piece of work, as the allocator saw it: temporaries inside operations included."""

from __future__ import annotations

import os

import torch

_MARK = "kvquant.peak_memory.mark"


class PeakMemory:
    """Measures the body of a ``with`` block: how far allocations rose above where they stood at its start.

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
