"""Text and numbers as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvquant.report.tables import latex_escape

# main.tex defines it: visible, in colour.
NOT_MEASURED = r"\notmeasured{}"


def number(value: Any, spec: str, factor: float = 1.0) -> str | None:
    """Return a number as text, a minus sign as one; None for anything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    scaled = round(factor * value) if spec.endswith("d") else factor * value
    return format(scaled, spec).replace("-", "$-$").replace("%", r"\%")


def interval(value: Any, spec: str, factor: float = 1.0) -> str | None:
    """Return ``estimate [low, high]`` of an interval's mapping; None where there is none or it has no ends."""
    if not isinstance(value, dict):
        return None
    middle = value.get("estimate", value.get("value"))
    ends = [number(entry, spec, factor) for entry in (middle, value.get("low"), value.get("high"))]
    if any(end is None for end in ends):
        return None
    # The space between the ends must not become a line's end.
    return f"{ends[0]} [{ends[1]},~{ends[2]}]"


def code(text: str) -> str:
    """Return a command or a path in typewriter, allowed to break after punctuation."""
    broken = latex_escape(text)
    for mark in (",", "=", "/", ".", "]", r"\_"):
        broken = broken.replace(mark, mark + r"\allowbreak{}")
    return rf"\texttt{{{broken}}}"


def tabular(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    rules_before: Sequence[int] = (),
    first: str = "l",
) -> str:
    """Return a ``booktabs`` table of cells that are LaTeX already.

    Args:
        columns: heads.
        rows: one text per column.
        rules_before: indices of rows that a thin rule precedes.
        first: alignment of the first column; the others are on the right.
    """
    body = []
    for index, row in enumerate(rows):
        if index in rules_before:
            body.append(r"\midrule")
        body.append(" & ".join(row) + r" \\")
    return "\n".join(
        [
            rf"\begin{{tabular}}{{@{{}}{first}{'r' * (len(columns) - 1)}@{{}}}}",
            r"\toprule",
            " & ".join(columns) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )
