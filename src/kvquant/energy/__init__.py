"""Joules of a piece of work, from the best meter this machine has, each result marked measured or estimated.

Counters (NVML for the GPU, RAPL for the processor) and polled power are read while a window is open. Without one,
CodeCarbon's offline model estimates, and failing that a constant wattage does. Nothing here uses a network.
"""

from kvquant.energy.codecarbon_meter import CodeCarbonMeter, carbon_intensity
from kvquant.energy.nvml import open_nvml
from kvquant.energy.opening import open_constant, open_meter
from kvquant.energy.rapl import RaplCounter, open_rapl
from kvquant.energy.replay import ReplayClock, load_trace, replay_meter
from kvquant.energy.traces import CounterLimits, Sample
from kvquant.energy.windows import (
    ESTIMATED,
    MEASURED,
    CarbonIntensity,
    CounterMeter,
    Meter,
    Window,
)

__all__ = [
    "ESTIMATED",
    "MEASURED",
    "CarbonIntensity",
    "CodeCarbonMeter",
    "CounterLimits",
    "CounterMeter",
    "Meter",
    "RaplCounter",
    "ReplayClock",
    "Sample",
    "Window",
    "carbon_intensity",
    "load_trace",
    "open_constant",
    "open_meter",
    "open_nvml",
    "open_rapl",
    "replay_meter",
]
