"""Launchers that wait for every job whatever the first one does; a job is judged by its result.json alone.

Hydra's own submitit launcher raises at the first failure it reads, while other jobs still run. It also reads pickled
results, which cannot be rebuilt for every exception class; here nothing is unpickled.
"""

import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher

from hydra_plugins.kvquant_sweeps._overhead import duration_s, overhead_s
from hydra_plugins.kvquant_sweeps._packs import PackedPoint, deal, run_one_by_one

FIRST_POLL_S, MAX_POLL_S = 0.5, 30.0


@dataclasses.dataclass
class LocalConf(LocalQueueConf):
    """Settings of ``hydra/launcher=local``, beside submitit's."""

    _target_: str = "hydra_plugins.kvquant_sweeps._submitit_launchers.WaitingLocalLauncher"
    parallelism: int | None = None


ConfigStore.instance().store(
    group="hydra/launcher", name="kvquant_local", node=LocalConf(), provider="kvquant"
)


class WaitingLauncher:
    """What both launchers add to submitit's; the sweeper sets the first four attributes before `launch`.

    Attributes:
        on_submit: called with the job of each point's number as soon as it is known, again when more are.
        detach: return once everything is submitted.
        points_per_job: how many points a job runs, one after the other.
        run_dirs: folder of each point of the batch.
        num_jobs: of the last launch.
        overhead_s: seconds that the last launch took beyond its jobs (`overhead_s`); None when it was not waited for.
    """

    config: Any
    on_submit: Callable[[dict[int, str]], None] | None = None
    detach = False
    points_per_job = 1
    run_dirs: Sequence[Path] = ()
    num_jobs = 0
    overhead_s: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What travels to a job: nothing that grows with the sweep, of which every job would get a copy."""
        return {**self.__dict__, "on_submit": None, "run_dirs": ()}

    def __call__(self, points: list[PackedPoint], state: Any) -> Any:
        """What a job does; one point needs no process beside the job's own."""
        if len(points) == 1:
            return self._run_point(points[0], state)
        return run_one_by_one(points, lambda point: self._run_point(point, state), self.config.task.name)

    def _run_point(self, point: PackedPoint, state: Any) -> Any:
        name = f"job_id_for_{point.number}"
        return super().__call__(point.overrides, "hydra.sweep.dir", point.number, name, state)  # type: ignore[misc]

    def _packs(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[list[PackedPoint]]:
        """The points of each job."""
        dirs = self.run_dirs or [Path()] * len(job_overrides)
        named = zip(job_overrides, dirs, strict=True)
        points = [PackedPoint(number, list(o), folder) for number, (o, folder) in enumerate(named, first)]
        packs = deal(points, self.points_per_job)
        self.num_jobs = len(packs)
        return packs

    def _submitted(self, jobs: Sequence[Any], packs: Sequence[Sequence[PackedPoint]]) -> None:
        if self.on_submit:
            started = zip(jobs, packs, strict=False)
            self.on_submit({point.number: str(job.job_id) for job, pack in started for point in pack})

    def _returns(self, job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
        """Hydra wants one return a point; the sweeper reads results instead."""
        return [JobReturn(overrides=list(o), status=JobStatus.UNKNOWN) for o in job_overrides]


def _source_root() -> Path:
    import kvquant

    return Path(kvquant.__file__).resolve().parent.parent


class WaitingSlurmLauncher(WaitingLauncher, SlurmLauncher):
    """One Slurm array per batch of jobs; waits until Slurm says that each of its jobs is over."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit, and wait unless ``detach``.

        Raises:
            LaunchError: Slurm refused the jobs; its own words are in the message.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        from kvquant.errors import LaunchError

        # Jobs import kvquant from where it was submitted, installed or not.
        lines = [f'export PYTHONPATH="{_source_root()}${{PYTHONPATH:+:$PYTHONPATH}}"']
        params = {**self.params, "setup": [*(self.params.get("setup") or []), *lines]}
        start_s = time.monotonic()
        try:
            executor = self._executor(params)
            packs = self._packs(job_overrides, initial_job_idx)
            # submitit repeats what sbatch says on stderr; it is in our message.
            with contextlib.redirect_stderr(io.StringIO()):
                jobs = executor.map_array(self, packs, [Singleton.get_state()] * len(packs))
        except (FailedJobError, FailedSubmissionError) as error:
            raise LaunchError(_refusal(error, params)) from None
        ids = [str(job.job_id) for job in jobs]
        self._submitted(jobs, packs)
        if not self.detach:
            try:
                self._wait(jobs)
            except KeyboardInterrupt:
                print(
                    f"the jobs go on without their launcher; scancel {ids[0].partition('_')[0]} ends them",
                    file=sys.stderr,
                )
                raise
            wall_s = time.monotonic() - start_s
            slots = min(len(jobs), params.get("array_parallelism") or len(jobs))
            self.overhead_s = overhead_s(wall_s, [duration_s(job) for job in jobs], slots)
        return self._returns(job_overrides)

    def _executor(self, params: dict[str, Any]) -> Any:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        base = {field.name for field in dataclasses.fields(BaseQueueConf)}
        settings = {key: value for key, value in params.items() if key != "submitit_folder"}
        retries = {"slurm_max_num_timeout": settings.pop("max_num_timeout", 0)}
        executor = submitit.AutoExecutor(cluster="slurm", folder=params["submitit_folder"], **retries)
        executor.update_parameters(
            **{key if key in base else f"slurm_{key}": value for key, value in settings.items()}
        )
        return executor

    def _wait(self, jobs: Sequence[Any]) -> None:
        """Return when every job is over: its return is written, or Slurm says that it ended without one."""
        from kvquant.slurm import job_states

        waiting = {str(job.job_id): job for job in jobs}
        asked_s = started_s = time.monotonic()
        while waiting:
            for job_id in [i for i, job in waiting.items() if job.paths.result_pickle.exists()]:
                del waiting[job_id]
            now_s = time.monotonic()
            # Often while a sweep is young, rarely once it has run for hours: sacct is one database for everybody.
            poll_s = min(MAX_POLL_S, max(FIRST_POLL_S, (now_s - started_s) / 50))
            if waiting and now_s - asked_s >= 4 * poll_s:
                asked_s = now_s
                for job_id, state in job_states(list(waiting)).items():
                    if not state.alive:
                        del waiting[job_id]
            if waiting:
                time.sleep(poll_s)


def _refusal(error: Exception, params: dict[str, Any]) -> str:
    """One line of what sbatch said, and the settings it was about."""
    said = [line.strip() for line in str(error).splitlines() if "error:" in line]
    reason = said[0].partition("error:")[2].strip() if said else " ".join(str(error).split())
    settings = [f"hydra.launcher.{key}={params[key]}" for key in ("partition", "account") if params.get(key)]
    return f"Slurm must accept the jobs, said: {reason}; nothing was started; check {', '.join(settings)} and the resources"


class WaitingLocalLauncher(WaitingLauncher, LocalLauncher):
    """Jobs as processes on this machine, so many at a time; one GPU each where there are several."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every point and wait for it.

        Raises:
            LaunchError: detached local jobs would have nobody to start the next one.
        """
        import submitit

        from kvquant.errors import LaunchError

        if self.detach:
            raise LaunchError(
                "sweep.detach must be false with hydra/launcher=local, got true: nobody would start the next job; "
                "try hydra/launcher=athena"
            )
        params = dict(self.params)
        gpus = visible_gpus()
        slots = params.pop("parallelism") or max(1, len(gpus))
        executor = submitit.LocalExecutor(folder=params.pop("submitit_folder"))
        executor.update_parameters(**{key: value for key, value in params.items() if value is not None})
        packs = self._packs(job_overrides, initial_job_idx)
        pending = list(packs)
        running: dict[int, Any] = {}
        start_s = time.monotonic()
        jobs: list[Any] = []
        try:
            while pending or running:
                for slot in [s for s, job in running.items() if job.done()]:
                    del running[slot]
                for slot in range(slots):
                    if pending and slot not in running:
                        running[slot] = self._start(executor, gpus, slot, pending.pop(0))
                        jobs.append(running[slot])
                        self._submitted(jobs, packs)
                time.sleep(0.1)
        finally:
            for job in running.values():
                job.cancel()
        wall_s = time.monotonic() - start_s
        self.overhead_s = overhead_s(wall_s, [duration_s(job) for job in jobs], slots)
        return self._returns(job_overrides)

    def _start(self, executor: Any, gpus: list[int], slot: int, pack: list[PackedPoint]) -> Any:
        with _environment("PYTHONPATH", str(_source_root())):
            if gpus:
                mine = [gpus[slot % len(gpus)]]
                executor.update_parameters(gpus_per_node=1, visible_gpus=mine)
            return executor.submit(self, pack, Singleton.get_state())


@contextlib.contextmanager
def _environment(name: str, first: str) -> Iterator[None]:
    """Put a folder first in a search path while a process is started."""
    import os

    before = os.environ.get(name)
    os.environ[name] = first if not before else f"{first}{os.pathsep}{before}"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def visible_gpus() -> list[int]:
    """Numbers of the NVIDIA GPUs this process may use; found without CUDA, which a launcher must not touch."""
    import os

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [int(part) for part in named.split(",") if part.strip().isdigit()]
    return sorted(int(p.name[6:]) for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit())
