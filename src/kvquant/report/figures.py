"""The figures of a report, each as PNG and PDF; a figure that has nothing to show is left out and named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvquant.report.collect import Run
from kvquant.report.quantities import FigureSpec, Panel
from kvquant.report.series import Point, Series, lines
from kvquant.report.style import CYCLE, figure

DASHES, MARKERS = ("-", "--", ":", "-."), "osD^vP*X"
# More lines than can be told apart are not drawn; the CSV holds them all.
MAX_LINES = len(CYCLE) * len(DASHES)


def draw(spec: FigureSpec, runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw one figure as PNG and PDF.

    Args:
        spec: what to draw.
        runs: those that ended well.
        folder: where to save.

    Returns:
        The two files, PNG first; nothing when no run has its quantities.
    """
    panels = [(panel, lines(runs, panel.variants, spec.axis)) for panel in spec.panels]
    # An ablation of one value is a point, not an ablation: the axis must vary somewhere.
    panels = [(panel, found) for panel, found in panels if found and (spec.pareto or _varies(found))]
    if not panels:
        return []
    paths = [folder / f"{spec.name}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        with figure(path, 1.2 + 4.2 * len(panels), 4.0, columns=len(panels)) as axes:
            for axis, (panel, found) in zip(axes, panels, strict=True):
                _fill(axis, spec, panel, found)
    return paths


def _varies(found: list[Series]) -> bool:
    return len({point.x for series in found for point in series.points}) > 1


def _fill(axis: Any, spec: FigureSpec, panel: Panel, found: list[Series]) -> None:
    for index, series in enumerate(found[:MAX_LINES]):
        colour, dash = CYCLE[index % len(CYCLE)], DASHES[index // len(CYCLE)]
        marker = MARKERS[index % len(MARKERS)]
        points = list(series.points)
        name = series.label if len(series.label) <= 70 else f"{series.label[:67]}..."
        if spec.pareto:
            axis.plot([p.x for p in points], [p.y for p in points], marker, color=colour, label=name)
            front = pareto_front(points)
            axis.plot([p.x for p in front], [p.y for p in front], dash, color=colour, linewidth=1)
            continue
        axis.plot([p.x for p in points], [p.y for p in points], dash + marker, color=colour, label=name)
        if any(p.low < p.high for p in points):
            axis.fill_between(
                [p.x for p in points],
                [p.low for p in points],
                [p.high for p in points],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
    if spec.log_x and min(p.x for s in found for p in s.points) > 0:
        axis.set_xscale("log", base=2)
    if panel.log_y and min(p.low for s in found for p in s.points) > 0:
        axis.set_yscale("log")
    axis.set_xlabel(spec.x_label)
    axis.set_ylabel(panel.y_label)
    if len(found) > MAX_LINES:
        axis.set_title(f"{MAX_LINES} of {len(found)} lines; all are in runs.csv", fontsize=8)
    if len(found) > 1 or found[0].label != "all runs":
        axis.legend(fontsize=6, frameon=False)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats: fewer bits and a lower perplexity; by rising x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front
