"""One HTML page that needs nothing else: tables whose numbers link to their run directories, figures embedded."""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from kvquant.report.collect import Collection, Run
from kvquant.report.tables import Cell, ReportTable

STYLE = """
:root { color-scheme: light dark; --line: #8884; --link: #0072B2; }
@media (prefers-color-scheme: dark) { :root { --link: #56B4E9; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:last-child, td:last-child, .text td, .text th { text-align: left; }
figure { margin: 1rem 0; background: #fff; padding: .5rem; } img { max-width: 100%; }
figcaption { color: #333; font-size: .9rem; }
"""


def write_page(
    path: Path,
    found: Collection,
    tables: Sequence[ReportTable],
    figures: Sequence[tuple[str, Path]],
    notes: Sequence[str],
) -> None:
    """Write the page.

    Args:
        path: the file; links are relative to its folder, so that both may move together.
        found: what was collected.
        tables: the tables, in order.
        figures: title and PNG of each figure.
        notes: what was left out, and why.
    """
    counts = Counter(found.status(run) for run in found.runs)
    counts["missing"] = len(found.missing)
    counts["foreign or broken"] = len(found.rejected)
    summary = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>KV Cache Optimizer: report</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>',
        f"<h1>KV Cache Optimizer: report</h1><p>{len(found.runs)} runs: {escape(summary)}.</p>",
    ]
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    parts.append(_not_ok(path, found))
    if figures:
        parts.append("<h2>Figures</h2>")
        parts += [_figure(title, image) for title, image in figures]
    if tables:
        parts.append("<h2>Tables</h2><p>Every number links to the run it comes from.</p>")
        parts += [_table(path, table) for table in tables]
    parts.append("</body></html>\n")
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("\n".join(parts), encoding="utf-8")
    os.replace(temporary, path)


def _href(page: Path, target: Path) -> str:
    return quote(os.path.relpath(target, page.parent))


def _link(page: Path, run: Run, text: str) -> str:
    return f'<a href="{_href(page, run.file)}">{escape(text)}</a>'


def _cell(page: Path, cell: Cell) -> str:
    return f"<td>{escape(cell.text) if cell.run is None else _link(page, cell.run, cell.text)}</td>"


def _table(page: Path, table: ReportTable) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    body = "\n".join(f"<tr>{''.join(_cell(page, cell) for cell in row)}</tr>" for row in table.rows)
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _figure(title: str, image: Path) -> str:
    data = base64.b64encode(image.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )


def _not_ok(page: Path, found: Collection) -> str:
    """What did not end well, with its reason."""
    rows = []
    for run in found.runs:
        if not run.ok:
            status = found.status(run)
            reason = found.lost.get(run.folder) or (run.result["error"] or {}).get("message") or ""
            rows.append((_link(page, run, str(run.folder)), status, reason))
    rows += [(escape(str(folder)), "missing", overrides) for folder, overrides in found.missing]
    rows += [(escape(str(file)), "left out", reason) for file, reason in found.rejected]
    if not rows:
        return ""
    body = "\n".join(
        f"<tr><td>{where}</td><td>{escape(status)}</td><td>{escape(reason)}</td></tr>"
        for where, status, reason in rows
    )
    return (
        '<h2>Without a result</h2><div class="scroll"><table class="text"><thead><tr><th>where</th><th>status</th>'
        f"<th>why</th></tr></thead><tbody>{body}</tbody></table></div>"
    )
