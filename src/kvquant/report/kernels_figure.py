"""The figure of ``task=kernels``: how attention over blocks compares with full precision, and how near a copy it gets.

Where the run's machine had no matplotlib: ``python -m kvquant.report.kernels_figure RESULT_JSON PICTURE``.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvquant.report.kernel_cases import SPEEDUP, WIDTHS, cases_of, is_uneven
from kvquant.report.style import COLOURS, CYCLE, figure
from kvquant.results import load_result

_MARKERS, _DASHES = "osD^v", ("-", "--", ":", "-.")
_SHOWN = ("write_keys", "write_values", "dequantize", "decode")


def draw_kernels(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the rows of a run; returns the path.

    Args:
        rows: the metric ``rows`` of ``task=kernels``.
        path: where to save.
    """
    uniform = [row for row in rows if not row["is_trace"]]
    panels = [kind for kind in ("decode", "prefill") if any(row["operation"] == kind for row in uniform)]
    with figure(path, 4.2 * (len(panels) + 1), 3.8, columns=len(panels) + 1) as axes:
        for axis, kind in zip(axes, panels, strict=False):
            _speedups(axis, [row for row in uniform if row["operation"] == kind], kind)
        _fractions(axes[-1], uniform)
    return path


def draw_decode(rows: Sequence[dict[str, Any]], path: Path, width_in: float) -> Path:
    """Draw how decode compares with full precision, a line for each case, ragged ones included; returns the path.

    Hollow: calls differ by more than half of their median.

    Args:
        rows: as above, of one run or of several parts of a bench.
        path: where to save.
        width_in: inches.
    """
    cases = cases_of(rows, "decode")
    with figure(path, width_in, 0.9 + 0.17 * len(cases)) as (axis,):
        for number, bits in enumerate(WIDTHS):
            measured = [
                (row[SPEEDUP], at + 0.2 * (number - 1), is_uneven(row))
                for at, case in enumerate(cases)
                if SPEEDUP in (row := case.by_bits.get(bits, {}))
            ]
            for uneven in (False, True):
                dots = [(x, y) for x, y, differs in measured if differs == uneven]
                look = {"fillstyle": "none", "markeredgewidth": 0.6} if uneven else {"label": f"{bits} bits"}
                if dots:
                    axis.plot(
                        *zip(*dots, strict=True), _MARKERS[number], color=CYCLE[number], markersize=3, **look
                    )
        axis.axvline(1.0, color=COLOURS["exact"], linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.set_yticks(range(len(cases)), [f"{case.shape} {case.words()}" for case in cases])
        axis.set_ylim(len(cases) - 0.5, -0.5)
        axis.grid(axis="y", linewidth=0.3)
        axis.tick_params(labelsize=6)
        axis.set_xlabel("times as fast as full precision", fontsize=8)
        axis.legend(fontsize=6, edgecolor="none", framealpha=1)
    return path


def _speedups(axis: Any, rows: list[dict[str, Any]], kind: str) -> None:
    """Ratio to the fastest full-precision way by history length, a line for each shape, batch and width."""
    lines: dict[tuple[str, int], dict[int, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if "speedup_over_full_precision" in row:
            point = (row["tokens"], row["speedup_over_full_precision"])
            lines[row["shape"], row["batch"]][row["bits"]].append(point)
    for index, ((shape, batch), by_bits) in enumerate(lines.items()):
        for number, (bits, points) in enumerate(sorted(by_bits.items(), reverse=True)):
            points.sort()
            axis.plot(
                [x for x, _ in points],
                [y for _, y in points],
                _DASHES[number % len(_DASHES)] + _MARKERS[number % len(_MARKERS)],
                color=CYCLE[index % len(CYCLE)],
                markersize=3,
                linewidth=1,
                label=f"{shape}, batch {batch}, {bits} bits",
            )
    axis.axhline(1.0, color="#555555", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens of history")
    axis.set_ylabel("times as fast as full precision")
    axis.set_title(kind, fontsize=9)
    if lines:
        axis.legend(fontsize=5, frameon=False)


def _fractions(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Share of a copy's bandwidth of each operation: one dot a case."""
    names = [name for name in _SHOWN if any(row["operation"] == name for row in rows)]
    widths = sorted({row["bits"] for row in rows}, reverse=True)
    for number, bits in enumerate(widths):
        dots = [
            (names.index(row["operation"]) + 0.15 * (number - (len(widths) - 1) / 2), row["copy_fraction"])
            for row in rows
            if row["bits"] == bits and row["operation"] in names and "copy_fraction" in row
        ]
        marker = _MARKERS[number % len(_MARKERS)]
        axis.plot(*zip(*dots, strict=True), marker, color=CYCLE[number], markersize=4, label=f"{bits} bits")
    axis.set_xticks(range(len(names)), names, fontsize=7, rotation=15)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("fraction of a copy's bandwidth")
    axis.legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m kvquant.report.kernels_figure RESULT_JSON PICTURE")
    draw_kernels(load_result(sys.argv[1])["metrics"]["rows"], Path(sys.argv[2]))
