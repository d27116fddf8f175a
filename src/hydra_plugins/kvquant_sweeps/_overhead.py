"""What a launcher itself took: the wall time beyond what the same jobs would have needed in the same slots."""

import contextlib
import datetime
import heapq
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def overhead_s(wall_s: float, durations_s: Sequence[float], slots: int) -> float:
    """Seconds beyond a launcher that costs nothing: one that starts each job, in order, the moment a slot is free.

    Args:
        wall_s: from submitting to seeing the last job's end.
        durations_s: of the jobs, in the order they were submitted.
        slots: jobs that may run at a time.
    """
    free_at = [0.0] * max(1, slots)
    for duration_s in durations_s:
        heapq.heappush(free_at, heapq.heappop(free_at) + duration_s)
    return max(0.0, wall_s - max(free_at))


def duration_s(job: Any) -> float:
    """Seconds that a submitit job's process lived: from the first line of its log to its pickled return."""
    ends = []
    # One that was killed has no return; the last line of its logs, where Slurm says so, is the next best thing.
    for path in (job.paths.result_pickle, job.paths.stdout, job.paths.stderr):
        with contextlib.suppress(OSError):
            ends.append(path.stat().st_mtime)
            if path == job.paths.result_pickle:
                break
    with contextlib.suppress(OSError):
        return max(0.0, max(ends, default=0.0) - _born_s(job.paths.stdout))
    return 0.0


def _born_s(log: Path) -> float:
    """When the process behind a log started: the time in submitit's first line, to the millisecond."""
    with open(log, encoding="utf-8", errors="replace") as file:
        for line in file:
            found = re.match(r"submitit INFO \((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d+)\)", line)
            if found:
                moment = datetime.datetime.strptime(found.group(1), "%Y-%m-%d %H:%M:%S")
                return moment.timestamp() + int(found.group(2)) / 1000
    return log.stat().st_mtime
