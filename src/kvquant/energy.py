"""Joules of a piece of work, from the best meter this machine has, each result marked measured or estimated.

Counters (NVML for the GPU, RAPL for the processor) are read at a window's two edges. Without one, CodeCarbon's
offline model of the processor and memory estimates, and failing that a constant wattage does. Nothing here uses a
network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from kvquant.errors import ConfigError, MeterError

log = logging.getLogger(__name__)

MEASURED, ESTIMATED = "measured", "estimated"
JOULES_PER_KWH = 3.6e6
POWERCAP = Path("/sys/class/powercap")
# Of a laptop or a small server under load; only so that a machine that tells nothing still has an order of magnitude.
CONSTANT_W = 65.0


@dataclasses.dataclass(frozen=True)
class CarbonIntensity:
    """How much CO2 a grid emits per unit of electricity.

    Attributes:
        g_per_kwh: grams of CO2 equivalent per kilowatt-hour.
        source: table, country and year the figure is from.
    """

    g_per_kwh: float
    source: str


@dataclasses.dataclass
class Window:
    """One measured stretch of work; its numbers are there once the ``with`` block has ended.

    Attributes:
        name: what was measured.
        source: the meter, in words.
        kind: ``measured`` or ``estimated``.
        duration_s: wall-clock seconds.
        energy_j: joules, None where nothing meters.
        carbon_gco2e: grams of CO2 equivalent at the grid's intensity.
    """

    name: str
    source: str
    kind: str
    intensity: CarbonIntensity
    duration_s: float = 0.0
    energy_j: float | None = None

    @property
    def carbon_gco2e(self) -> float | None:
        """energy_j / 3.6e6 * intensity."""
        return None if self.energy_j is None else self.energy_j / JOULES_PER_KWH * self.intensity.g_per_kwh

    def as_metrics(self) -> dict[str, Any]:
        """Return the window as it goes into a result."""
        return {
            "energy_j": self.energy_j,
            "energy_window_s": self.duration_s,
            "carbon_gco2e": self.carbon_gco2e,
            "energy_kind": self.kind,
            "energy_source": self.source,
            "carbon_intensity_g_per_kwh": self.intensity.g_per_kwh,
            "carbon_source": self.intensity.source,
        }


class Meter(Protocol):
    """Anything that turns a stretch of work into joules."""

    source: str
    kind: str

    def window(self, name: str) -> AbstractContextManager[Window]:
        """Measure the body of a ``with`` statement."""

    def close(self) -> None:
        """Release what the meter holds."""


class CounterMeter:
    """A meter whose joules are the difference of two readings of a running total.

    Args:
        source: the meter, in words.
        kind: ``measured`` or ``estimated``.
        intensity: the grid's carbon intensity.
        read_j: returns the running total in joules; None meters nothing.
        synchronize: waits for the device, so that a window's edges hold the work between them.
        close: releases what ``read_j`` needs.
    """

    def __init__(
        self,
        source: str,
        kind: str,
        intensity: CarbonIntensity,
        read_j: Callable[[], float] | None,
        *,
        synchronize: Callable[[], None] | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.source = source
        self.kind = kind
        self.intensity = intensity
        self._read_j = read_j
        self._synchronize = synchronize or (lambda: None)
        self._close = close or (lambda: None)

    @contextlib.contextmanager
    def window(self, name: str) -> Iterator[Window]:
        """Measure the body of a ``with`` statement; windows may be nested."""
        window = Window(name, self.source, self.kind, self.intensity)
        self._synchronize()
        before_j = self._read_j() if self._read_j else None
        start_s = time.perf_counter()
        try:
            yield window
        finally:
            self._synchronize()
            window.duration_s = time.perf_counter() - start_s
            if self._read_j is not None and before_j is not None:
                window.energy_j = self._read_j() - before_j

    def close(self) -> None:
        """Release what the meter holds."""
        self._close()


class CodeCarbonMeter:
    """CodeCarbon's offline model: processor by load and design power, memory by size; windows do not nest.

    Args:
        intensity: the grid's carbon intensity.
        country: three-letter code, for CodeCarbon's own records.

    Raises:
        MeterError: CodeCarbon does not start.
    """

    source = "CodeCarbon, CPU and RAM model"
    kind = ESTIMATED

    def __init__(self, intensity: CarbonIntensity, country: str) -> None:
        self.intensity = intensity
        _quiet_codecarbon()
        try:
            from codecarbon import OfflineEmissionsTracker

            # A measuring interval no window reaches: the edges measure, and no thread runs between them.
            self._tracker: Any = OfflineEmissionsTracker(
                country_iso_code=country,
                measure_power_secs=3600,
                output_methods=[],
                allow_multiple_runs=True,
                log_level="critical",
            )
            # The first task looks up the hardware, which takes over a second: here, not inside a window.
            self._tracker.start_task("warm-up")
            if self._tracker.stop_task() is None:
                raise MeterError(
                    "CodeCarbon must be able to start a task, got none; try energy.meter=constant"
                )
        except MeterError:
            raise
        except Exception as error:
            raise MeterError(
                f"CodeCarbon must start offline, got {error}; try energy.meter=constant"
            ) from error
        self._active: str | None = None

    @contextlib.contextmanager
    def window(self, name: str) -> Iterator[Window]:
        """Estimate the body of a ``with`` statement.

        Raises:
            MeterError: another window is open.
        """
        if self._active is not None:
            raise MeterError(
                f"CodeCarbon windows cannot be nested, got {name} inside {self._active}; close it first"
            )
        window = Window(name, self.source, self.kind, self.intensity)
        self._active = name
        self._tracker.start_task()
        start_s = time.perf_counter()
        try:
            yield window
        finally:
            window.duration_s = time.perf_counter() - start_s
            data = self._tracker.stop_task()
            self._active = None
            if data is not None:
                window.energy_j = float(data.energy_consumed) * JOULES_PER_KWH

    def close(self) -> None:
        """Nothing runs between windows."""


def _quiet_codecarbon() -> None:
    # It logs from its constructor, before it has read the level it is given there.
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)


def carbon_intensity(country: str) -> CarbonIntensity:
    """Return a country's intensity from the table that comes with CodeCarbon.

    Args:
        country: ISO 3166 code of three letters.

    Raises:
        ConfigError: the table does not know the country.
        MeterError: there is no table.
    """
    _quiet_codecarbon()
    try:
        from codecarbon.input import DataSource

        table = json.loads(Path(DataSource().global_energy_mix_data_path).read_text(encoding="utf-8"))
    except Exception as error:
        raise MeterError(
            f"CodeCarbon's carbon table must be readable, got {error}; install codecarbon"
        ) from error
    if country not in table:
        raise ConfigError(f"energy.country must be in CodeCarbon's table, got {country}; try POL")
    entry = table[country]
    source = f"CodeCarbon energy mix, {entry['country_name']} {entry['year']}"
    return CarbonIntensity(float(entry["carbon_intensity"]), source)


def open_nvml(intensity: CarbonIntensity) -> Meter:
    """Open the total-energy counter of the current CUDA device, matched by UUID (indices differ between tools).

    Raises:
        MeterError: no GPU, no driver, or a GPU without the counter.
    """
    try:
        import pynvml
        import torch

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")

        def read_j() -> float:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000

        read_j()
    except Exception as error:
        raise MeterError(
            f"NVML's energy counter must be readable, got {error}; try energy.meter=auto"
        ) from error
    source = f"NVML total energy counter, {properties.name}, GPU alone"
    return CounterMeter(
        source, MEASURED, intensity, read_j, synchronize=torch.cuda.synchronize, close=pynvml.nvmlShutdown
    )


class RaplCounter:
    """The running total of all processor packages and their memory, past the counters' wrap-around.

    Args:
        root: the powercap folder.

    Raises:
        MeterError: no package counter can be read (newer kernels allow it to root alone).
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones: list[tuple[Path, float]] = []
        self._last_uj: list[float] = []
        try:
            for zone in sorted(root.glob("intel-rapl:*")):
                name = (zone / "name").read_text().strip()
                # Cores and graphics are part of the package: counting them again would double them.
                if name.startswith("package") or name == "dram":
                    self._zones.append(
                        (zone / "energy_uj", float((zone / "max_energy_range_uj").read_text()))
                    )
            self._last_uj = [float(path.read_text()) for path, _ in self._zones]
        except (OSError, ValueError) as error:
            raise MeterError(f"RAPL must be readable, got {error}; try energy.meter=auto") from error
        if not self._zones:
            raise MeterError(
                f"RAPL must have a package counter, got none under {root}; try energy.meter=auto"
            )
        self._total_uj = 0.0

    def read_j(self) -> float:
        """Return joules since this counter was opened."""
        for index, (path, range_uj) in enumerate(self._zones):
            now_uj = float(path.read_text())
            self._total_uj += (now_uj - self._last_uj[index]) % range_uj
            self._last_uj[index] = now_uj
        return self._total_uj / 1e6


def open_rapl(intensity: CarbonIntensity) -> Meter:
    """Open the processor's own counters.

    Raises:
        MeterError: they cannot be read.
    """
    return CounterMeter("RAPL, CPU package and DRAM", MEASURED, intensity, RaplCounter().read_j)


def open_constant(intensity: CarbonIntensity) -> Meter:
    """Open the last resort: seconds times a constant wattage."""
    source = f"constant {CONSTANT_W:.0f} W, not a meter"
    return CounterMeter(source, ESTIMATED, intensity, lambda: time.perf_counter() * CONSTANT_W)


def open_meter(name: str = "auto", *, country: str = "POL", use_cuda: bool = False) -> Meter:
    """Open a meter; takes a second or two, so call it before what is measured.

    Args:
        name: ``auto``, ``nvml``, ``rapl``, ``codecarbon``, ``constant`` or ``none``.
        country: whose grid the electricity comes from, three letters.
        use_cuda: whether the work runs on a GPU; ``auto`` then prefers its counter.

    Raises:
        MeterError: the meter asked for by name cannot be read; ``auto`` takes the next best instead.
        ConfigError: the country is unknown.
    """
    try:
        intensity = carbon_intensity(country)
    except MeterError:
        # The world average CodeCarbon's documentation names: its absence costs a figure's precision, not the run.
        intensity = CarbonIntensity(475.0, "world average, constant (no country table at hand)")
    if name == "none":
        return CounterMeter("none", ESTIMATED, intensity, None)
    openers: dict[str, Callable[[], Meter]] = {
        "nvml": lambda: open_nvml(intensity),
        "rapl": lambda: open_rapl(intensity),
        "codecarbon": lambda: CodeCarbonMeter(intensity, country),
        "constant": lambda: open_constant(intensity),
    }
    if name != "auto":
        return openers[name]()
    # RAPL never sees a GPU, so beside one it would report the smaller part as the whole.
    order = ("nvml", "codecarbon", "constant") if use_cuda else ("rapl", "codecarbon", "constant")
    for candidate in order:
        try:
            return openers[candidate]()
        except MeterError as error:
            log.info("energy meter %s: %s", candidate, error)
    raise MeterError("no energy meter could be opened; try energy.meter=none")
