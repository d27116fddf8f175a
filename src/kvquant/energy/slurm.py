"""Slurm's own accounting as a meter from outside: what ``sacct`` says a job's nodes took.

It needs the cluster's ``AcctGatherEnergyType`` and counts whole nodes, so that it belongs to a job alone on exclusive
nodes only. Most clusters fill it in when a step ends: ask after the job.
"""

from __future__ import annotations

import os
import subprocess

from kvquant.errors import MeterUnavailable

TIMEOUT_S = 10
# Slurm's mark for "not counted", 2^64 - 2, in older versions; newer ones leave the column empty.
NOT_COUNTED = 2**64 - 2


def slurm_job_id() -> str | None:
    """The job this process runs in; None outside of Slurm."""
    return os.environ.get("SLURM_JOB_ID")


def sacct_energy_j(job_id: str) -> float:
    """Joules that Slurm counted for a job so far: of the job itself, else of its steps together.

    Args:
        job_id: as in ``SLURM_JOB_ID``.

    Raises:
        MeterUnavailable: there is no sacct, or it counted nothing.
    """
    # The raw id: a member of an array calls itself by its own number and JobID by the array's.
    columns = "JobIDRaw,ConsumedEnergyRaw"
    command = ["sacct", "--jobs", job_id, "--noheader", "--parsable2", "--format", columns]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise MeterUnavailable(
            f"sacct must answer for job {job_id}, got {error}; run this on a login node of the cluster"
        ) from error
    joules: dict[str, float] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("|")
        if value.strip().isdigit() and 0 < int(value) < NOT_COUNTED:
            joules[name] = float(value)
    if not joules:
        raise MeterUnavailable(
            f"sacct must have counted energy for job {job_id}, got none; ask again once the job has ended, on a "
            "cluster with AcctGatherEnergyType set"
        )
    return joules[job_id] if job_id in joules else sum(joules.values())
