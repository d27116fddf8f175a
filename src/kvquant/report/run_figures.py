"""Figures that show one run each, for tasks that compare many things within a run; never several runs in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvquant.energy.fleet import is_valid
from kvquant.report.collect import Run
from kvquant.report.kernels_figure import draw_kernels
from kvquant.report.series import identity
from kvquant.report.style import COLOURS, figure

# A page with more pictures of one kind is not read; the tables and the CSV have every run.
MAX_PER_TASK = 12


def draw_run_figures(runs: Sequence[Run], folder: Path) -> list[tuple[str, list[Path]]]:
    """Draw every run whose task has a figure of its own, as PNG and PDF.

    Args:
        runs: those that ended well.
        folder: where to save.

    Returns:
        Title and files of each figure, PNG first.
    """
    out = []
    for task, (title, has_data, draw) in FIGURES.items():
        shown = [run for run in runs if run.result["task"] == task and has_data(run)]
        for number, run in enumerate(shown[:MAX_PER_TASK], 1):
            name = task if len(shown) == 1 else f"{task}_{number}"
            paths = [draw(run, folder / f"{name}.{kind}") for kind in ("png", "pdf")]
            origin = identity(run)
            where = ", ".join(v for k, v in origin.items() if k in ("model", "device") and v != "-")
            more = f"; {MAX_PER_TASK} of {len(shown)} runs" if len(shown) > MAX_PER_TASK else ""
            out.append((f"{title}: {where} ({run.folder.name}){more}", paths))
    return out


def _kernels(run: Run, path: Path) -> Path:
    return draw_kernels(run.result["metrics"]["rows"], path)


def _metered(run: Run) -> list[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Point, cache and numbers of everything that was metered and may be shown."""
    points = run.result["metrics"].get("points")
    return [
        (point, label, cell)
        for point in (points if isinstance(points, list) else [])
        for label, cell in point["variants"].items()
        if is_valid(cell)
    ]


def _energy(run: Run, path: Path) -> Path:
    """Joules per token of every point and cache, and the ratio to the exact cache: valid ones, 95% intervals."""
    cells = _metered(run)
    ticks = [
        f"{'exact' if label == 'none' else label}\n{p['phase']}\n{p['batch']} x {p['prompt_tokens']}"
        for p, label, _ in cells
    ]
    with figure(path, 3.0 + 1.1 * len(cells), 3.6, columns=2) as axes:
        for at, (point, label, cell) in enumerate(cells):
            found, ratio = cell["j_per_token_interval"], point["headline"].get(label)
            axes[0].bar(at, 1e3 * found["value"], color=COLOURS["exact" if label == "none" else "quantized"])
            _error_bar(axes[0], at, found, 1e3, color="black")
            if ratio:
                _error_bar(axes[1], at, ratio, 1.0, color=COLOURS["quantized"], marker="o")
        axes[1].axhline(1.0, color=COLOURS["exact"], linewidth=0.8)
        axes[0].set_ylabel("mJ per token")
        axes[1].set_ylabel("ratio to the exact cache")
        for axis in axes:
            axis.set_xticks(range(len(cells)), ticks, fontsize=6)
            axis.set_xlim(-0.7, len(cells) - 0.3)
    return path


def _error_bar(axis: Any, at: float, found: dict[str, float], factor: float, **style: Any) -> None:
    value, low, high = (factor * found[key] for key in ("value", "low", "high"))
    axis.errorbar(at, value, yerr=[[value - low], [high - value]], capsize=2, linewidth=0.8, **style)


# By task: title, whether a run has what it shows, and who draws it.
FIGURES: dict[str, tuple[str, Callable[[Run], bool], Callable[[Run, Path], Path]]] = {
    "energy": ("Energy per token by cache", lambda run: bool(_metered(run)), _energy),
    "kernels": (
        "Kernels against full precision, and against a copy",
        lambda run: bool(run.result["metrics"].get("rows")),
        _kernels,
    ),
}
