"""``task=report``: read run directories and leave tables, figures and one page of them all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track as rich_track

from kvquant.report.collect import Collection, collect
from kvquant.report.energy import TASK as ENERGY
from kvquant.report.energy import draw_energy_figures, energy_tables
from kvquant.report.figures import draw
from kvquant.report.page import write_page
from kvquant.report.paper.build import write_paper
from kvquant.report.quantities import FIGURES
from kvquant.report.run_figures import draw_run_figures
from kvquant.report.tables import build_tables, latex, markdown
from kvquant.report.tidy import tidy_rows, write_csv, write_parquet

# A terminal's worth; the page names the rest.
MAX_TABLE_ROWS = 50


def run(cfg: Any, context: Any) -> None:
    """Collect ``report.runs`` and write runs.csv, runs.parquet, tables.md, tables.tex, figures and report.html.

    With ``report.paper_dir`` the paper's generated part too.

    Args:
        cfg: the composed configuration; the settings are those of the group ``report``.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.

    Raises:
        ResultError: no run directory was found.
    """
    runs = cfg.report.runs
    found = collect([runs] if isinstance(runs, str) else list(runs), _track(context.console))
    folder = Path(context.run_dir)
    columns, rows = tidy_rows(found)
    write_csv(folder / "runs.csv", columns, rows)
    write_parquet(folder / "runs.parquet", columns, rows)
    tables = [
        *build_tables([run for run in found.ok if run.result["task"] != ENERGY]),
        *energy_tables(found.ok),
    ]
    _write(folder / "tables.md", "\n".join(map(markdown, tables)))
    _write(folder / "tables.tex", "% Needs \\usepackage{booktabs}.\n" + "\n".join(map(latex, tables)))
    drawn: list[tuple[str, Path]] = []
    empty: list[str] = []
    with context.console.status("drawing"):
        for spec in FIGURES:
            paths = draw(spec, found.ok, folder)
            if paths:
                drawn.append((spec.title, paths[0]))
            else:
                empty.append(spec.name)
            for path in paths:
                context.record.add_figure(path)
        for title, paths in [*draw_energy_figures(found.ok, folder), *draw_run_figures(found.ok, folder)]:
            drawn.append((title, paths[0]))
            for path in paths:
                context.record.add_figure(path)
    notes = [f"Figures without data in these runs: {', '.join(empty)}."] if empty else []
    write_page(folder / "report.html", found, tables, drawn, notes)
    _summarize(context, found, len(tables), len(drawn))
    if cfg.report.paper_dir is not None:
        with context.console.status("writing the paper's numbers"):
            _add_paper(context, write_paper(found.ok, Path(cfg.report.paper_dir)), cfg.report.paper_dir)


def _track(console: Console) -> Callable[..., Any]:
    return lambda items, description, total: iter(
        rich_track(items, description, total, console=console, transient=True)
    )


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _add_paper(context: Any, manifest: dict[str, Any], folder: str) -> None:
    """Count and name what the paper has, and what it has not."""
    missing = manifest["not_measured"]
    context.record.metrics["paper"] = {
        "macros": len(manifest["macros"]),
        "not_measured": sum(map(len, missing.values())),
        "missing_by_source": missing,
    }
    table = context.record.table
    for source, names in missing.items():
        few = ", ".join(f"\\{name}" for name in names[:3]) + (", ..." if len(names) > 3 else "")
        table.rows.append([f"{len(names)} macros of {folder}", "n/m", f"{source}: {few}"])


def _summarize(context: Any, found: Collection, tables: int, figures: int) -> None:
    """Metrics and table of the report itself: how many of what, and where each that is not ok lies."""
    counts = Counter(found.status(run) for run in found.runs)
    context.record.metrics.update(
        {
            "runs": len(found.runs),
            "by_status": dict(counts),
            "missing": len(found.missing),
            "left_out": len(found.rejected),
            "tables": tables,
            "figures": figures,
        }
    )
    rows: list[list[str]] = [[f"{number} runs", status, ""] for status, number in sorted(counts.items())]
    for result in found.runs:
        if not result.ok:
            error = (result.result["error"] or {}).get("message") or found.lost.get(result.folder, "")
            rows.append([str(result.folder), found.status(result), error])
    rows += [[str(where), "missing", overrides] for where, overrides in found.missing]
    rows += [[str(where), "left out", reason] for where, reason in found.rejected]
    if len(rows) > MAX_TABLE_ROWS:
        rows[MAX_TABLE_ROWS:] = [[f"{len(rows) - MAX_TABLE_ROWS} more", "", "all are in report.html"]]
    context.record.set_table(f"report.html over {len(found.runs)} runs", ["where", "status", "why"], rows)
