"""A measured stretch of work, and what every meter has in common: edges, keys, nesting."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvquant import errors
from kvquant.errors import MeterError

MEASURED, ESTIMATED = "measured", "estimated"
JOULES_PER_KWH = 3.6e6


@dataclasses.dataclass(frozen=True)
class CarbonIntensity:
    """How much CO2 a grid emits per unit of electricity, and how much electricity a machine room takes.

    Attributes:
        g_per_kwh: grams of CO2 equivalent per kilowatt-hour.
        source: table, country and year the figure is from.
        pue: power usage effectiveness, what the whole building takes per joule of the computer; 1 is the computer
            alone.
    """

    g_per_kwh: float
    source: str
    pue: float = 1.0

    def grams(self, energy_j: float) -> float:
        """energy_j / 3.6e6 * pue * g_per_kwh."""
        return energy_j / JOULES_PER_KWH * self.pue * self.g_per_kwh


@dataclasses.dataclass
class Window:
    """One measured stretch of work; its numbers are there once the ``with`` block has ended.

    Attributes:
        name: what was measured; windows of one name are kept together.
        source: the meter, in words.
        kind: ``measured`` or ``estimated``.
        duration_s: wall-clock seconds between the edges, the device's work included.
        energy_j: joules; None where nothing meters, or where ``failure`` says why not.
        failure: what went wrong with the readings.
        tick_s: seconds between two changes of the counter, as seen in this window; None: not seen, or no counter.
        polled_j: joules integrated from polled power, by field (``instant``, ``average``).
        state: what the device did meanwhile: clocks, temperature, reasons it slowed down, other processes.
        beside_j: joules of other parts of the machine, by meter; never part of ``energy_j``.
    """

    name: str
    source: str
    kind: str
    intensity: CarbonIntensity
    duration_s: float = 0.0
    energy_j: float | None = None
    failure: MeterError | None = None
    tick_s: float | None = None
    polled_j: dict[str, float] = dataclasses.field(default_factory=dict)
    state: dict[str, Any] = dataclasses.field(default_factory=dict)
    beside_j: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def carbon_gco2e(self) -> float | None:
        """Grams of CO2 equivalent at the grid's intensity, see :meth:`CarbonIntensity.grams`."""
        return None if self.energy_j is None else self.intensity.grams(self.energy_j)

    def joules(self) -> float:
        """Return ``energy_j``.

        Raises:
            MeterError: there is none; the typed reason.
        """
        if self.energy_j is None:
            raise self.failure or MeterError(
                f"window {self.name} must be metered, got {self.source}; set energy.meter"
            )
        return self.energy_j

    def as_item(self) -> dict[str, Any]:
        """Return the window as plain JSON that :meth:`from_item` reads."""
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        failure = None if self.failure is None else [type(self.failure).__name__, str(self.failure)]
        return {**kept, "intensity": dataclasses.asdict(self.intensity), "failure": failure}

    @classmethod
    def from_item(cls, item: Mapping[str, Any]) -> Window:
        """Return the window that `as_item` wrote down."""
        failure = None
        if item["failure"] is not None:
            name, message = item["failure"]
            failure = getattr(errors, name, MeterError)(message)
        return cls(**{**item, "intensity": CarbonIntensity(**item["intensity"]), "failure": failure})

    def as_metrics(self) -> dict[str, Any]:
        """Return the window as it goes into a result."""
        out: dict[str, Any] = {
            "energy_j": self.energy_j,
            "energy_window_s": self.duration_s,
            "carbon_gco2e": self.carbon_gco2e,
            "energy_kind": self.kind,
            "energy_source": self.source,
            "carbon_intensity_g_per_kwh": self.intensity.g_per_kwh,
            "carbon_source": self.intensity.source,
            "pue": self.intensity.pue,
        }
        if self.failure is not None:
            out["energy_failure"] = f"{type(self.failure).__name__}: {self.failure}"
        if self.polled_j:
            out["energy_polled_j"] = dict(self.polled_j)
        if self.beside_j:
            out["energy_beside_j"] = dict(self.beside_j)
        return out


class Meter(abc.ABC):
    """Anything that turns a stretch of work into joules; windows may be nested.

    Args:
        source: the meter, in words.
        kind: ``measured`` or ``estimated``.
        intensity: the grid's carbon intensity.
        synchronize: waits for the device, so that a window's edges hold the work between them.

    Attributes:
        windows: the closed windows by name, oldest first.
        identity: what is metered: the device's name and UUID, and who else uses it.
        open_s: seconds that opening it took, without ``library_s``; None: nobody measured.
        library_s: seconds that CodeCarbon itself took to start.
    """

    open_s: float | None = None
    library_s = 0.0

    def __init__(
        self,
        source: str,
        kind: str,
        intensity: CarbonIntensity,
        *,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self.source, self.kind, self.intensity = source, kind, intensity
        self.windows: dict[str, list[Window]] = {}
        self.identity: dict[str, Any] = {}
        self._synchronize = synchronize or (lambda: None)

    @contextlib.contextmanager
    def window(self, name: str, *, poll_s: float | None = None) -> Iterator[Window]:
        """Measure the body of a ``with`` statement, also when it raises.

        Args:
            name: the key it is kept under.
            poll_s: how often power is polled meanwhile, where it is; None: as often as is useful.
        """
        window = Window(name, self.source, self.kind, self.intensity)
        self._synchronize()
        opened = self._open(poll_s)
        start_s = self.now_s()
        try:
            yield window
        finally:
            try:
                self._synchronize()
            finally:
                end_s = self.now_s()
                window.duration_s = end_s - start_s
                try:
                    self._measure(window, opened, start_s, end_s)
                except MeterError as error:
                    # The work is done and matters more: its joules are missing, and the window says why.
                    window.failure = error
                self.windows.setdefault(name, []).append(window)

    @property
    def tick_s(self) -> float:
        """The longest a reading may be old, seconds; 0 where readings are always fresh."""
        return 0.0

    def now_s(self) -> float:
        """The meter's clock, seconds."""
        return time.perf_counter()

    @abc.abstractmethod
    def _open(self, poll_s: float | None) -> Any:
        """Begin a window at its first edge; what is returned comes back in :meth:`_measure`."""

    @abc.abstractmethod
    def _measure(self, window: Window, opened: Any, start_s: float, end_s: float) -> None:
        """Fill a window at its last edge.

        Raises:
            MeterError: the readings do not make joules.
        """

    def close(self) -> None:  # noqa: B027 - most meters hold nothing
        """Release what the meter holds."""


class CounterMeter(Meter):
    """A meter whose joules are the difference of two readings of a running total that never wraps.

    Args:
        read_j: returns the running total in joules; None meters time alone.
    """

    def __init__(
        self,
        source: str,
        kind: str,
        intensity: CarbonIntensity,
        read_j: Callable[[], float] | None,
        *,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(source, kind, intensity, synchronize=synchronize)
        self._read_j = read_j

    def _open(self, poll_s: float | None) -> float | None:
        return None if self._read_j is None else self._read_j()

    def _measure(self, window: Window, opened: float | None, start_s: float, end_s: float) -> None:
        if self._read_j is not None and opened is not None:
            window.energy_j = self._read_j() - opened


class MeterWithBeside(Meter):
    """A meter with others beside it, whose joules are reported and never added.

    Args:
        main: whose windows these are.
        beside: what else is read, by name.
    """

    def __init__(self, main: Meter, beside: dict[str, Meter]) -> None:
        super().__init__(main.source, main.kind, main.intensity)
        self._main, self._beside = main, beside
        self.identity, self.windows = main.identity, main.windows

    @contextlib.contextmanager
    def window(self, name: str, *, poll_s: float | None = None) -> Iterator[Window]:
        """As :meth:`Meter.window`, with ``beside_j`` filled."""
        inner: dict[str, Window] = {}
        window: Window | None = None
        try:
            with contextlib.ExitStack() as stack:
                # The main window outside: waiting for its counter's tick must not fall into the others.
                window = stack.enter_context(self._main.window(name, poll_s=poll_s))
                for key, meter in self._beside.items():
                    inner[key] = stack.enter_context(meter.window(name))
                yield window
        finally:
            if window is not None:
                window.beside_j = {k: w.energy_j for k, w in inner.items() if w.energy_j is not None}

    @property
    def tick_s(self) -> float:
        """The main meter's tick, seconds."""
        return self._main.tick_s

    def now_s(self) -> float:
        """The main meter's clock, seconds."""
        return self._main.now_s()

    def _open(self, poll_s: float | None) -> Any:
        raise NotImplementedError("windows are those of the main meter")

    def _measure(self, window: Window, opened: Any, start_s: float, end_s: float) -> None:
        raise NotImplementedError("windows are those of the main meter")

    def close(self) -> None:
        """Release what every meter holds."""
        with contextlib.ExitStack() as stack:
            for meter in (self._main, *self._beside.values()):
                stack.callback(meter.close)
