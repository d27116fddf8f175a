"""Read any number of run directories: what is ours, what is not and why, and which points of a sweep are missing."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvquant.errors import ResultError
from kvquant.results import FILE_NAME, load_result
from kvquant.sweep_plan import slurm_states
from kvquant.sweeps import FILE_NAME as SWEEP_FILE
from kvquant.sweeps import load_sweep

# Hydra's, submitit's and wandb's own folders hold thousands of files and never a run.
SKIPPED = {".hydra", ".submitit", "wandb", "__pycache__", ".git"}
Track = Callable[[Iterable[Any], str, int], Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory and its result.json; a result.json that was kept under another name stands for its directory."""

    folder: Path
    result: dict[str, Any]

    @property
    def file(self) -> Path:
        """Where its numbers lie."""
        return self.folder if self.folder.suffix == ".json" else self.folder / FILE_NAME

    def config(self, key: str) -> Any:
        """Return a setting by dotted key, None where this run has no such key."""
        return _dig(self.result["config"], key)

    def metric(self, *keys: str) -> float | None:
        """Return the first of these metrics that is a number; None where there is none."""
        for key in keys:
            value = _dig(self.result["metrics"], key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        return None

    @property
    def ok(self) -> bool:
        """Whether the run ended well: only then are its numbers used."""
        return bool(self.result["status"] == "ok")


@dataclasses.dataclass
class Collection:
    """What was found.

    Attributes:
        runs: every result.json of ours, in the order of their folders; reports themselves left out.
        rejected: path and reason of every file that is not one of ours or is broken.
        missing: folder and overrides of every point of a sweep that has no result.
        lost: folders whose run still says ``running`` although its sweep is over.
    """

    runs: list[Run] = dataclasses.field(default_factory=list)
    rejected: list[tuple[Path, str]] = dataclasses.field(default_factory=list)
    missing: list[tuple[Path, str]] = dataclasses.field(default_factory=list)
    lost: dict[Path, str] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> list[Run]:
        """The runs whose numbers count."""
        return [run for run in self.runs if run.ok]

    def status(self, run: Run) -> str:
        """The run's status, with ``lost`` for one that was killed outright."""
        return "lost" if run.folder in self.lost else str(run.result["status"])


def collect(patterns: Sequence[str], track: Track | None = None) -> Collection:
    """Read every run directory that the patterns name.

    Args:
        patterns: folders or globs; a folder is searched down to its run directories, a JSON file is one run.
        track: shows a progress bar.

    Raises:
        ResultError: nothing of ours was found.
    """
    found = Collection()
    sweeps: list[Path] = []
    results: list[Path] = []
    for folder in _folders(patterns):
        _walk(folder, results, sweeps)
    paths = sorted(set(results))
    for path in track(paths, "reading results", len(paths)) if track else paths:
        try:
            result = load_result(path)
            _check_shape(path, result)
        except ResultError as error:
            found.rejected.append((path, str(error)))
            continue
        if result["task"] != "report":
            found.runs.append(Run(path.parent if path.name == FILE_NAME else path, result))
    for path in sorted(set(sweeps)):
        _add_missing(path, found)
    if not found.runs and not found.missing:
        left_out = f"; {len(found.rejected)} foreign or broken ones were left out" if found.rejected else ""
        raise ResultError(
            f"report.runs must name at least one run directory, got none under {', '.join(patterns)}{left_out}; "
            "try report.runs=multirun/<date>"
        )
    return found


def _folders(patterns: Sequence[str]) -> list[Path]:
    return [Path(match) for pattern in patterns for match in sorted(glob.glob(os.path.expanduser(pattern)))]


def _walk(folder: Path, results: list[Path], sweeps: list[Path]) -> None:
    """Find result and sweep files below a folder, without following links and without looking into run directories."""
    pending = [str(folder)] if folder.is_dir() else []
    if folder.suffix == ".json" and folder.is_file():
        results.append(folder)
    while pending:
        current = pending.pop()
        try:
            with os.scandir(current) as entries:
                below, is_run = [], False
                for entry in entries:
                    if entry.name == FILE_NAME:
                        is_run = True
                    elif entry.name == SWEEP_FILE:
                        sweeps.append(Path(entry.path))
                    elif entry.name not in SKIPPED and entry.is_dir(follow_symlinks=False):
                        below.append(entry.path)
        except OSError:
            # Somebody else's folder, or one that went away meanwhile.
            continue
        if is_run:
            results.append(Path(current) / FILE_NAME)
        else:
            pending += below


def _check_shape(path: Path, result: dict[str, Any]) -> None:
    for key in ("config", "provenance", "metrics"):
        if not isinstance(result[key], dict):
            raise ResultError(f"{path} must have a mapping under {key}, got {type(result[key]).__name__}")


def _add_missing(path: Path, found: Collection) -> None:
    try:
        sweep = load_sweep(path)
    except ResultError as error:
        found.rejected.append((path, str(error)))
        return
    # A sweep nobody waited for (detached, or its launcher died) does not say how its jobs ended; Slurm may.
    states = slurm_states(sweep, sweep.points) if sweep.finished_at is None else {}
    here = {run.folder: run for run in found.runs if run.folder.parent == path.parent}
    unreadable = {rejected.parent for rejected, _ in found.rejected}
    for point in sweep.points:
        folder, state = path.parent / point.folder, states.get(point.job_id or "")
        if folder not in here:
            if folder not in unreadable:
                suffix = f" ({state})" if state else ""
                found.missing.append((folder, " ".join(point.overrides) + suffix))
        elif here[folder].result["status"] == "running":
            reason = point.ended or (str(state) if state and not state.alive else None)
            if reason:
                found.lost[folder] = reason


def _dig(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    return tree


def flat(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and scalars of nested containers; a list is one value, as JSON text."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", json.dumps(value)
        else:
            yield f"{prefix}{key}", value
