"""Runs that measured many things at once: what their rows are called and say in a report's tables, by task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from kvquant.report.collect import Run
from kvquant.report.quantities import VARIANT_COLUMNS, variant_numbers, variants_of

# A row: the text that names it, then its numbers as text, empty where there is none.
Rows = list[tuple[list[str], list[str]]]


@dataclasses.dataclass(frozen=True)
class Entries:
    """The rows of one kind of run: columns that name a row, columns of numbers, and where both are found."""

    names: tuple[str, ...]
    numbers: tuple[str, ...]
    rows: Callable[[Run], Rows]


def entries_of(run: Run) -> Entries | None:
    """The kind of rows a run has; None where it measured one thing."""
    return next((kind for kind in KINDS if kind.rows(run)), None)


def _compared(run: Run) -> Rows:
    return [([label], variant_numbers(entry)) for label, entry in variants_of(run).items()]


def _dicts(run: Run, key: str) -> list[dict[str, Any]]:
    found = run.result["metrics"].get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _kernels(run: Run) -> Rows:
    return [
        (
            [str(row.get(key, "")) for key in ("operation", "shape", "label", "bits")],
            [
                _number(row.get("us"), ".0f"),
                _number(row.get("bytes"), ".1f", 1e-6),
                _number(row.get("gb_per_s"), ".0f"),
                _number(row.get("copy_fraction"), ".1f", 100),
                _number(row.get("speedup_over_full_precision"), ".2f"),
                _number(row.get("speedup_over_dequantize_then_attend"), ".2f"),
            ],
        )
        for row in _dicts(run, "rows")
        if "operation" in row
    ]


def _number(value: Any, spec: str, factor: float = 1.0) -> str:
    return format(factor * value, spec) if isinstance(value, int | float) else ""


KINDS = (
    Entries(("method",), tuple(title for title, *_ in VARIANT_COLUMNS), _compared),
    Entries(
        ("operation", "shape", "case", "bits"),
        ("us", "MB", "GB/s", "of a copy [%]", "x full precision", "x dequantize then attend"),
        _kernels,
    ),
)
