"""CodeCarbon: carbon intensities of countries, and an estimate of energy where nothing measures it."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import time
from pathlib import Path
from typing import Any

from kvquant.energy.windows import ESTIMATED, JOULES_PER_KWH, CarbonIntensity, Meter, Window
from kvquant.errors import ConfigError, MeterUnavailable
from kvquant.provenance import cpu_name


class CodeCarbonMeter(Meter):
    """CodeCarbon's offline model: processor by load and design power, memory by size.

    It charges a constant power for memory and mostly time for the processor, so that its joules say how long
    something took on what kind of machine; they never compare methods.

    CodeCarbon's own tasks do not nest. Time is therefore cut at every edge, and each piece belongs to all windows that
    are open during it.

    Args:
        intensity: the grid's carbon intensity.
        country: three-letter code, for CodeCarbon's own records.

    Raises:
        MeterUnavailable: CodeCarbon does not start.
    """

    def __init__(self, intensity: CarbonIntensity, country: str) -> None:
        super().__init__("CodeCarbon, CPU model", ESTIMATED, intensity)
        _quiet_codecarbon()
        _name_processor()
        self._open_windows: list[list[float]] = []  # joules so far of each open window
        before_s = time.perf_counter()
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
            started = self._tracker.stop_task() is not None
        # CodeCarbon probes hardware through many libraries: anything may come out of it.
        except Exception as error:
            raise MeterUnavailable(
                f"CodeCarbon must start offline, got {error}; try energy.meter=constant"
            ) from error
        if not started:
            raise MeterUnavailable(
                "CodeCarbon must be able to start a task, got none; try energy.meter=constant"
            )
        self.library_s = time.perf_counter() - before_s

    def _open(self, poll_s: float | None) -> list[float]:
        self._cut()
        joules = [0.0]
        self._open_windows.append(joules)
        self._tracker.start_task()
        return joules

    def _measure(self, window: Window, opened: list[float], start_s: float, end_s: float) -> None:
        try:
            self._cut()
        finally:
            self._open_windows.remove(opened)
            if self._open_windows:
                self._tracker.start_task()
        window.energy_j = opened[0]

    def _cut(self) -> None:
        """End the running piece, if any, and give its joules to every open window."""
        if not self._open_windows:
            return
        data = self._tracker.stop_task()
        if data is None:
            raise MeterUnavailable("CodeCarbon must end the task it started, got none; measure again")
        for joules in self._open_windows:
            joules[0] += float(data.energy_consumed) * JOULES_PER_KWH


def _name_processor() -> None:
    """Tell CodeCarbon what Linux calls the processor.

    It would ask py-cpuinfo, which starts a process and measures clock rates for over a second, and then says the same.
    """
    name = cpu_name()
    with contextlib.suppress(ImportError):
        from codecarbon.core import cpu

        # Where Linux has no name for it (most of Arm), py-cpuinfo knows more.
        if name not in (platform.processor(), platform.machine()) and hasattr(cpu, "detect_cpu_model"):
            cpu.detect_cpu_model = lambda: name


def _quiet_codecarbon() -> None:
    # It logs from its constructor, before it has read the level it is given there.
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)


def carbon_intensity(country: str) -> CarbonIntensity:
    """Return a country's intensity from the table that comes with CodeCarbon.

    Args:
        country: ISO 3166 code of three letters.

    Raises:
        ConfigError: the table does not know the country.
        MeterUnavailable: there is no table.
    """
    _quiet_codecarbon()
    try:
        from codecarbon.input import DataSource

        table = json.loads(Path(DataSource().global_energy_mix_data_path).read_text(encoding="utf-8"))
    # Not there, not the version known here, or its file is not readable.
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise MeterUnavailable(
            f"CodeCarbon's carbon table must be readable, got {error}; install codecarbon"
        ) from error
    if country not in table:
        raise ConfigError(f"energy.country must be in CodeCarbon's table, got {country}; try POL")
    entry = table[country]
    source = f"CodeCarbon energy mix, {entry['country_name']} {entry['year']}"
    return CarbonIntensity(float(entry["carbon_intensity"]), source)
