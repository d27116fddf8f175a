"""One row per run, one column per variable: CSV and Parquet of everything that was measured."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvquant.report.collect import Collection, Run, flat

# First columns, in this order: where a row comes from.
ORIGIN = (
    "run_dir",
    "status",
    "task",
    "model_hash",
    "data_hash",
    "device",
    "git_sha",
    "config_hash",
    "started_at",
    "duration_s",
    "error",
)


def tidy_rows(found: Collection) -> tuple[list[str], list[dict[str, Any]]]:
    """Return column names and rows; a variable that a run does not have is absent from its row.

    Args:
        found: what was collected; runs that did not end well are rows too, told apart by ``status``.
    """
    rows = [_row(found, run) for run in found.runs]
    names = {name for row in rows for name in row} - set(ORIGIN)
    return [*ORIGIN, *sorted(names)], rows


def _row(found: Collection, run: Run) -> dict[str, Any]:
    result, provenance = run.result, run.result["provenance"]
    row: dict[str, Any] = {
        "run_dir": str(run.folder),
        "status": found.status(run),
        "task": result["task"],
        **{key: provenance.get(key) for key in ("model_hash", "data_hash", "device", "git_sha")},
        "config_hash": result["config_hash"],
        "started_at": result.get("started_at"),
        "duration_s": result.get("duration_s"),
        "error": (result["error"] or {}).get("message"),
    }
    row.update(flat(result["config"], "config."))
    row.update(flat(result["metrics"], "metrics."))
    return row


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as UTF-8 CSV; what a run does not have is an empty field."""
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def write_parquet(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as Parquet; a column whose values are of several kinds holds them as text."""
    import pyarrow
    import pyarrow.parquet

    arrays = {name: pyarrow.array(*_typed([row.get(name) for row in rows])) for name in columns}
    temporary = path.with_name(f".{path.name}")
    pyarrow.parquet.write_table(pyarrow.table(arrays), temporary, compression="zstd")
    os.replace(temporary, path)


def _typed(values: list[Any]) -> tuple[list[Any], str]:
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {bool}:
        return values, "bool"
    if kinds == {int}:
        return values, "int64"
    if kinds and kinds <= {int, float}:
        return [None if value is None else float(value) for value in values], "double"
    return [None if value is None else str(value) for value in values], "string"
