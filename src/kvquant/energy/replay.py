"""A meter that plays a recorded trace: the same code as a live one, without a device and without waiting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from kvquant.energy.sampling import SampledMeter
from kvquant.energy.traces import CounterLimits, Sample
from kvquant.energy.windows import MEASURED, CarbonIntensity
from kvquant.errors import MeterUnavailable


class ReplayClock:
    """Time that passes when it is told to.

    Attributes:
        time_s: now.
    """

    def __init__(self, time_s: float = 0.0) -> None:
        self.time_s = time_s

    def advance(self, seconds: float) -> None:
        """Let time pass: the work of a replayed window."""
        self.time_s += seconds


class RecordedSampler:
    """Hands out the samples of a trace that lie around a window.

    Attributes:
        busy_s, cpu_s: reading costs nothing.
        seen_tick_s: the recording itself says.
        reads: nobody reads.

    Args:
        trace: in order of time.
        clock: whose time it is.
        margin_s: how far beyond a window's edges samples are handed out.
    """

    busy_s = cpu_s = 0.0
    seen_tick_s = None
    reads: list[tuple[float, float]] | None = None

    def __init__(self, trace: Sequence[Sample], clock: ReplayClock, margin_s: float) -> None:
        self._trace, self._clock, self._margin_s = list(trace), clock, margin_s
        self._starts_s: list[float] = []

    def now_s(self) -> float:
        """The recording's time, seconds."""
        return self._clock.time_s

    def start(self, poll_s: float) -> None:
        """See :class:`kvquant.energy.sampling.Sampler`."""
        self._starts_s.append(self._clock.time_s)

    def stop(self, end_s: float) -> list[Sample]:
        """See :class:`kvquant.energy.sampling.Sampler`."""
        low, high = self._starts_s.pop() - self._margin_s, end_s + self._margin_s
        return [s for s in self._trace if low <= s.time_s <= high]

    def close(self) -> None:
        """Nothing runs."""


def replay_meter(
    trace: Sequence[Sample],
    clock: ReplayClock,
    limits: CounterLimits,
    intensity: CarbonIntensity,
    *,
    source: str = "replay of a recorded trace",
) -> SampledMeter:
    """Return a meter over a recorded trace; windows last as long as ``clock`` is advanced inside them."""
    sampler = RecordedSampler(trace, clock, 3 * limits.tick_s)
    return SampledMeter(source, MEASURED, intensity, sampler, limits, poll_s=max(limits.tick_s, 0.05))


def load_trace(path: Path | str) -> list[Sample]:
    """Read a trace: JSON lines with ``time_s`` and any of ``counter_j``, ``power_w``, ``state``.

    Raises:
        MeterUnavailable: it is missing, or no such trace.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return sorted((Sample(**json.loads(line)) for line in lines if line.strip()), key=lambda s: s.time_s)
    except (OSError, ValueError, TypeError) as error:
        raise MeterUnavailable(
            f"a trace must be JSON lines with time_s and counter_j, {path} is not ({error})"
        ) from error
