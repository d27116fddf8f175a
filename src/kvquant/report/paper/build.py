"""Write the paper's generated folder whole: macros.tex, tables, figures, commands, what is missing, manifest.json."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvquant.report.collect import Run
from kvquant.report.paper import tex
from kvquant.report.paper.figures import draw_figures
from kvquant.report.paper.macros import Filled, fill, macro_file
from kvquant.report.paper.sources import (
    METER_COST,
    METER_COST_MODULE,
    SOURCES,
    choose,
    kernel_rows,
    largest_part_first,
)
from kvquant.report.paper.tables import build_tables, compiled
from kvquant.report.tables import latex_escape

MANIFEST = "manifest.json"
# Written by `python -m kvquant.bench.compile_table --json`; no run, since it needs no device.
COMPILED = Path("data") / "compile_table.json"
# Written by `python -m kvquant.bench.meter_cost --json`; no run either.
METER_COSTS = "data/*meter_cost.json"


def write_paper(runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """Write everything that main.tex reads; what an earlier call left there goes.

    Args:
        runs: those that ended well.
        folder: paper/generated.

    Returns:
        The manifest: ``macros``, ``tables``, ``figures`` (each by name, with run and git SHA), and ``not_measured``:
        of the macros that the text uses those without a number, by source.
    """
    chosen = choose(runs) | meter_cost(folder.parent)
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    measured = kernel_rows(runs)
    parts = largest_part_first(measured)
    filled = fill(chosen, parts)
    manifest: dict[str, Any] = {"macros": {entry.macro.name: _macro_entry(entry) for entry in filled}}
    tables, figures = {}, {}
    (fresh / "macros.tex").write_text(macro_file(filled), encoding="utf-8")
    for name, text, shown in build_tables(chosen, measured):
        # A file that ends in a space after \end{tabular} would widen the box it is read into.
        (fresh / f"{name}.tex").write_text(text.rstrip("\n") + "%\n", encoding="utf-8")
        tables[name] = [_origin(run) for run in shown]
    record = folder.parent / COMPILED
    table = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    (fresh / "table-compiled.tex").write_text(compiled(table).rstrip("\n") + "%\n", encoding="utf-8")
    tables["table-compiled"] = [] if table is None else [{"run": os.path.relpath(record), "git_sha": None}]
    for name, shown in draw_figures(chosen, runs, measured, fresh):
        figures[name] = [_origin(run) for run in shown]
    manifest |= {"tables": tables, "figures": figures}
    used = used_commands(folder.parent)
    missing: dict[str, list[str]] = {}
    for entry in filled:
        if entry.text is None and (entry.macro.name in used or not used):
            missing.setdefault(entry.macro.source, []).append(entry.macro.name)
    manifest["not_measured"] = missing
    (fresh / "commands.tex").write_text(_commands(chosen, parts), encoding="utf-8")
    (fresh / "missing.tex").write_text(_missing(chosen, missing), encoding="utf-8")
    (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    # As a folder it cannot be replaced in one step; a build that reads half of it fails on a missing file.
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)
    return manifest


def _origin(run: Run) -> dict[str, Any]:
    provenance = run.result["provenance"]
    return {
        "run": os.path.relpath(run.file),
        "git_sha": provenance.get("git_sha"),
        "git_dirty": provenance.get("git_dirty"),
        "device": provenance.get("device"),
        "started_at": run.result.get("started_at"),
    }


def _macro_entry(entry: Filled) -> dict[str, Any]:
    where = {"run": None, "git_sha": None} if entry.run is None else _origin(entry.run)
    return {"text": entry.text, "source": entry.macro.source, "metric": entry.pointer, **where}


def meter_cost(paper: Path) -> dict[str, Run]:
    """Return the record of what a meter's readings cost, in a run's place; of several the last by name; empty: none.

    Args:
        paper: paper/.
    """
    for path in sorted(paper.glob(METER_COSTS), reverse=True):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["provenance"]["device"] = record["source"]
        return {METER_COST: Run(path, record)}
    return {}


def command(run: Run) -> str:
    """Return what was typed to start a run."""
    if "task" not in run.result:
        return f"python -m {METER_COST_MODULE} --seconds {run.result['seconds']:g}"
    return " ".join(["python src/run.py", *(run.result["provenance"].get("overrides") or [])])


def _commands(chosen: dict[str, Run], parts: Sequence[Run]) -> str:
    """A list of what each source was measured with: command, machine, code; of a bench each of its parts."""
    lines = [r"\begin{itemize}"]
    for source in SOURCES:
        one = [chosen[source.name]] if source.name in chosen else []
        for run in parts if source.name == "kernels" else one:
            provenance = run.result["provenance"]
            sha = (provenance.get("git_sha") or "no git")[:10] + ("+" if provenance.get("git_dirty") else "")
            seconds = run.result.get("duration_s") or run.result.get("seconds") or 0
            where = f"{provenance.get('device')}; code {sha}; {seconds:.0f} s"
            lines.append(
                rf"\item {latex_escape(source.what)}: {tex.code(command(run))} ({latex_escape(where)})"
            )
    lines.append(r"\end{itemize}")
    return "\n".join([*lines, ""]) if len(lines) > 2 else tex.NOT_MEASURED + "\n"


def _missing(chosen: dict[str, Run], missing: dict[str, list[str]]) -> str:
    """A list of what has not been measured, and of numbers that a run does not have."""
    lines = []
    for source in SOURCES:
        if source.name not in chosen:
            lines.append(rf"\item {latex_escape(source.what)} ({tex.code(source.command)})")
        elif source.name in missing:
            names = ", ".join(missing[source.name])
            lines.append(rf"\item of {latex_escape(source.what)}: {names}")
    if not lines:
        return "Every number of this paper was measured.\n"
    return "\n".join([r"\begin{itemize}", *lines, r"\end{itemize}", ""])


def used_commands(folder: Path) -> set[str]:
    """Return the names of all commands in the LaTeX sources of a folder and its sections.

    Args:
        folder: paper/.
    """
    sources = [*folder.glob("*.tex"), *folder.glob("sections/*.tex")]
    return {
        name for path in sources for name in re.findall(r"\\([A-Za-z]+)", path.read_text(encoding="utf-8"))
    }
