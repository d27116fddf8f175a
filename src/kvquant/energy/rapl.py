"""Intel's and AMD's own counters of processor packages and memory, through Linux powercap.

They count the whole machine, so that joules belong to a job alone on an exclusive node only; newer kernels let root
alone read them.
"""

from __future__ import annotations

import time
from pathlib import Path

from kvquant.energy.sampling import SampledMeter, ThreadSampler
from kvquant.energy.traces import CounterLimits, Sample, unwrapped
from kvquant.energy.windows import MEASURED, CarbonIntensity
from kvquant.errors import MeterUnavailable

POWERCAP = Path("/sys/class/powercap")
TICK_S = 0.001
# A counter of 262 kJ wraps in a quarter of an hour at most: reading it every few seconds misses no wrap.
POLL_S = 2.0
# More than any one package or its memory draws.
ZONE_MAX_W = 1500.0


class RaplCounter:
    """The running total of all processor packages and their memory, past the counters' wrap-around.

    Args:
        root: the powercap folder.

    Raises:
        MeterUnavailable: no package counter can be read (newer kernels allow it to root alone).
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones: list[tuple[Path, CounterLimits]] = []
        try:
            for zone in sorted(root.glob("intel-rapl:*")):
                name = (zone / "name").read_text().strip()
                # Cores and graphics are part of the package: counting them again would double them.
                if name.startswith("package") or name == "dram":
                    range_j = float((zone / "max_energy_range_uj").read_text()) / 1e6
                    self._zones.append((zone / "energy_uj", CounterLimits(TICK_S, ZONE_MAX_W, range_j)))
            self._last = [_read(path) for path, _ in self._zones]
        except (OSError, ValueError) as error:
            raise MeterUnavailable(
                f"RAPL must be readable, got {error}; run as root or try energy.meter=auto"
            ) from error
        if not self._zones:
            raise MeterUnavailable(
                f"RAPL must have a package counter, got none under {root}; try energy.meter=auto"
            )
        self._total_j = 0.0

    @property
    def limits(self) -> CounterLimits:
        """Of the sum of all zones, wraps already undone."""
        return CounterLimits(TICK_S, ZONE_MAX_W * len(self._zones))

    def sample(self) -> Sample:
        """Read all zones.

        Raises:
            MeterUnavailable: one cannot be read any more.
            CounterReset: a zone fell further than a wrap explains.
            CounterJumped: a zone rose faster than a processor can.
        """
        for index, (path, limits) in enumerate(self._zones):
            now = _read(path)
            pair, self._last[index] = [self._last[index], now], now
            self._total_j += unwrapped(pair, limits)[-1][1]
        return Sample(time.perf_counter(), self._total_j)

    def read_j(self) -> float:
        """Return joules since this counter was opened."""
        return self.sample().counter_j or 0.0


def _read(path: Path) -> Sample:
    try:
        return Sample(time.perf_counter(), float(path.read_text()) / 1e6)
    except (OSError, ValueError) as error:
        raise MeterUnavailable(
            f"RAPL must be readable, got {error}; run as root or try energy.meter=auto"
        ) from error


def open_rapl(intensity: CarbonIntensity, root: Path = POWERCAP) -> SampledMeter:
    """Open the processor's own counters.

    Raises:
        MeterUnavailable: they cannot be read.
    """
    counter = RaplCounter(root)
    return SampledMeter(
        "RAPL, CPU package and DRAM of the whole machine",
        MEASURED,
        intensity,
        ThreadSampler(counter.sample),
        counter.limits,
        poll_s=POLL_S,
    )
