"""Several points in one job: each in a process of its own, forked from one that has imported what they need.

Queueing and imports are paid once a job. A fork still ends alone: what kills it, its peak of memory and its CUDA context
are its own, as in a job of one point.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
# What most runs import where it is used. Not pandas, which CodeCarbon opens: its allocator starts a thread.
LATE_IMPORTS = ("matplotlib.figure", "matplotlib.backends.backend_agg", "numba", "codecarbon.core.emissions")
# What Slurm is asked to send before a time limit, and the other one that submitit can be told to use.
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
# What a point gets to write down that it was interrupted; Slurm itself gives 30 s.
GRACE_S = 10.0


class PackedPoint(NamedTuple):
    """One point of a job: its number in the sweep, its overrides, its folder."""

    number: int
    overrides: list[str]
    run_dir: Path


def deal(points: Sequence[T], size: int) -> list[list[T]]:
    """Deal points out to as few jobs as hold ``size`` each, by turns.

    Neighbours in a grid take about as long as each other, so that jobs of neighbours would end far apart.
    """
    jobs = -(-len(points) // size)
    return [list(points[job::jobs]) for job in range(jobs)]


def run_one_by_one(
    points: Sequence[PackedPoint], run: Callable[[PackedPoint], Any], task: str
) -> list[int | None]:
    """Run the points of a job that have no result of this job yet; a job that was queued again skips the others.

    Args:
        points: of the job.
        run: runs one, in the process it is called in.
        task: name of the task they run.

    Returns:
        How each process ended, as `multiprocessing.Process.exitcode`; None for a point that was skipped.

    Raises:
        SystemExit: the job is being queued again.
    """
    from kvquant.sweep_plan import is_over
    from kvquant.tasks.run_task import is_requeue

    codes: list[int | None] = []
    try:
        warm_up(task)
        for point in points:
            code = None if is_over(point.run_dir) else in_a_fork(lambda point=point: run(point))  # type: ignore[misc]
            codes.append(code)
            if code is not None and code < 0:
                name = signal.Signals(-code).name
                # With the folder's name: the job's log is everybody's.
                print(f"error: {point.run_dir.name}: its process was ended by {name}", file=sys.stderr)
    except Exception as error:
        if is_requeue(error):
            # Any other exception would be a result, which ends the wait for the job.
            raise SystemExit(-1) from error
        raise
    return codes


def warm_up(task: str) -> None:
    """Import what the points of a job have in common; nothing in it may touch a GPU, since CUDA does not survive a fork."""
    from kvquant.tasks.run_task import collector_off

    with collector_off():
        for module in (f"kvquant.tasks.{task}", *LATE_IMPORTS):
            # A task that does not exist, or cannot be imported, is each point's own failure.
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        _first_uses()
    # Out of the collector's sight, which would touch, and so copy, all of it in each fork.
    gc.freeze()


def _first_uses() -> None:
    """Draw something and compile something: fonts, the grammar of labels and numba's registries are read once."""
    with contextlib.suppress(ImportError):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        figure.subplots().loglog([1, 10], [1, 10])
        FigureCanvasAgg(figure).draw()
    with contextlib.suppress(ImportError):
        import numba

        numba.njit("int64(int64)")(lambda x: x)


def in_a_fork(work: Callable[[], Any]) -> int:
    """Call ``work`` in a fork of this process and wait for it; what ends the wait interrupts the fork.

    Returns:
        The exit code; of a process that a signal ended, its number negated.
    """
    child = multiprocessing.get_context("fork").Process(target=_work, args=(work,))
    try:
        # A signal that came meanwhile is handled where the block ends: inside of what stops the fork.
        with _blocked(REQUEUE_SIGNALS):
            child.start()
        child.join()
    finally:
        if child.is_alive():
            assert child.pid is not None
            # Gone already where the signal came between its end and our taking note of it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGINT)
            child.join(GRACE_S)
            if child.is_alive():
                child.kill()
                child.join()
    assert child.exitcode is not None
    return child.exitcode


def _work(work: Callable[[], Any]) -> None:
    # The job's first process queues it again; SIGTERM, which announces a preemption, stays ignored as submitit has it.
    for number in REQUEUE_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUEUE_SIGNALS)
    work()


@contextlib.contextmanager
def _blocked(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Hold signals back until a fork has handlers of its own."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
