"""How long a piece of work takes on its device: medians over cold inputs, launches kept out of them."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Way = Callable[[int], object]
"""Work on one of several equal inputs, by number: successive calls must not find the last one's input in a cache."""

# Cycles that the GPU waits before a measured call (about half a millisecond), so that the host is ahead of it and the
# time between two events is the device's alone.
_HEAD_START_CYCLES = 1_000_000
_FEWEST_REPEATS = 3
# Of ways that take turns on a machine that others use too.
_FEWEST_TURNS = 7


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over repeats, and the 10th and 90th percentile."""

    median_s: float
    low_s: float
    high_s: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarize repeats."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered),
            ordered[round(0.1 * last)],
            ordered[round(0.9 * last)],
            len(ordered),
        )


@dataclasses.dataclass(frozen=True)
class Clock:
    """Measures ways on one device.

    Args:
        device: where the work runs.
        seconds: what one measurement may take, warm-up apart; at least three repeats run whatever they take.
        most_repeats: repeats at most.
    """

    device: torch.device
    seconds: float = 0.2
    most_repeats: int = 50

    def measure(self, way: Way, copies: int = 1, *, prepare: Callable[[int], object] | None = None) -> Timing:
        """Time a way, its inputs in turn; the first call warms up and compiles.

        Args:
            way: the work.
            copies: how many inputs there are.
            prepare: put an input back as it was, untimed.
        """
        for _ in range(2):  # the second call shows what a repeat takes
            if prepare is not None:
                prepare(0)
            self.wait()
            start_s = time.perf_counter()
            way(0)
            self.wait()
            once_s = time.perf_counter() - start_s
        repeats = int(self.seconds / max(once_s, 1e-9))
        repeats = max(_FEWEST_REPEATS, min(self.most_repeats, repeats))
        order = [(i + 1) % copies for i in range(repeats)]
        return Timing.of((self._by_events if self.is_cuda else self._by_clock)(way, order, prepare))

    def in_turns(self, ways: Sequence[Way], copies: int = 1) -> list[Timing]:
        """Time several ways that take turns: what else a machine does then meets them all alike.

        Args:
            ways: each is called once to warm up.
            copies: how many inputs there are.
        """
        for way in ways:
            way(0)
        seconds: list[list[float]] = [[] for _ in ways]
        start_s, turn = time.perf_counter(), 0
        while turn < _FEWEST_TURNS or (
            turn < self.most_repeats and time.perf_counter() - start_s < self.seconds
        ):
            turn += 1
            for way, found in zip(ways, seconds, strict=True):
                found += (self._by_events if self.is_cuda else self._by_clock)(way, [turn % copies], None)
        return [Timing.of(found) for found in seconds]

    def eager_s(self, way: Way, copies: int, repeats: int = 20) -> float:
        """Seconds of a call among many in a row, what the host takes to launch it included."""
        self.wait()
        start_s = time.perf_counter()
        for i in range(repeats):
            way(i % copies)
        self.wait()
        return (time.perf_counter() - start_s) / repeats

    def graph(self, way: Way, copies: int) -> Timing:
        """Time a call as part of a CUDA graph that holds one call for each input.

        Raises:
            RuntimeError: the work cannot be captured (it waits for the host, say).
        """
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for i in range(copies):
                way(i)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(copies):
                way(i)
        whole = self.measure(lambda _: graph.replay())
        return Timing(
            whole.median_s / copies, whole.low_s / copies, whole.high_s / copies, whole.repeats * copies
        )

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has done all it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def _by_events(self, way: Way, order: list[int], prepare: Callable[[int], object] | None) -> list[float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in order]
        for i, (start, end) in zip(order, marks, strict=True):
            if prepare is not None:
                prepare(i)
            torch.cuda._sleep(_HEAD_START_CYCLES)
            start.record()
            way(i)
            end.record()
        self.wait()
        return [start.elapsed_time(end) / 1e3 for start, end in marks]

    def _by_clock(self, way: Way, order: list[int], prepare: Callable[[int], object] | None) -> list[float]:
        seconds = []
        for i in order:
            if prepare is not None:
                prepare(i)
            start_s = time.perf_counter()
            way(i)
            seconds.append(time.perf_counter() - start_s)
        return seconds

    def copy_bytes_per_s(self) -> float:
        """Bytes read and written per second by a copy too large for any cache."""
        source = torch.empty(2**30 if self.is_cuda else 2**27, dtype=torch.uint8, device=self.device)
        source.random_()
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.measure(lambda _: target.copy_(source)).median_s


@functools.lru_cache(maxsize=4)
def cache_bytes(device: torch.device) -> int:
    """Bytes of the device's last-level cache; 32 MiB where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)


def copies_past_cache(num_bytes: int, device: torch.device, most: int) -> int:
    """How many inputs of ``num_bytes`` bytes to take in turn so that none is cached when its turn comes again."""
    return max(1, min(most, -(-2 * cache_bytes(device) // num_bytes) + 1))
