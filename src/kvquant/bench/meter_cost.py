"""``python -m kvquant.bench.meter_cost``: what the energy meter's background readings cost the work beside them.

On a GPU, NVML beside launches of tiny kernels, which the host paces, and beside matrix products, which the device paces;
without one, a counter made of the processor's own times, beside tiny operations and products on the processor.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvquant.energy import CarbonIntensity, CounterLimits, Sample, open_nvml
from kvquant.energy.cost import reading_cost, repetitions
from kvquant.energy.sampling import SampledMeter, ThreadSampler
from kvquant.energy.statistics import Interval
from kvquant.provenance import collect_provenance

GRID = CarbonIntensity(500.0, "any")
OPERATIONS = 100  # in a repetition: about a millisecond
PRODUCT_ROWS = {
    "cuda": 8192,
    "cpu": 384,
}  # a product takes a millisecond or two, far less than readings are apart


def processor_meter(poll_s: float) -> SampledMeter:
    """A stand-in where no counter can be read: 10 W for every busy processor, by /proc/stat."""

    def read() -> Sample:
        user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
        return Sample(time.perf_counter(), 0.1 * (user + nice + system))

    limits = CounterLimits(0.0, 1e6)
    return SampledMeter("/proc/stat", "estimated", GRID, ThreadSampler(read), limits, poll_s=poll_s)


def tiny_operations(device: str) -> Callable[[], None]:
    """Work that the host is too slow for: whatever runs beside it would be noticed at once."""
    x = torch.zeros(16, device=device)

    def work() -> None:
        for _ in range(OPERATIONS):
            x.add_(1.0)
        if device == "cuda":
            torch.cuda.synchronize()

    return work


def matrix_products(device: str) -> Callable[[], None]:
    """Work that the device is too slow for: the host waits meanwhile, and may read a meter."""
    rows = PRODUCT_ROWS[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)

    def work() -> None:
        torch.mm(left, right, out=out)
        if device == "cuda":
            torch.cuda.synchronize()

    return work


WORK = {"host": tiny_operations, "device": matrix_products}
"""By what paces it."""


def measure(meter: SampledMeter, work: Callable[[], None], seconds: float) -> tuple[Interval | None, str]:
    """Run ``work`` in a window; returns what the readings meanwhile cost it, as a share of its time, and in words."""
    reads = meter.note_reads()
    repetitions(work, 1.0, meter.now_s)
    with meter.window("cost") as window:
        repeated = repetitions(work, seconds, meter.now_s)
    cost = reading_cost(repeated, reads)
    if cost is None:
        return None, f"{len(reads)} readings in {seconds:g} s are too few; take longer"
    length_s = statistics.median(end - start for start, end in reads)
    return cost, (
        f"{meter.source}: readings cost the work beside it {100 * cost.value:.3f}% "
        f"[{100 * cost.low:.3f}, {100 * cost.high:.3f}] of its time ({cost.n} readings against their neighbours and "
        f"placebos; {len(repeated)} repetitions of {1e3 * statistics.median(e - s for s, e in repeated):.2f} ms); "
        f"a reading takes {1e3 * length_s:.2f} ms, {window.state['reading_percent']:.2f}% of the window, and "
        f"{window.state['reading_cpu_percent']:.3f}% of a processor"
    )


def main() -> None:
    """Measure, print a line for each kind of work and, if asked to, leave the numbers."""
    parser = argparse.ArgumentParser(description="Measure what background readings of the energy meter cost.")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="what paces the work")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each kind of work")
    parser.add_argument("--poll-s", type=float, default=0.2, help="of the stand-in without a GPU")
    parser.add_argument("--json", type=Path, help="where to leave the numbers")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meter = open_nvml(GRID) if device == "cuda" else processor_meter(given.poll_s)
    found: dict[str, Any] = {
        "source": meter.source,
        "seconds": given.seconds,
        "provenance": collect_provenance(),
    }
    try:
        for name in given.work:
            share, said = measure(meter, WORK[name](device), given.seconds)
            print(f"{name}-bound, {said}", flush=True)
            found[name] = {"share": share and dataclasses.asdict(share), "text": said}
            if given.json is not None:  # each as soon as it is there
                given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    finally:
        meter.close()


if __name__ == "__main__":
    main()
