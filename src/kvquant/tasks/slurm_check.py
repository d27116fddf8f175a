"""``task=slurm_check``: what to run first on a cluster; finds out on the login node what would cost a queued night.

Asks Slurm, submits nothing: partition, account, GPUs, time limit, the whole request (``sbatch --test-only``), then the
model's folder, the folders to write to, and what the sweep may cost.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvquant.errors import LaunchError

TIMEOUT_S = 30


class Check(NamedTuple):
    """One line of the table: what was looked at, whether it will do, what was found and what to change."""

    name: str
    ok: bool
    found: str


def run(cfg: Any, context: Any) -> None:
    """Make every check and print one table of them.

    Args:
        cfg: the composed configuration; the launcher's settings are read from Hydra's own.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.

    Raises:
        LaunchError: at least one check failed; the table is printed and stored all the same.
    """
    launcher = HydraConfig.get().launcher if HydraConfig.initialized() else OmegaConf.create({})
    if "partition" not in launcher:
        raise LaunchError(
            "task=slurm_check must come with a Slurm launcher, got none; try hydra/launcher=athena"
        )
    settings: dict[str, Any] = {str(key): _value(launcher, key) for key in launcher}
    checks = [*slurm_checks(settings), model_check(cfg.model.path), *write_checks(cfg)]
    check, cost = cost_check(
        cfg.task.points,
        cfg.sweep.points_per_job,
        gpus(settings),
        cfg.task.minutes_per_point,
        float(settings["timeout_min"]),
    )
    checks.append(check)
    metrics = context.record.metrics
    metrics.update({"gpu_hours": cost, "checks": {check.name: check.ok for check in checks}})
    rows = [[check.name, "ok" if check.ok else "FAILED", check.found] for check in checks]
    context.record.set_table("before the first sweep", ["check", "", "found"], rows)
    bad = [check for check in checks if not check.ok]
    if bad:
        from kvquant.tasks.run_task import print_table

        print_table(context.console, context.record)
        raise LaunchError(f"{len(bad)} of {len(checks)} checks failed: {bad[0].name}: {bad[0].found}")


def gpus(settings: dict[str, Any]) -> int:
    """GPUs of one point."""
    return int(settings.get("gpus_per_node") or 0) * int(settings.get("nodes") or 1)


def cost_check(
    points: int, points_per_job: int, gpus: int, minutes_per_point: float | None, limit_min: float
) -> tuple[Check, float]:
    """What a sweep is charged for, in GPU-hours, and whether a job's time limit is enough for its points.

    Args:
        points: of the sweep.
        points_per_job: ``sweep.points_per_job``.
        gpus: of a job.
        minutes_per_point: None: every job runs up to its limit.
        limit_min: a job's time limit in minutes.
    """
    if minutes_per_point is None:
        jobs, hours = -(-points // points_per_job), limit_min / 60
        what = f"{points} points" if jobs == points else f"{points} points in {jobs} jobs"
        cost = jobs * gpus * hours
        found = (
            f"{what} x {gpus} GPU x {hours:g} h = {cost:g} GPU-hours at most (each job up to its time limit)"
        )
        return Check("cost", True, found), cost
    hours = minutes_per_point / 60
    cost = points * gpus * hours
    found = f"{points} points x {gpus} GPU x {hours:g} h = {cost:g} GPU-hours"
    largest = -(-points // -(-points // points_per_job))  # points are dealt out evenly
    job_min = largest * minutes_per_point
    if job_min > limit_min:
        found += f"; a job of {largest} takes {job_min / 60:g} h, beyond its limit of {limit_min / 60:g} h"
    return Check("cost", job_min <= limit_min, found), cost


def slurm_checks(settings: dict[str, Any]) -> list[Check]:
    """Partition, account and the whole request, as Slurm sees them."""
    missing = [name for name in ("sbatch", "sinfo", "sacctmgr") if shutil.which(name) is None]
    if missing:
        return [Check("Slurm", False, f"no {', '.join(missing)} on this machine; run this on a login node")]
    partition, account = settings["partition"], settings["account"]
    about = _ask("sinfo", "--noheader", "--partition", str(partition), "--format=%a|%l|%D|%G")
    checks = [
        Check("partition", bool(about), f"{partition}: {_partition(about)}")
        if about
        else Check(
            "partition",
            False,
            f"there is no {partition}; `sinfo -s` lists them, set hydra.launcher.partition",
        )
    ]
    if not account:
        checks.append(
            Check("account", False, "SLURM_ACCOUNT is unset; export SLURM_ACCOUNT=<grant>-gpu-a100")
        )
        return checks
    own = _ask(
        "sacctmgr",
        "--noheader",
        "--parsable2",
        "show",
        "assoc",
        f"user={getpass.getuser()}",
        "format=Account",
    )
    names = sorted(set(own.split()))
    known = (
        f"{account} is one of yours"
        if account in names
        else f"{account} is not among {', '.join(names) or 'none'}"
    )
    checks.append(Check("account", account in names, known))
    checks.append(_request(settings))
    return checks


def _partition(about: str) -> str:
    state, limit, nodes, gres = about.splitlines()[0].split("|")
    return f"{state}, {nodes} nodes with {gres}, time limit {limit}"


def _request(settings: dict[str, Any]) -> Check:
    """Let Slurm judge the request as a whole, without submitting it."""
    flags = {
        "partition": settings["partition"],
        "account": settings["account"],
        "time": settings["timeout_min"],
        "nodes": settings.get("nodes"),
        "ntasks-per-node": settings.get("tasks_per_node"),
        "cpus-per-task": settings.get("cpus_per_task"),
        "gpus-per-node": settings.get("gpus_per_node"),
        "mem": f"{settings['mem_gb']}G" if settings.get("mem_gb") else None,
        **(settings.get("additional_parameters") or {}),
    }
    command = ["sbatch", "--test-only"]
    for key, value in flags.items():
        if value is not None and value is not False:
            command.append(f"--{key}" if value is True else f"--{key}={value}")
    done = subprocess.run(
        [*command, "--wrap", "true"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    said = " ".join(done.stderr.split()).removeprefix("sbatch: ") or "accepted"
    return Check("request", done.returncode == 0, said)


def model_check(path: str | None) -> Check:
    """The model's folder: compute nodes cannot download one."""
    if path is None:
        return Check("model", True, "the small one that is shipped")
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        return Check(
            "model", False, f"{folder} holds no config.json; download it on the login node, set model.path"
        )
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Check("model", weights > 0, f"{folder}: {weights / 2**30:.1f} GiB of safetensors")


def write_checks(cfg: Any) -> list[Check]:
    """Results, calibrations and scratch must be writable from here (and, being shared, from the jobs)."""
    folders = {
        "results": str(Path(str(HydraConfig.get().sweep.dir)).parent.parent),
        "calibrations": cfg.calibration.dir,
        "scratch": os.environ.get("SCRATCH"),
    }
    return [_writable(name, folder) for name, folder in folders.items() if folder]


def _writable(name: str, folder: str) -> Check:
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            free_gib = shutil.disk_usage(path).free / 2**30
    except OSError as error:
        return Check(name, False, f"{path} must be writable, got {error.strerror or error}")
    return Check(name, True, f"{path}: {free_gib:.0f} GiB free")


def _value(launcher: Any, key: Any) -> Any:
    """A setting of the launcher, None where the environment variable it comes from is unset."""
    try:
        value = launcher[key]
    except OmegaConfBaseException:
        return None
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _ask(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
    )
    return done.stdout.strip() if done.returncode == 0 else ""
