"""Tables of a report as data, Markdown and LaTeX: one per task, model, text, device and code; one row per run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from kvquant.report.collect import Run, flat
from kvquant.report.entries import Entries, entries_of
from kvquant.report.quantities import HEADLINES, Headline
from kvquant.report.series import blocks, differing, settings

# Of a task without headlines, so many of its own metrics.
MAX_OWN_METRICS = 8


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry: its text, and the run whose number it is, if it is one."""

    text: str
    run: Run | None = None


@dataclasses.dataclass(frozen=True)
class ReportTable:
    """A table: what its runs have in common, its columns, and rows of cells."""

    title: str
    origin: dict[str, str]
    columns: list[str]
    rows: list[list[Cell]]


def build_tables(runs: Sequence[Run]) -> list[ReportTable]:
    """Return a table per group of runs that may be compared.

    Args:
        runs: those that ended well.
    """
    return [_table(origin, members) for origin, members in blocks(runs)]


def _table(origin: dict[str, str], runs: list[Run]) -> ReportTable:
    trees = [{**settings(run), "seed": run.config("seed")} for run in runs]
    apart = differing(trees)
    kind = next((found for found in map(entries_of, runs) if found), None)
    if kind is not None:
        return _entry_table(origin, runs, trees, apart, kind)
    headlines = [h for h in HEADLINES if any(run.metric(*h.keys) is not None for run in runs)]
    headlines = headlines or _own_metrics(runs)
    rows = []
    for run, tree in sorted(zip(runs, trees, strict=True), key=lambda pair: _order(pair[1], apart)):
        cells = [Cell(_text(tree.get(key))) for key in apart]
        cells += [_number(run, headline) for headline in headlines]
        rows.append([*cells, Cell(run.folder.name, run)])
    title = (
        f"{origin['task']}: {origin['model']}, {origin['data']}, {origin['device']}, code {origin['code']}"
    )
    return ReportTable(title, origin, [*apart, *(h.title for h in headlines), "run"], rows)


def _entry_table(
    origin: dict[str, str], runs: list[Run], trees: list[dict[str, Any]], apart: list[str], kind: Entries
) -> ReportTable:
    """One row per entry of every run that measured several things."""
    rows = []
    for run, tree in zip(runs, trees, strict=True):
        for names, numbers in kind.rows(run):
            cells = [Cell(_text(tree.get(key))) for key in apart]
            cells += [*map(Cell, names), *(Cell(text, run if text else None) for text in numbers)]
            rows.append([*cells, Cell(run.folder.name, run)])
    return ReportTable(table_title(origin), origin, [*apart, *kind.names, *kind.numbers, "run"], rows)


def table_title(origin: dict[str, str]) -> str:
    """Task, model, text, device and code of a group of runs, those it has."""
    parts = [origin[name] for name in ("model", "data", "device") if origin[name] != "-"]
    return f"{origin['task']}: {', '.join([*parts, 'code ' + origin['code']])}"


def _own_metrics(runs: list[Run]) -> list[Headline]:
    names: dict[str, None] = {}
    for run in runs:
        for key, value in flat(run.result["metrics"], ""):
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and not key.startswith("model.")
            ):
                names[key] = None
    return [Headline(name, (name,), ".5g") for name in list(names)[:MAX_OWN_METRICS]]


def _number(run: Run, headline: Headline) -> Cell:
    value = run.metric(*headline.keys)
    return Cell("") if value is None else Cell(format(headline.factor * value, headline.spec), run)


def _order(tree: dict[str, Any], keys: list[str]) -> list[tuple[int, float, str]]:
    """Numbers as numbers, then text, key by key."""
    values = [tree.get(key) for key in keys]
    return [(0, float(v), "") if isinstance(v, int | float) else (1, 0.0, str(v)) for v in values]


def _text(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def markdown(table: ReportTable) -> str:
    """Return the table as Markdown under a heading."""

    def line(entries: Sequence[str]) -> str:
        return "| " + " | ".join(entry.replace("|", "\\|") for entry in entries) + " |"

    rule = "|" + "|".join("---:" if h != "run" else "---" for h in table.columns) + "|"
    body = [line([cell.text for cell in row]) for row in table.rows]
    return "\n".join([f"### {table.title}", "", line(table.columns), rule, *body, ""])


def latex_escape(text: str) -> str:
    """Escape what LaTeX would take for markup."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda m: special.get(m.group(), f"\\{m.group()}"), text)


def latex(table: ReportTable) -> str:
    """Return the table for ``booktabs``; the column of run directories stays out of print."""
    keep = [i for i, name in enumerate(table.columns) if name != "run"]

    def line(entries: Sequence[str]) -> str:
        return " & ".join(latex_escape(entries[i]) for i in keep) + r" \\"

    body = [line([cell.text for cell in row]) for row in table.rows]
    return "\n".join(
        [
            f"% {' '.join(table.title.split())}",
            rf"\begin{{tabular}}{{{'r' * len(keep)}}}",
            r"\toprule",
            line(table.columns),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )
