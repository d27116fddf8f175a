"""What a run leaves behind: one result.json of the same shape for every task, trusted by its status alone."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvquant.errors import ResultError
from kvquant.provenance import collect_provenance

SCHEMA = "kvquant.result/1"
FILE_NAME = "result.json"
STATUSES = ("running", "ok", "failed", "out_of_memory", "interrupted")
REQUIRED = ("schema", "status", "task", "config", "config_hash", "provenance", "metrics", "table", "error")
# Two runs that differ in these alone have the same result.
HASH_EXCLUDES = ("hydra", "tracking", "report", "sweep", "calibration.dir", "calibration.lock_timeout_s")


def config_hash(config: Mapping[str, Any]) -> str:
    """Return 16 hex digits over the keys that can change a result.

    Args:
        config: the resolved configuration as plain containers.
    """
    kept = {
        key: {k: v for k, v in value.items() if f"{key}.{k}" not in HASH_EXCLUDES}
        if isinstance(value, Mapping)
        else value
        for key, value in config.items()
        if key not in HASH_EXCLUDES
    }
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclasses.dataclass
class Table:
    """The table a run prints; rows hold text or numbers, one entry per column."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


def plain(value: Any, key: str, nulls: dict[str, str]) -> Any:
    """Turn ``value`` into what JSON can hold; NaN and infinity become null with their reason in ``nulls``.

    Args:
        value: numbers, text, paths, containers of them, NumPy or torch arrays.
        key: where it stands, for messages.
        nulls: collects ``key -> reason``.

    Raises:
        ResultError: an object that means nothing in JSON.
    """
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a NumPy or torch scalar
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        nulls[key] = f"was {value}"
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{key}.{k}", nulls) for k, v in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence | set | frozenset):
        return [plain(v, f"{key}.{i}", nulls) for i, v in enumerate(value)]
    raise ResultError(
        f"{key} must be plain numbers, text, lists or dicts, got {type(value).__name__}; convert it"
    )


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class RunRecord:
    """The record of one run, written at its start and whenever its status changes.

    Args:
        run_dir: folder of the run; made if missing.
        task: the task's name.
        config: the resolved configuration as plain containers.
        seed: the seed every generator got.

    Attributes:
        metrics: numbers by name, the unit in the name (``ttft_s``, ``peak_bytes``); nesting is allowed.
        provenance: code, packages, machine; tasks add ``model_hash`` and ``data_hash``.
        table: what is printed at the end, if anything.
        figures: pictures in ``run_dir``, by file name.

    Raises:
        ResultError: the folder cannot be written; nothing has been computed yet then.
    """

    def __init__(self, run_dir: Path, *, task: str, config: Mapping[str, Any], seed: int = 0) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.task = task
        self.config = config
        self.status = "running"
        self.metrics: dict[str, Any] = {}
        self.provenance: dict[str, Any] = {
            **collect_provenance(),
            "seed": seed,
            "device": None,
            "model_hash": None,
            "data_hash": None,
        }
        self.table: Table | None = None
        self.figures: list[str] = []
        self.error: dict[str, str] | None = None
        self.started_at = _now()
        self.finished_at: str | None = None
        self._start_s = time.monotonic()

    def set_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Set the table that is printed and stored.

        Raises:
            ResultError: a row does not have one entry per column.
        """
        for row in rows:
            if len(row) != len(columns):
                raise ResultError(
                    f"a row of table {title!r} must have {len(columns)} entries, got {len(row)}: {row}"
                )
        self.table = Table(title, list(columns), [list(row) for row in rows])

    def add_figure(self, path: Path) -> None:
        """Name a picture that the run left in its folder."""
        self.figures.append(Path(path).name)

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready containers."""
        nulls: dict[str, str] = {}
        body = {
            "schema": SCHEMA,
            "status": self.status,
            "task": self.task,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "duration_s": round(time.monotonic() - self._start_s, 3),
            "metrics": plain(self.metrics, "metrics", nulls),
            "table": plain(dataclasses.asdict(self.table), "table", nulls) if self.table else None,
            "figures": list(self.figures),
            "error": self.error,
            "config_hash": config_hash(self.config),
            "config": plain(self.config, "config", nulls),
            "provenance": plain(self.provenance, "provenance", nulls),
        }
        return {**body, "nulls": nulls}

    def save(self) -> None:
        """Write result.json by temporary file and rename: a reader sees the old one or the new one, never half.

        Raises:
            ResultError: the folder is read-only, full or gone.
        """
        text = json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"
        temporary = self.path.with_name(f".{FILE_NAME}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise ResultError(
                f"{self.path} must be writable, got {error.strerror or error}; "
                "free some space or choose another folder with hydra.run.dir=<folder>"
            ) from error

    def finish(self, status: str, error: BaseException | None = None) -> None:
        """Set the final status and save.

        Args:
            status: one of `STATUSES` but ``running``.
            error: what ended the run, if something did; its traceback is kept here, not printed.
        """
        if status not in STATUSES[1:]:
            raise ResultError(f"status must be one of {', '.join(STATUSES[1:])}, got {status}; try ok")
        self.status = status
        self.finished_at = _now()
        if error is not None:
            self.error = {
                "type": type(error).__name__,
                "message": one_line(error),
                "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
            }
        self.save()


def one_line(error: BaseException) -> str:
    """Return an exception's message as one line, its class name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def load_result(path: Path | str) -> dict[str, Any]:
    """Read a result.json and check its shape.

    Args:
        path: the file, or the run directory it lies in.

    Raises:
        ResultError: it is missing, truncated, or not one of ours.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path} must be readable, got {error.strerror or error}") from error
    except ValueError as error:
        raise ResultError(
            f"{path} must be complete JSON, got: {one_line(error)}; run the job again"
        ) from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        found = result.get("schema") if isinstance(result, dict) else type(result).__name__
        raise ResultError(f"{path} must have schema {SCHEMA}, got {found}; it was written by something else")
    missing = [key for key in REQUIRED if key not in result]
    if missing:
        raise ResultError(
            f"{path} must have the keys {', '.join(REQUIRED)}, got none for {', '.join(missing)}"
        )
    if result["status"] not in STATUSES:
        raise ResultError(f"{path} must have a status of {', '.join(STATUSES)}, got {result['status']}")
    return result
