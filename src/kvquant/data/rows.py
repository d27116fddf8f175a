"""Rows of a local jsonl file, checked before a model is asked anything: each refusal names the file and the row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvquant.errors import DataError

_NAMES = {str: "a text", list: "a list", type(None): "null"}
Kinds = tuple[type, ...]


class Row(NamedTuple):
    """One line of a file: its number in it, counted from 1, and the object it holds."""

    number: int
    values: dict[str, Any]


def read_rows(
    path: str | Path, fields: Mapping[str, Kinds], *, where_from: str, limit: int | None = None
) -> list[Row]:
    """Read a jsonl file.

    Args:
        path: one JSON object a line, UTF-8; empty lines are passed over.
        fields: what every row must have, and as what (`str`, `list` or `NoneType`).
        where_from: said when the file is missing.
        limit: rows to read; None: all.

    Raises:
        DataError: missing, not UTF-8, not JSON, without rows, without a field or with something else in it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{file} is missing; download it: {where_from}")
    rows: list[Row] = []
    for number, raw in enumerate(file.read_bytes().splitlines(), 1):
        if limit is not None and len(rows) >= limit:
            break
        if raw.strip():
            rows.append(Row(number, _checked(raw, fields, f"{file}, row {number}")))
    if not rows:
        raise DataError(f"{file} must hold at least 1 row, it holds none; download it again: {where_from}")
    return rows


def _checked(raw: bytes, fields: Mapping[str, Kinds], what: str) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what} must be UTF-8, byte {error.start} is not; convert the file (iconv -t utf-8)"
        ) from error
    except ValueError as error:
        raise DataError(f"{what} must be JSON, got {raw[:40]!r}; repair or drop it") from error
    for name, kinds in fields.items():
        if not isinstance(row, dict) or name not in row:
            got = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{what} must have the fields {', '.join(fields)}; {name} is missing (it has {got})"
            )
        if not isinstance(row[name], kinds):
            wanted = " or ".join(_NAMES[kind] for kind in kinds)
            raise DataError(
                f"{what} must have {wanted} as {name}, got {str(row[name])[:40]!r}; repair or drop it"
            )
    return dict(row)
