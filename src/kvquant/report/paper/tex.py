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


def plain(text: str) -> str:
    """Return text that a run printed as LaTeX; the text font has no less-than sign of its own, nor these others."""
    signs = {"<": "$<$", ">": "$>$", "|": "$|$", "±": r"$\pm$", "\u00d7": r"$\times$"}
    return "".join(signs.get(mark, mark) for mark in latex_escape(text))


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
    spans: Sequence[tuple[str, int]] = (),
) -> str:
    """Return a ``booktabs`` table of cells that are LaTeX already.

    Args:
        columns: heads.
        rows: one text per column.
        rules_before: indices of rows that a thin rule precedes.
        spans: a line above the heads: a text and how many columns it covers, from the second column on.

    The first column is on the left, the others on the right.
    """
    above, at = [], 2
    for text, width in spans:
        above.append(
            (rf"& \multicolumn{{{width}}}{{c}}{{{text}}}", rf"\cmidrule(lr){{{at}-{at + width - 1}}}")
        )
        at += width
    over = [" ".join(cell for cell, _ in above) + r" \\", "".join(rule for _, rule in above)] if above else []
    body = []
    for index, row in enumerate(rows):
        if index in rules_before:
            body.append(r"\midrule")
        body.append(" & ".join(row) + r" \\")
    return "\n".join(
        [
            rf"\begin{{tabular}}{{@{{}}l{'r' * (len(columns) - 1)}@{{}}}}",
            r"\toprule",
            *over,
            " & ".join(columns) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )
