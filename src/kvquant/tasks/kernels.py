"""``task=kernels``: every operation's time, bytes and rivals, by shape, length, batch and bits; no model, no text.

Times are medians over inputs that no cache holds. Bandwidth is a fraction of what a copy reaches in the same run. The
rival is the fastest attention over a full-precision cache that this machine has, and dequantizing everything first.
"""

from __future__ import annotations

import importlib.util
import statistics
from typing import Any

import torch

from kvquant.bench.operations import Row
from kvquant.config.cost_tasks import KERNEL_OPERATIONS
from kvquant.errors import DeviceError
from kvquant.tasks.kernel_cases import Bench
from kvquant.tasks.setup import progress

QUANTITIES = (
    "us",
    "low_us",
    "high_us",
    "bytes",
    "gb_per_s",
    "copy_fraction",
    "full_precision_us",
    "speedup_over_full_precision",
    "dequantize_then_attend_us",
    "speedup_over_dequantize_then_attend",
    "graph_us",
    "full_precision_graph_us",
    "eager_us",
    "difference",
    "us_per_1k_tokens",
    "tflop_per_s",
    "percent_of_layer",
)


def run(cfg: Any, context: Any) -> None:
    """Measure everything that the task's settings name.

    Args:
        cfg: the composed configuration; the settings are those of ``KernelsTask``.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    bench = Bench(cfg, context)
    context.record.metrics |= {
        "rows": bench.rows,
        "full_precision": bench.rivals,
        "skipped": bench.skipped,
        "failed": bench.failed,
        "stored": bench.stored,
        "steps": bench.steps.taken,
        "calibration_tokens": cfg.calibration.tokens,
    }
    console, cases = context.console, bench.cases()
    with bench.steps.step("a copy's bandwidth"):
        copies_s = [bench.clock.copy_bytes_per_s()]
    with torch.no_grad():
        for case in progress(console)(cases, "kernels", len(cases)):
            bench.measure(case)
            _report(cfg, context, bench.rows, copies_s)  # a run that is cut short leaves what it has
    copies_s.append(bench.clock.copy_bytes_per_s())
    _report(cfg, context, bench.rows, copies_s)
    for said, notes in (("left out", bench.skipped), ("failed", bench.failed)):
        for note in notes:
            where = f"{note['part']} of {note['shape']} {note['label']} at {note['bits']} bits"
            console.print(f"{said}: {where}: {note['reason']}", highlight=False, markup=False)
    if cfg.task.figures and not _can_draw():
        console.print(
            "no matplotlib here, so no figure; elsewhere: python -m kvquant.report.kernels_figure result.json kernels.png"
        )
    if bench.failed:
        from kvquant.tasks.run_task import print_table

        print_table(console, context.record)
        raise DeviceError(
            f"every operation must run and be right, {len(bench.failed)} failed, first {bench.failed[0]['part']}: "
            f"{bench.failed[0]['reason']}; the others are in result.json"
        )


def _report(cfg: Any, context: Any, rows: list[Row], copies_s: list[float]) -> None:
    """Write numbers, table and figure of what has been measured so far.

    Args:
        cfg: the composed configuration.
        context: of the task.
        rows: measurements; those with bytes get their share of a copy's bandwidth.
        copies_s: bytes per second of copies before, and after if the run is over.
    """
    record, copy = context.record, statistics.mean(copies_s)
    for row in rows:
        if "bytes" in row:
            row["gb_per_s"] = row["bytes"] / row["us"] / 1e3
            row["copy_fraction"] = 1e9 * row["gb_per_s"] / copy
    record.metrics |= {
        "copy_gb_per_s": copy / 1e9,
        "copy_gb_per_s_before_and_after": [c / 1e9 for c in copies_s],
        **flat(rows),
    }
    record.set_table(
        f"{cfg.task.dtype}: us; bytes that must move, and their share of a copy's {copy / 1e9:.0f} GB/s; times as fast as "
        "the best full-precision way, and as dequantizing first (layer_share: percent of the layer's prefill)",
        *table(rows),
    )
    if cfg.task.figures and rows and _can_draw():
        from kvquant.report.kernels_figure import draw_kernels

        path = draw_kernels(rows, context.run_dir / "kernels.png")
        if path.name not in record.figures:
            record.add_figure(path)
    record.save()


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def flat(rows: list[Row]) -> dict[str, float]:
    """Every number by a name that says what it is: ``decode_llama31_8b_8x32768_4bit_us``."""
    named: dict[str, float] = {}
    for row in rows:
        prefix = f"{row['operation']}_{row['shape']}_{row['label']}_{row['bits']}bit"
        named |= {f"{prefix}_{quantity}": row[quantity] for quantity in QUANTITIES if quantity in row}
    return named


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the printed table, operation by operation."""
    lines = []
    for row in sorted(rows, key=lambda row: KERNEL_OPERATIONS.index(row["operation"])):
        rival = ""
        if "percent_of_layer" in row:
            rival = f"{row['percent_of_layer']:.2f}%"
        elif "speedup_over_full_precision" in row:
            way = row["full_precision_way"].removeprefix("sdpa_")
            rival = f"{row['speedup_over_full_precision']:.2f}x {way}"
        dense = "speedup_over_dequantize_then_attend"
        lines.append(
            [
                f"{row['operation']} {row['shape']} {row['label']} {row['bits']}b",
                f"{row['us']:.0f}",
                f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "",
                f"{row['copy_fraction']:.0%}" if "copy_fraction" in row else "",
                rival,
                f"{row[dense]:.2f}x" if dense in row else "",
                f"{row['graph_us']:.0f}" if "graph_us" in row else "",
            ]
        )
    return ["", "us", "MB", "copy", "full precision", "dense", "graph us"], lines
