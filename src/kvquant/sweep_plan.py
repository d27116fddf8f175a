"""A sweep from its grid to its end: folders of points, what is left to do, the table at the end."""

from __future__ import annotations

import datetime
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvquant.errors import ConfigError, LaunchError, ResultError
from kvquant.provenance import code_hash
from kvquant.results import config_hash, load_result
from kvquant.slurm import JobState, job_states, own_job
from kvquant.sweeps import FILE_NAME, Point, Sweep, load_sweep, slug

# A longer table is cut to the points that did not end well; the report has them all.
MAX_TABLE_ROWS = 200


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def check_submission(run_dir: Path, config: Mapping[str, Any]) -> str | None:
    """Refuse to run a point whose configuration or code is not the one that was submitted.

    Hydra composes a queued job's configuration anew when it starts: whatever was edited meanwhile would be in it.

    Args:
        run_dir: the point's folder.
        config: its configuration, as composed now.

    Returns:
        The name of the sweep, None when this run is no point of one.

    Raises:
        ConfigError: something changed since; says what.
    """
    try:
        sweep = load_sweep(run_dir.parent)
    except ResultError:
        return None
    point = next((p for p in sweep.points if p.folder == run_dir.name), None)
    if point is None:
        return None
    again = f"try sweep.resume=true hydra.sweep.dir={run_dir.parent} with the old state, or a new sweep"
    now = config_hash(config)
    if now != point.config_hash:
        raise ConfigError(
            f"the configuration must be the one that was submitted ({point.config_hash}), got {now}: conf/ or the "
            f"environment changed while the job was queued; {again}"
        )
    # Points that run one by one in the launching process have its code in memory, whatever is edited meanwhile.
    code = code_hash() if sweep.launcher != "basic" else sweep.code.get("code_hash")
    if code != sweep.code.get("code_hash"):
        raise ConfigError(
            f"the code must be the one that was submitted ({sweep.code.get('code_hash')}), got {code}: src/kvquant "
            f"changed while the job was queued; {again}"
        )
    return "-".join(run_dir.resolve().parent.parts[-2:])


def plan_points(expanded: Sequence[Sequence[str]], configs: Sequence[dict[str, Any]]) -> list[Point]:
    """Name every point of a grid.

    Args:
        expanded: the overrides of each point.
        configs: its resolved configuration.

    Returns:
        Points in the grid's order; one that another equals in everything that affects its result is left out.
    """
    points: dict[str, Point] = {}
    for overrides, swept, config in zip(expanded, apart(expanded), configs, strict=True):
        digest = config_hash(config)
        name = "-".join(part for part in (slug(swept or overrides), digest[:8]) if part)
        points.setdefault(digest, Point(name, list(overrides), digest))
    return list(points.values())


def apart(expanded: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return of every point's overrides those that some other point does not have."""
    counts = Counter(override for overrides in expanded for override in set(overrides))
    return [[o for o in overrides if counts[o] < len(expanded)] for overrides in expanded]


def grid_hash(points: Sequence[Point]) -> str:
    """Return a hash over the set of points, whatever their order."""
    return hashlib.sha256("".join(sorted(p.config_hash for p in points)).encode()).hexdigest()[:16]


def open_sweep(
    folder: Path,
    points: list[Point],
    *,
    launcher: str,
    resume: bool,
    any_code: bool = False,
    explicit_dir: bool = False,
) -> tuple[Path, Sweep]:
    """Start a sweep, or find the one to go on with.

    Args:
        folder: ``hydra.sweep.dir``.
        points: the grid.
        launcher: name of the launcher.
        resume: ``sweep.resume``.
        any_code: go on although the code has changed since.
        explicit_dir: the folder was named by the user; else the latest sweep of the same grid beside it is taken.

    Returns:
        The folder and the sweep; points of an earlier, larger grid stay in it.

    Raises:
        ConfigError: the folder holds another sweep, or one of other code, or there is nothing to resume.
    """
    grid, code = grid_hash(points), {"code_hash": code_hash()}
    if not resume:
        if (folder / FILE_NAME).exists():
            raise ConfigError(
                f"hydra.sweep.dir must not hold a sweep yet, got {folder}; add sweep.resume=true to go on with it"
            )
        return folder, Sweep(grid, launcher, code, points, _now())
    if not explicit_dir:
        folder = _latest(folder.parent.parent, grid)
    try:
        earlier = load_sweep(folder)
    except ResultError as error:
        raise ConfigError(
            f"sweep.resume=true must find a sweep in hydra.sweep.dir={folder}: {error}"
        ) from None
    old = {point.config_hash: point for point in earlier.points}
    if not any(point.config_hash in old for point in points):
        raise ConfigError(
            f"hydra.sweep.dir must belong to this sweep, got {folder}, none of whose {len(old)} points is one of the "
            f"{len(points)} asked for; name another folder or leave out sweep.resume"
        )
    if earlier.code != code and not any_code:
        raise ConfigError(
            f"sweep.resume must go on with the code that started, got {code['code_hash']} instead of "
            f"{earlier.code.get('code_hash')} in {folder}; start a new sweep, or mix versions knowingly with "
            "sweep.any_code=true"
        )
    # The same point may have got another slug in a smaller grid: its folder keeps the name it has.
    merged = [old.pop(point.config_hash, point) for point in points]
    return folder, Sweep(grid, launcher, code, [*merged, *old.values()], earlier.started_at)


def _latest(root: Path, grid: str) -> Path:
    for path in sorted(root.glob(f"*/*/{FILE_NAME}"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            if load_sweep(path).grid_hash == grid:
                return path.parent
        except ResultError:
            continue
    raise ConfigError(
        f"sweep.resume=true must find a sweep of the same grid under {root}, got none; name its folder with "
        "hydra.sweep.dir=<folder> or leave out sweep.resume"
    )


def status_of(folder: Path, point: Point) -> tuple[str, str, float | None]:
    """Return a point's status, what ended it in one line, and its duration in seconds."""
    try:
        result = load_result(folder / point.folder)
    except ResultError as error:
        reason = point.ended or ("" if not (folder / point.folder).exists() else str(error))
        return "missing", reason, None
    message = (result["error"] or {}).get("message") or ""
    return str(result["status"]), message, result.get("duration_s")


def slurm_states(sweep: Sweep, points: Sequence[Point]) -> dict[str, JobState]:
    """Return what Slurm says about the points' jobs; nothing where their numbers are another launcher's processes."""
    if sweep.launcher in ("basic", "local"):
        return {}
    return job_states([point.job_id for point in points if point.job_id])


def todo(folder: Path, sweep: Sweep) -> list[Point]:
    """Return the points to launch: those without a result of status ok that no job is still working on."""
    open_points = [point for point in sweep.points if status_of(folder, point)[0] != "ok"]
    states = slurm_states(sweep, open_points)
    return [p for p in open_points if not (p.job_id in states and states[p.job_id].alive)]


def is_over(run_dir: Path) -> bool:
    """Whether a point that this job was to run has its result: when a job is queued again it goes on with the others.

    An earlier job's failure is none: that point is run again.
    """
    try:
        result = load_result(run_dir)
    except ResultError:
        return False
    # Only a job that was queued again has a past; inside an allocation (salloc) every sweep is in the same job.
    again = own_job() is not None and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    ended = result["status"] in ("failed", "out_of_memory")
    return result["status"] == "ok" or (
        again and ended and result["provenance"].get("slurm_job") == own_job()
    )


def cut_off(
    folder: Path, sweep: Sweep, points: Sequence[Point], started_before: Mapping[str, str | None]
) -> list[Point]:
    """Return the points that their job never came to, because an earlier one of the same job took it down.

    A job that was cancelled, or that did not even start its first point, gives none: trying again is for its user.

    Args:
        folder: of the sweep.
        sweep: what is written there.
        points: of the last launch.
        started_before: `started_at` of each point's folder before it.
    """
    reached = {p.folder for p in points if started_at(folder, p) != started_before[p.folder]}
    states = slurm_states(sweep, [p for p in points if p.folder in reached])
    died = {job for job, state in states.items() if state.state in ("FAILED", "OUT_OF_MEMORY")}
    return [p for p in points if p.folder not in reached and p.job_id in died]


def started_at(folder: Path, point: Point) -> str | None:
    """Return when a point last started, None where it never did."""
    try:
        return str(load_result(folder / point.folder).get("started_at"))
    except ResultError:
        return None


def finish_sweep(folder: Path, sweep: Sweep, *, detached: bool) -> None:
    """Write down how jobs ended, print one table of the points.

    Args:
        folder: of the sweep.
        sweep: what was launched.
        detached: the jobs were submitted and nobody waits.

    Raises:
        LaunchError: at least one point did not end well.
    """
    from rich.console import Console

    console = Console()
    if detached:
        ids = sorted({p.job_id for p in sweep.points if p.job_id}, key=lambda i: (len(i), i))
        console.print(f"submitted {len(ids)} jobs: {' '.join(ids)}", highlight=False, soft_wrap=True)
        console.print(
            f"watch: squeue --me   cancel: scancel {ids[0].partition('_')[0] if ids else '<id>'}   "
            f"read: python src/run.py task=report report.runs={folder}",
            highlight=False,
            soft_wrap=True,
        )
        return
    states = slurm_states(sweep, sweep.points)
    rows = []
    for point, swept in zip(sweep.points, apart([p.overrides for p in sweep.points]), strict=True):
        status, reason, duration_s = status_of(folder, point)
        if status in ("running", "missing"):
            state = states.get(point.job_id or "")
            if state is not None and state.alive:
                reason = f"job {point.job_id} is {state.state.lower()}"
            else:
                point.ended = _last_words(folder, point, str(state) if state else "its process was killed")
                status, reason = "lost", point.ended
        rows.append((" ".join(swept or point.overrides), status, duration_s, reason))
    sweep.finished_at = _now()
    sweep.save(folder)
    _print_table(console, folder, sweep, rows)
    bad = [row for row in rows if row[1] != "ok"]
    if bad:
        which = f"{bad[0][0]}: {bad[0][3] or bad[0][1]}" if len(bad) == 1 else "see the table"
        raise LaunchError(
            f"{len(bad)} of {len(rows)} points did not end well ({which}); run them again with sweep.resume=true "
            f"hydra.sweep.dir={folder}"
        )


def _last_words(folder: Path, point: Point, state: str) -> str:
    """Slurm's state, and what a killed job's log says of it; a line about a limit before any other."""
    lines = [
        line.strip()
        for log in sorted((folder / ".submitit").glob(f"{point.job_id or '-'}/*_log.err"))
        for line in log.read_text(errors="replace").splitlines()
        if "error" in line.lower()
    ]
    # Of several points in one job the line that names this one; else one about a limit before any other.
    own = [line for line in lines if point.folder in line]
    if own:
        return own[-1][:300]
    telling = [
        line for line in lines if re.search(r"exceeded|limit|memory|oom", line, re.IGNORECASE)
    ] or lines
    return f"{state}; {telling[-1][:300]}" if telling else state


def _print_table(console: Any, folder: Path, sweep: Sweep, rows: Sequence[tuple[Any, ...]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    shown = rows if len(rows) <= MAX_TABLE_ROWS else [row for row in rows if row[1] != "ok"]
    counts = Counter(row[1] for row in rows)
    title = f"{len(rows)} points: {', '.join(f'{n} {status}' for status, n in counts.items())}"
    if sweep.overhead_s_per_job is not None:
        title += f"; launcher {sweep.overhead_s_per_job:.2f} s per job beside the jobs' own time"
    table = Table(title=title, title_justify="left")
    for column in ("point", "status", "s", "what ended it"):
        table.add_column(column)
    for overrides, status, duration_s, reason in shown:
        table.add_row(
            escape(overrides), status, "" if duration_s is None else f"{duration_s:.1f}", escape(reason)
        )
    console.print(table)
    console.print(f"sweep: {folder}", soft_wrap=True, highlight=False, markup=False)
