"""``task=energy``: joules per token of prefill and of decode, by method, batch and length, with their uncertainty.

An item is a round of one point: a window of every cache, so that the ratio of a pair never spans two processes. A job
that is queued again cools down, measures idle and warms up anew, since its GPU has rested or is another one, and then
measures the missing rounds; each round keeps the idle power of its process, and windows of several GPUs are flagged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from kvquant.calibration import Calibration, exact_calibration
from kvquant.energy.fleet import DECODE, PREFILL, FleetLoad, fleet_bill
from kvquant.energy.nvml import SYSTEMATIC_PERCENT
from kvquant.energy.protocol import (
    MAX_PHASE_DELAY_S,
    FilledWindow,
    Idle,
    counterbalanced_rounds,
    fill_window,
    measure_idle,
)
from kvquant.energy.slurm import sacct_energy_j, slurm_job_id
from kvquant.energy.statistics import fit_line
from kvquant.energy.validity import disagreement_percent, window_faults
from kvquant.energy.windows import MEASURED, Meter, Window
from kvquant.errors import DeviceError, MeterError
from kvquant.report.energy import draw_energy_figure
from kvquant.tasks.energy_loads import (
    TOO_LARGE,
    LoadShelf,
    ModelLoad,
    Point,
    matrix_load,
    uniform_prompts,
)
from kvquant.tasks.energy_summary import compare_point, energy_table, summarize_variant
from kvquant.tasks.setup import Workbench, open_workbench, progress

EXACT = "none"
# Multiples of one window: loads that differ enough for a line. The least is more than one, because a load that is
# counted, not timed, may run faster than when its count was found, and a window short of its least length is invalid.
LOAD_STEPS = (1.1, 1.35, 1.6, 1.85, 2.1, 2.35)
# A product of this size takes about a millisecond on a data-centre GPU, and on a CPU.
MATRIX_SIZE = {"cuda": 8192, "cpu": 512}


def run(cfg: Any, context: Any) -> None:
    """Follow the protocol for every point of the sweep and write down what may be concluded.

    Args:
        cfg: the composed configuration.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    task, metrics = cfg.task, context.record.metrics
    if task.cuda_graph and context.device.type != "cuda":
        raise DeviceError(
            f"task.cuda_graph=true needs an NVIDIA GPU, got device {context.device.type}; try task.cuda_graph=false"
        )
    meter: Meter = context.meter
    metrics["meter"] = {
        "source": meter.source,
        "kind": meter.kind,
        "open_s": meter.open_s,
        "open_codecarbon_s": meter.library_s,
        "systematic_percent": SYSTEMATIC_PERCENT if meter.kind == MEASURED else None,
        **meter.identity,
    }
    bench = open_workbench(cfg, context)
    variants = _variants(bench, task)
    grid = meter.intensity
    metrics["carbon"] = dataclasses.asdict(grid)
    stream = bench.heldout(max(task.batch_sizes) * max(task.prompt_tokens))
    rng = random.Random(cfg.seed)

    with context.console.status("waiting for a stable idle power"):
        # An estimate has no temperature to wait for.
        cooldown_s = task.cooldown_s if meter.kind == MEASURED else 0.0
        idle = measure_idle(meter, cooldown_s=cooldown_s, idle_s=task.idle_s)
    metrics["idle"] = {
        "power_w": idle.power_w,
        "cooldown_s": idle.cooldown_s,
        "stable": idle.stable,
        "faults": window_faults(idle.window),
    }
    log = _WindowLog(context.run_dir)
    with contextlib.closing(log):
        metrics["agreement"] = _agreement(bench, context, meter, variants[EXACT], stream, log)
        if task.load_check:
            metrics["load"] = _known_load_once(context, meter, task, idle, rng, log)
        metrics["points"] = _sweep(bench, context, meter, variants, stream, idle, rng, log)
    load = FleetLoad(
        task.fleet_requests_per_day,
        list(task.fleet_levels),
        list(task.fleet_context_tokens),
        list(task.fleet_generated_tokens),
    )
    metrics["fleet"] = fleet_bill(metrics["points"], load, grid)
    metrics["slurm"] = _outside_meter()
    title, columns, rows = energy_table(metrics, cfg)
    context.record.set_table(title, columns, rows)
    picture = context.run_dir / "energy_batch.png"
    if draw_energy_figure(metrics["points"], picture):
        context.record.add_figure(picture)


class _WindowLog:
    """Every window of the run, for windows.json: what the summary rests on, and what is left of a run cut short.

    Args:
        run_dir: where the file goes.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.rows: list[dict[str, Any]] = []

    def add(self, window: Window, repetitions: int | None = None, **where: Any) -> None:
        """Keep a window with what it belongs to."""
        numbers = {"repetitions": repetitions, "tick_s": window.tick_s, "state": window.state}
        self.rows.append(
            {"name": window.name, **where, **window.as_metrics(), **numbers, "faults": window_faults(window)}
        )

    def close(self) -> None:
        """Write windows.json by temporary file and rename."""
        path = self.run_dir / "windows.json"
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _variants(bench: Workbench, task: Any) -> dict[str, Calibration]:
    """The exact cache and each method compared with it, by name."""
    out = {EXACT: exact_calibration(bench.shape)}
    spec = bench.spec()
    if spec.is_exact:
        return out
    specs = [dataclasses.replace(spec, bits=b, key_bits=b, value_bits=b) for b in task.bits] or [spec]
    for one in specs:
        bits = f"{one.key_bits}" if one.key_bits == one.value_bits else f"k{one.key_bits}v{one.value_bits}"
        out[f"{one.method}{bits}"] = bench.calibration(one)
    return out


def _agreement(
    bench: Workbench,
    context: Any,
    meter: Meter,
    exact: Calibration,
    stream: Tensor,
    log: _WindowLog,
) -> dict[str, Any]:
    """Warm up with prefills of the exact cache, and see whether counter and integrated power agree over them."""
    task = bench.cfg.task
    sizes = sorted(itertools.product(task.batch_sizes, task.prompt_tokens), key=math.prod, reverse=True)
    with context.console.status("warming up"):
        for index, (batch, length) in enumerate(sizes):
            point = Point(PREFILL, batch, length)
            shelf = _shelf(bench, context.device, {EXACT: exact}, point, stream)
            try:
                with shelf.ready(EXACT) as work:
                    filled = fill_window(meter, "warm-up", work, window_s=task.warmup_s)
                break
            except TOO_LARGE:
                # The largest that fits; where not even the smallest does there is nothing to measure.
                if index == len(sizes) - 1:
                    raise
            finally:
                shelf.clear()
    log.add(filled.window, filled.repetitions)
    return {
        **dataclasses.asdict(point),
        "window_s": filled.window.duration_s,
        "counter_j": filled.window.energy_j,
        "integrated_j": filled.window.polled_j,
        "disagreement_percent": disagreement_percent(filled.window),
        "tick_s": filled.window.tick_s,
        "state": filled.window.state,
        "faults": window_faults(filled.window),
    }


def _known_load_once(
    context: Any, meter: Meter, task: Any, idle: Idle, rng: random.Random, log: _WindowLog
) -> dict[str, Any]:
    """`_known_load` as an item, its windows with it."""
    item = context.items.get("load")
    if item is None:
        before = len(log.rows)
        found = _known_load(context, meter, task, idle, rng, log)
        context.items.commit("load", {"found": found, "windows": log.rows[before:]})
        return found
    log.rows += item.values["windows"]
    return dict(item.values["found"])


def _known_load(
    context: Any, meter: Meter, task: Any, idle: Idle, rng: random.Random, log: _WindowLog
) -> dict[str, Any]:
    """Whether the joules of a matrix product above idle are proportional to how often it is repeated."""
    if meter.kind != MEASURED or idle.power_w is None:
        return {"skipped": "an estimate is proportional to time by construction"}
    work = matrix_load(context.device, task.load_size or MATRIX_SIZE[context.device.type])
    first = fill_window(meter, "load warm-up", work, window_s=task.window_s)
    counts = [math.ceil(step * first.repetitions) for step in LOAD_STEPS]
    rng.shuffle(counts)
    joules: list[float] = []
    faults: list[str] = []
    for count in progress(context.console)(counts, "known load", len(counts)):
        time.sleep(rng.uniform(0, MAX_PHASE_DELAY_S))
        with meter.window("load") as window:
            for _ in range(count):
                work()
        log.add(window, count)
        faults += window_faults(window)
        if window.energy_j is not None:
            joules.append(window.energy_j - idle.power_w * window.duration_s)
    if len(joules) < len(counts):
        return {"faults": faults}
    line = fit_line(counts, joules)
    return {
        "repetitions": counts,
        "above_idle_j": joules,
        **dataclasses.asdict(line),
        "intercept_includes_zero": line.intercept.low <= 0 <= line.intercept.high,
        "faults": faults,
    }


def _sweep(
    bench: Workbench,
    context: Any,
    meter: Meter,
    variants: dict[str, Calibration],
    stream: Tensor,
    idle: Idle,
    rng: random.Random,
    log: _WindowLog,
) -> list[dict[str, Any]]:
    task = bench.cfg.task
    cells = [(p, b, n) for p in task.phases for b in task.batch_sizes for n in task.prompt_tokens]
    points = [Point(*cell) for cell in cells]
    # Drawn from the seed alone, so that a job that is queued again has the same order before it.
    order = random.Random(f"{bench.cfg.seed} rounds")
    turns = [
        (point, number, names)
        for point in points
        for number, names in enumerate(counterbalanced_rounds(list(variants), task.windows, order))
    ]
    filled: dict[tuple[Point, str], list[FilledWindow]] = {}
    too_large: dict[tuple[Point, str], str] = {}
    shelf: tuple[Point, LoadShelf] | None = None
    gpus: dict[Point, set[str]] = {point: set() for point in points}

    def measure(point: Point, names: list[str]) -> dict[str, Any]:
        nonlocal shelf
        if shelf is None or shelf[0] != point:
            if shelf is not None:
                shelf[1].clear()
            shelf = point, _shelf(bench, context.device, variants, point, stream)
        measured: dict[str, Any] = {}
        for name in names:
            if (point, name) in too_large:
                continue
            delay_s = rng.uniform(0, MAX_PHASE_DELAY_S)
            try:
                with shelf[1].ready(name) as work:
                    one = fill_window(meter, point.phase, work, window_s=task.window_s, delay_s=delay_s)
            except TOO_LARGE as error:
                measured[name] = {"does_not_fit": str(error).splitlines()[0]}
                shelf[1].clear()
                continue
            measured[name] = {"repetitions": one.repetitions, "window": one.window.as_item()}
        return {"idle_w": idle.power_w, "gpu": meter.identity.get("uuid"), "caches": measured}

    for point, number, names in progress(context.console)(turns, "energy windows", len(turns)):
        key = f"{point.phase}-{point.batch}x{point.prompt_tokens}-round{number}"
        item = context.items.get(key) or context.items.commit(key, measure(point, names))
        gpus[point].add(str(item.values["gpu"]))
        for name, cell in item.values["caches"].items():
            if "does_not_fit" in cell:
                too_large[point, name] = cell["does_not_fit"]
                continue
            window, repetitions = Window.from_item(cell["window"]), cell["repetitions"]
            log.add(window, repetitions, variant=name, **dataclasses.asdict(point))
            one = FilledWindow(window, repetitions, item.values["idle_w"])
            filled.setdefault((point, name), []).append(one)
    out = []
    for point in points:
        summaries: dict[str, Any] = {}
        for name in variants:
            if (point, name) in too_large:
                summaries[name] = {"does_not_fit": too_large[point, name]}
            else:
                tokens = point.tokens(task.decode_steps)
                mig = bool(meter.identity.get("mig"))
                summaries[name] = summarize_variant(filled[point, name], tokens, idle.power_w, mig=mig)
                if len(gpus[point]) > 1:
                    summaries[name]["faults"].append("windows of several GPUs: the job moved")
        captured = {"captured": bool(task.cuda_graph)} if point.phase == DECODE else {}
        out.append(
            {
                **dataclasses.asdict(point),
                **captured,
                "variants": summaries,
                **compare_point(summaries, EXACT),
            }
        )
    return out


def _shelf(
    bench: Workbench, device: Any, variants: dict[str, Calibration], point: Point, stream: Tensor
) -> LoadShelf:
    prompts = uniform_prompts(stream, point.batch, point.prompt_tokens)
    steps, graph = bench.cfg.task.decode_steps, bench.cfg.task.cuda_graph
    return LoadShelf(
        lambda name: ModelLoad(bench, variants[name], point, prompts, steps, cuda_graph=graph), device
    )


def _outside_meter() -> dict[str, Any]:
    """What Slurm counted for the job so far; most clusters count at its end."""
    job = slurm_job_id()
    if job is None:
        return {"skipped": "not in a Slurm job"}
    with contextlib.suppress(MeterError):
        return {"job_id": job, "energy_j": sacct_energy_j(job), "scope": "whole nodes, the job so far"}
    return {"job_id": job, "energy_j": None, "scope": "sacct has nothing yet: ask after the job"}
