"""Rows of a local jsonl file, checked before a model is asked anything: each refusal names the file and the row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvquant.errors import DataError


def read_rows(
    path: str | Path, fields: Sequence[str], *, where_from: str, limit: int | None = None
) -> list[dict[str, Any]]:
    """Read a jsonl file.

    Args:
        path: one JSON object a line, UTF-8.
        fields: what every row must have.
        where_from: said when the file is missing.
        limit: rows to read; None: all.

    Raises:
        DataError: missing, not UTF-8, not JSON, without rows or without a field.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"task.path must name a jsonl file, {file} is missing; download it: {where_from}")
    rows: list[dict[str, Any]] = []
    for number, raw in enumerate(file.read_bytes().splitlines(), 1):
        if not raw.strip():
            continue
        if limit is not None and len(rows) >= limit:
            break
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}, row {number} must be UTF-8, byte {error.start} is not; convert the file (iconv -t utf-8)"
            ) from error
        except ValueError as error:
            raise DataError(
                f"{file}, row {number} must be JSON, got {raw[:40]!r}; repair or drop it"
            ) from error
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            got = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{file}, row {number} must have the fields {', '.join(fields)}; {missing[0]} is missing (it has {got})"
            )
        rows.append(row)
    if not rows:
        raise DataError(f"{file} must hold at least 1 row, it holds none; download it again: {where_from}")
    return rows
