"""What Slurm says about jobs, read from ``sacct``; nothing here submits or cancels."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Sequence

# States of a job that may still run, be queued, or be queued again.
ALIVE = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED", "RESIZING", "UNKNOWN")
# States that end a job, unless Slurm has put it into the queue again meanwhile.
REQUEUEABLE = ("PREEMPTED", "NODE_FAIL", "TIMEOUT", "BOOT_FAIL")
SACCT_TIMEOUT_S = 60
JOBS_PER_CALL = 500


@dataclasses.dataclass(frozen=True)
class JobState:
    """State and exit code (``9:0``: status, signal) as Slurm's accounting has them."""

    state: str
    exit_code: str

    @property
    def alive(self) -> bool:
        """Whether the job may still write its result."""
        return self.state in ALIVE

    def __str__(self) -> str:
        return f"Slurm: {self.state}, exit code {self.exit_code}"


def own_job() -> str | None:
    """Number of the job this process runs in, as `job_states` takes it; None outside of Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def job_states(job_ids: Sequence[str]) -> dict[str, JobState]:
    """Ask Slurm's accounting about jobs.

    Args:
        job_ids: ``7`` or, of an array, ``7_3``.

    Returns:
        The state of each job that is known; nothing where there is no ``sacct`` or it does not answer.
    """
    if shutil.which("sacct") is None or not job_ids:
        return {}
    states: dict[str, JobState] = {}
    parents = sorted({job_id.partition("_")[0] for job_id in job_ids})
    for start in range(0, len(parents), JOBS_PER_CALL):
        jobs = ("--jobs", ",".join(parents[start : start + JOBS_PER_CALL]))
        columns = ("--parsable2", "--allocations", "--format=JobID,State,ExitCode")
        states.update(_parse(_ask("sacct", "--noheader", *columns, *jobs)))
        known = [states.get(job_id) for job_id in job_ids]
        if any(state is None or state.state in REQUEUEABLE for state in known):
            # Accounting hears of a new job late, and after a preemption it has the last attempt; the queue has the next.
            queued = _parse(_ask("squeue", "--noheader", "--array", "--format=%i|%T|0:0", *jobs))
            states.update({job_id: state for job_id, state in queued.items() if state.alive})
    return {job_id: states[job_id] for job_id in job_ids if job_id in states}


def _ask(*command: str) -> str:
    """Output of a command, empty when there is none; squeue fails, and answers, when one of the jobs is long over."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SACCT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _parse(text: str) -> dict[str, JobState]:
    """Parse lines of ``JobID|State|ExitCode``; the waiting part of an array, ``7_[3-5,8%2]``, is written out."""
    states = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != 3 or not fields[1]:
            continue
        # "CANCELLED by 1000" names who; that is a number of no use here.
        state = JobState(fields[1].split()[0], fields[2])
        waiting = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", fields[0])
        if waiting is None:
            states[fields[0]] = state
            continue
        for part in waiting.group(2).split(","):
            first, _, last = part.partition("-")
            for index in range(int(first), int(last or first) + 1):
                states[f"{waiting.group(1)}_{index}"] = state
    return states
