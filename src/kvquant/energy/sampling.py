"""Meters that read a device while a window is open: by a thread, or from a recording."""

from __future__ import annotations

import bisect
import functools
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvquant.energy.traces import CounterLimits, Sample, counter_energy, integrated_power, observed_tick_s
from kvquant.energy.windows import CarbonIntensity, Meter, Window
from kvquant.errors import MeterError, MeterUnavailable

# Counters that change faster need no waiting for their tick: an edge's own reading is exact enough.
FAST_TICK_S = 0.005
# So many ticks in a row are watched to learn how long one is.
TICKS_SEEN = 3
# Power that nobody looked at for longer is not integrated.
MAX_POWER_GAP_S = 0.5


class Sampler(Protocol):
    """Where samples come from."""

    def start(self, poll_s: float) -> None:
        """A window opens: sample at least every ``poll_s`` from now on."""

    def stop(self, end_s: float) -> list[Sample]:
        """A window closes: return what was sampled up to a tick after its last edge."""

    def now_s(self) -> float:
        """The clock of the samples."""

    reads: list[tuple[float, float]] | None

    @property
    def busy_s(self) -> float:
        """Seconds spent reading so far."""

    @property
    def cpu_s(self) -> float:
        """Seconds of a processor that reading in the background took so far."""

    @property
    def seen_tick_s(self) -> float | None:
        """Seconds between two changes of the counter, if that is known better than from the samples."""

    def close(self) -> None:
        """Stop at once."""


class ThreadSampler:
    """Reads a device in a background thread that lives only while a window is open.

    Args:
        read: takes one reading of the counter, as fast as can be; called at edges until the counter has changed.
        tick_s: how long to wait for the counter's next change at an edge; 0: not at all.
        look: takes one reading of whatever there is to know between edges; ``look(True)``, at a window's first and
            last edge, of everything. None: ``read`` sees it all.

    Attributes:
        busy_s: seconds spent reading so far, waiting for the driver included.
        cpu_s: seconds of a processor that the threads took so far, asleep in the driver or not: what reading beside the
            work costs at most where the work has a processor of its own.
        reads: start and end of every reading of the thread, seconds, if set to a list.
        seen_tick_s: seconds between two changes of the counter, learned at the first window's edge.

    Raises:
        MeterError: (from :meth:`stop`) a reading failed meanwhile.
    """

    def __init__(
        self,
        read: Callable[[], Sample],
        tick_s: float = 0.0,
        look: Callable[[bool], Sample] | None = None,
    ) -> None:
        self._read, self._tick_s, self._look = read, tick_s, look
        self._samples: list[Sample] = []
        self._open: list[tuple[float, float]] = []  # (first edge, poll_s) of every open window
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.busy_s = self.cpu_s = 0.0
        self.reads: list[tuple[float, float]] | None = None
        self.seen_tick_s: float | None = None

    def now_s(self) -> float:
        """The clock of the samples, seconds."""
        return time.perf_counter()

    def start(self, poll_s: float) -> None:
        """See :class:`Sampler`."""
        first = not self._open
        if first:
            self._error = None
        if self._look is not None:
            self._take(functools.partial(self._look, True))
        sample = self._take(self._read)
        with self._changed:
            self._open.append((sample.time_s, poll_s))
            self._changed.notify_all()
        if first:
            self._thread = threading.Thread(target=self._run, name="kvquant-energy", daemon=True)
            self._thread.start()
        try:
            ticked = self._wait_for_tick(sample)
            if ticked and self.seen_tick_s is None:
                # Once: polled as densely as here, changes in a row say how long a tick really is.
                self.seen_tick_s = self._ticks_in_a_row(ticked)
        except BaseException:
            self._leave()
            raise

    def stop(self, end_s: float) -> list[Sample]:
        """See :class:`Sampler`."""
        try:
            if self._error is None:
                if self._look is not None:
                    self._take(functools.partial(self._look, False))
                self._wait_for_tick(self._take(self._read))
                if self._look is not None:
                    self._take(functools.partial(self._look, True))
        finally:
            samples = self._leave()
        if isinstance(self._error, MeterError):
            raise self._error
        if self._error is not None:
            raise MeterUnavailable(f"the meter must go on answering, got {self._error}; measure again")
        return samples

    def _ticks_in_a_row(self, ticked: Sample) -> float | None:
        """Median seconds between the next changes, since a busy host may see one of them late; None without any."""
        times = [ticked.time_s]
        while len(times) <= TICKS_SEEN:
            following = self._wait_for_tick(ticked)
            if following is None:
                break
            ticked = following
            times.append(ticked.time_s)
        return statistics.median(b - a for a, b in itertools.pairwise(times)) if len(times) > 1 else None

    def _leave(self) -> list[Sample]:
        """Close the innermost window; the thread goes with the last one. Returns the window's samples."""
        with self._changed:
            start_s, _ = self._open.pop()
            samples = [s for s in self._samples if s.time_s >= start_s - 3 * self._tick_s]
            if self._open:
                # What no open window needs any more is forgotten.
                oldest = min(start for start, _ in self._open) - 3 * self._tick_s
                del self._samples[: bisect.bisect_left(self._samples, oldest, key=lambda s: s.time_s)]
        if not self._open:
            self.close()
        return samples

    def close(self) -> None:
        """Stop the thread and wait until it is gone."""
        with self._changed:
            self._open.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._samples.clear()

    def _take(self, read: Callable[[], Sample]) -> Sample:
        with self._changed:
            before_s = self.now_s()
            sample = read()
            self.busy_s += self.now_s() - before_s
            self._samples.append(sample)
        return sample

    def _run(self) -> None:
        cpu_s = 0.0
        while True:
            with self._changed:
                if not self._open:
                    return
                self._changed.wait(min(poll_s for _, poll_s in self._open))
                if not self._open:
                    return
            before_s = self.now_s()
            try:
                self._take(self._read if self._look is None else functools.partial(self._look, False))
            except Exception as error:
                # A thread has nobody to raise to: whatever it was is told to whoever closes the window.
                self._error = error
                return
            if self.reads is not None:
                self.reads.append((before_s, self.now_s()))
            thread_s = time.thread_time()
            self.cpu_s += thread_s - cpu_s
            cpu_s = thread_s

    def _wait_for_tick(self, seen: Sample) -> Sample | None:
        """Wait until the counter has changed since ``seen``, for three ticks at most; returns the sample that saw it."""
        if self._tick_s <= FAST_TICK_S:
            return None
        deadline_s = self.now_s() + 3 * self._tick_s
        while self.now_s() < deadline_s and self._error is None:
            sample = self._take(self._read)
            if sample.counter_j != seen.counter_j:
                return sample
            time.sleep(self._tick_s / 50)
        return None


class SampledMeter(Meter):
    """A meter over samples of a counter and, where there is one, of power.

    Args:
        sampler: where samples come from.
        limits: what the counter can do.
        poll_s: how often to sample by default.
        on_close: releases the device.
    """

    def __init__(
        self,
        source: str,
        kind: str,
        intensity: CarbonIntensity,
        sampler: Sampler,
        limits: CounterLimits,
        *,
        poll_s: float,
        synchronize: Callable[[], None] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(source, kind, intensity, synchronize=synchronize)
        self._sampler, self._limits, self._poll_s = sampler, limits, poll_s
        self._on_close = on_close

    @property
    def tick_s(self) -> float:
        """Seconds between two changes of the counter: as seen, before the first window as it may be at most."""
        return self._sampler.seen_tick_s or self._limits.tick_s

    def now_s(self) -> float:
        """The sampler's clock, seconds."""
        return self._sampler.now_s()

    def _open(self, poll_s: float | None) -> tuple[float, float]:
        self._sampler.start(poll_s or self._poll_s)
        return self._sampler.busy_s, self._sampler.cpu_s

    def _measure(self, window: Window, opened: tuple[float, float], start_s: float, end_s: float) -> None:
        # Before the last edge's own readings: the work is over by then.
        busy_s, cpu_s = self._sampler.busy_s - opened[0], self._sampler.cpu_s - opened[1]
        samples = self._sampler.stop(end_s)
        window.tick_s = self._sampler.seen_tick_s or observed_tick_s(samples)
        max_gap_s = max(MAX_POWER_GAP_S, 5 * self._poll_s)
        for field in sorted({name for s in samples for name in s.power_w}):
            joules = integrated_power(samples, field, start_s, end_s, max_gap_s)
            if joules is not None:
                window.polled_j[field] = joules
        states = [s.state for s in samples if s.state is not None]
        window.state = summarize_states(states)
        if window.duration_s > 0:
            window.state["reading_percent"] = 100 * busy_s / window.duration_s
            window.state["reading_cpu_percent"] = 100 * cpu_s / window.duration_s
        window.energy_j = counter_energy(samples, start_s, end_s, self._limits, window.tick_s)

    def note_reads(self) -> list[tuple[float, float]]:
        """Return a list that gets start and end of every background reading from now on, seconds."""
        reads: list[tuple[float, float]] = []
        self._sampler.reads = reads
        return reads

    def close(self) -> None:
        """Stop sampling and release the device."""
        self._sampler.close()
        if self._on_close is not None:
            self._on_close()


def summarize_states(states: Sequence[Any]) -> dict[str, Any]:
    """Mean of what is a number, union of what is a list; None of what the device never told."""
    out: dict[str, Any] = {}
    for key in dict.fromkeys(k for state in states for k in state):
        values = [state[key] for state in states if state.get(key) is not None]
        if not values:
            out[key] = None
        elif isinstance(values[0], int | float):
            out[key] = sum(values) / len(values)
        else:
            out[key] = sorted({entry for value in values for entry in value})
    return out
