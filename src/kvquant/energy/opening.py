"""Which meter a machine gets: the best it has, named as measured or estimated."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from kvquant.energy.codecarbon_meter import CodeCarbonMeter, carbon_intensity
from kvquant.energy.nvml import open_nvml
from kvquant.energy.rapl import open_rapl
from kvquant.energy.windows import ESTIMATED, CarbonIntensity, CounterMeter, Meter, MeterWithBeside
from kvquant.errors import MeterError, MeterUnavailable

log = logging.getLogger(__name__)

# Of a laptop or a small server under load; only so that a machine that tells nothing still has an order of magnitude.
CONSTANT_W = 65.0
WORLD_G_PER_KWH = 475.0


def open_constant(intensity: CarbonIntensity) -> CounterMeter:
    """Open the last resort: seconds times a constant wattage."""
    source = f"constant {CONSTANT_W:.0f} W, not a meter"
    return CounterMeter(source, ESTIMATED, intensity, lambda: time.perf_counter() * CONSTANT_W)


def grid(country: str, *, g_per_kwh: float | None = None, pue: float = 1.0) -> CarbonIntensity:
    """Return whose electricity is charged.

    Args:
        country: three letters, for CodeCarbon's table.
        g_per_kwh: a figure of one's own, which wins over the table.
        pue: power usage effectiveness of the machine room.

    Raises:
        ConfigError: the country is unknown.
    """
    if g_per_kwh is not None:
        return CarbonIntensity(g_per_kwh, f"energy.g_per_kwh, given for {country}", pue)
    try:
        found = carbon_intensity(country)
    except MeterError:
        # The world average CodeCarbon's documentation names: its absence costs a figure's precision, not the run.
        return CarbonIntensity(WORLD_G_PER_KWH, "world average, constant (no country table at hand)", pue)
    return CarbonIntensity(found.g_per_kwh, found.source, pue)


def open_meter(
    name: str = "auto",
    *,
    country: str = "POL",
    use_cuda: bool = False,
    g_per_kwh: float | None = None,
    pue: float = 1.0,
) -> Meter:
    """Open a meter, which then says how long that took; CodeCarbon takes a second or two: open it before the work.

    Args:
        name: ``auto``, ``nvml``, ``rapl``, ``codecarbon``, ``constant`` or ``none``.
        country: whose grid the electricity comes from, three letters.
        use_cuda: whether the work runs on a GPU; ``auto`` then prefers its counter, with the processor's beside.
        g_per_kwh: carbon intensity, in place of the country's.
        pue: power usage effectiveness of the machine room.

    Raises:
        MeterError: the meter asked for by name cannot be read; ``auto`` takes the next best instead.
        ConfigError: the country is unknown.
    """
    intensity = grid(country, g_per_kwh=g_per_kwh, pue=pue)
    if use_cuda:
        import torch

        torch.cuda.init()  # a second or more, which is not the meter's
    before_s = time.perf_counter()
    meter = _open_by_name(name, country, intensity, use_cuda)
    meter.open_s = time.perf_counter() - before_s - meter.library_s
    return meter


def _open_by_name(name: str, country: str, intensity: CarbonIntensity, use_cuda: bool) -> Meter:
    if name == "none":
        return CounterMeter("none", ESTIMATED, intensity, None)
    openers: dict[str, Callable[[], Meter]] = {
        "nvml": lambda: _beside_rapl(open_nvml(intensity), intensity),
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
    raise MeterUnavailable("no energy meter could be opened; try energy.meter=none")


def _beside_rapl(meter: Meter, intensity: CarbonIntensity) -> Meter:
    try:
        beside = open_rapl(intensity)
    except MeterUnavailable as error:
        log.info("no processor counter beside the GPU's: %s", error)
        return meter
    return MeterWithBeside(meter, {beside.source: beside})
