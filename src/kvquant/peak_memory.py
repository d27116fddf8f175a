"""Peak memory of a piece of work, as the allocator saw it: temporaries inside operations included."""

from __future__ import annotations

import torch


class PeakMemory:
    """Measures the body of a ``with`` block: how far allocations rose above where they stood at its start.

    On a CPU it reads torch's profiler, which slows the body down: measure time apart.

    Args:
        device: whose memory.

    Attributes:
        extra_bytes: highest total of tensors alive at once, less what was alive at the start; after the block.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.extra_bytes = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profile.__enter__()
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
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        total = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            total += event.nbytes()  # type: ignore[attr-defined]
            self.extra_bytes = max(self.extra_bytes, total)
