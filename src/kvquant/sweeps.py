"""What a sweep writes down before anything is submitted: its grid, each point's folder, and later the jobs' numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvquant.errors import ResultError

SCHEMA = "kvquant.sweep/1"
FILE_NAME = "sweep.json"
MAX_SLUG_CHARS = 80


@dataclasses.dataclass
class Point:
    """One point of a sweep.

    Attributes:
        folder: name of its run directory below the sweep's.
        overrides: all overrides it is composed with.
        config_hash: of the keys that affect its result (`kvquant.results.config_hash`).
        job_id: number the scheduler gave it, once submitted.
        ended: how the scheduler says it ended, once that is known and no result says it.
    """

    folder: str
    overrides: list[str]
    config_hash: str
    job_id: str | None = None
    ended: str | None = None


@dataclasses.dataclass
class Sweep:
    """The contents of sweep.json.

    Attributes:
        grid_hash: the same for two sweeps over the same points.
        launcher: name of the launcher.
        code: git commit and hash of the uncommitted changes.
        finished_at: when the launching process saw the last job end; None while it runs, or after it died.
    """

    grid_hash: str
    launcher: str
    code: dict[str, Any]
    points: list[Point]
    started_at: str
    finished_at: str | None = None
    overhead_s_per_job: float | None = None

    def save(self, folder: Path) -> None:
        """Write sweep.json by temporary file and rename.

        Raises:
            ResultError: the folder cannot be written.
        """
        path = folder / FILE_NAME
        temporary = path.with_name(f".{FILE_NAME}.{os.getpid()}.tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(
                json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1) + "\n", encoding="utf-8"
            )
            os.replace(temporary, path)
        except OSError as error:
            raise ResultError(
                f"{path} must be writable, got {error.strerror or error}; choose another folder with "
                "hydra.sweep.dir=<folder>"
            ) from error


def load_sweep(path: Path) -> Sweep:
    """Read a sweep.json and check its shape.

    Args:
        path: the file, or the folder of the sweep.

    Raises:
        ResultError: it is missing, truncated, or not one of ours.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path} must be readable, got {error.strerror or error}") from error
    except ValueError as error:
        raise ResultError(f"{path} must be complete JSON, got: {error}; start the sweep anew") from error
    if not isinstance(body, dict) or body.pop("schema", None) != SCHEMA:
        raise ResultError(f"{path} must have schema {SCHEMA}; it was written by something else")
    try:
        points = [Point(**point) for point in body.pop("points")]
        return Sweep(points=points, **body)
    except (KeyError, TypeError) as error:
        raise ResultError(
            f"{path} must hold what this version writes, got: {error}; start the sweep anew"
        ) from error


def slug(overrides: Sequence[str]) -> str:
    """Return what a point's folder is called: its values, readable and safe in any file system.

    Args:
        overrides: those that make the point differ from its sweep.
    """
    parts = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        parts.append(f"{key.rpartition('.')[2].rpartition('/')[2]}={value}")
    text = re.sub(r"[^A-Za-z0-9._=,-]+", "_", ",".join(parts)).strip("_.,")
    return text[:MAX_SLUG_CHARS].rstrip("_.,")
