"""Several points in one job: dealt out evenly, each in a fork of its own that ends alone; what a launcher itself takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

from hydra_plugins.kvquant_sweeps._overhead import duration_s, overhead_s
from hydra_plugins.kvquant_sweeps._packs import PackedPoint, deal, in_a_fork, run_one_by_one
from kvquant.results import RunRecord
from kvquant.slurm import JobState
from kvquant.sweep_plan import cut_off, is_over, open_sweep, started_at
from kvquant.sweeps import Point, load_sweep

SRC = Path(__file__).resolve().parent.parent / "src"


def test_points_are_dealt_out_by_turns() -> None:
    assert deal([0, 1, 2, 3, 4, 5, 6], 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert deal([0, 1], 1) == [[0], [1]] and deal([0, 1], 9) == [[0, 1]]


def test_an_empty_slot_behind_a_short_job_is_not_the_launchers_doing() -> None:
    # Two slots: 10 s in one, 4 s + 4 s in the other.
    assert overhead_s(11.0, [10.0, 4.0, 4.0], slots=2) == pytest.approx(1.0)
    assert overhead_s(9.5, [4.0, 4.0, 1.0], slots=1) == pytest.approx(0.5)


def test_a_killed_jobs_time_goes_to_the_last_word_in_its_logs(tmp_path: Path) -> None:
    paths = types.SimpleNamespace(
        result_pickle=tmp_path / "none.pkl", stdout=tmp_path / "log.out", stderr=tmp_path / "log.err"
    )
    paths.stdout.write_text("submitit INFO (2026-01-01 00:00:00,500) - Starting\n")
    paths.stderr.write_text("slurmstepd: error: exceeded memory limit\n")
    born = time.mktime((2026, 1, 1, 0, 0, 0, 0, 0, -1))
    os.utime(paths.stdout, (born + 2, born + 2))
    os.utime(paths.stderr, (born + 8, born + 8))
    assert duration_s(types.SimpleNamespace(paths=paths)) == pytest.approx(7.5)


class TestForks:
    def test_it_says_how_its_work_ended(self, tmp_path: Path) -> None:
        assert in_a_fork((tmp_path / "made").touch) == 0 and (tmp_path / "made").exists()
        assert in_a_fork(lambda: sys.exit(3)) == 3
        assert in_a_fork(lambda: os.kill(os.getpid(), signal.SIGKILL)) == -signal.SIGKILL

    def test_a_request_to_queue_again_is_for_the_job_not_for_its_point(self, tmp_path: Path) -> None:
        asked: list[int] = []
        before = signal.signal(signal.SIGUSR2, lambda number, frame: asked.append(number))
        try:
            # Slurm signals every process of a job.
            assert in_a_fork(lambda: os.kill(os.getpid(), signal.SIGUSR2)) == 0
            assert in_a_fork(lambda: os.kill(os.getppid(), signal.SIGUSR2)) == 0
        finally:
            signal.signal(signal.SIGUSR2, before)
        assert asked == [signal.SIGUSR2]

    def test_what_ends_the_wait_interrupts_the_point(self, tmp_path: Path) -> None:
        def leave(number: int, frame: object) -> None:
            sys.exit(-1)

        def work() -> None:
            try:
                os.kill(os.getppid(), signal.SIGUSR2)
                time.sleep(30)
            except KeyboardInterrupt:
                (tmp_path / "interrupted").touch()

        before = signal.signal(signal.SIGUSR2, leave)
        try:
            with pytest.raises(SystemExit):
                in_a_fork(work)
        finally:
            signal.signal(signal.SIGUSR2, before)
        assert (tmp_path / "interrupted").exists()

    def test_slurm_taking_the_job_back_during_the_request_is_no_result(self, tmp_path: Path) -> None:
        def ask(number: int, frame: object) -> None:
            raise subprocess.CalledProcessError(-signal.SIGTERM, ["scontrol", "requeue", "7"])

        before = signal.signal(signal.SIGUSR2, ask)
        points = [PackedPoint(0, [], tmp_path / "a"), PackedPoint(1, [], tmp_path / "b")]
        try:
            with pytest.raises(SystemExit):
                run_one_by_one(points, lambda point: os.kill(os.getppid(), signal.SIGUSR2), "no_such_task")
        finally:
            signal.signal(signal.SIGUSR2, before)

    def test_a_signal_between_the_points_end_and_our_note_of_it_is_not_in_the_way(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waitpid = os.waitpid

        def reaped(pid: int, flags: int) -> tuple[int, int]:
            waitpid(pid, flags)
            monkeypatch.setattr(os, "waitpid", waitpid)
            sys.exit(7)

        monkeypatch.setattr(os, "waitpid", reaped)
        with pytest.raises(SystemExit):
            in_a_fork(lambda: None)

    def test_a_killed_point_is_named_and_the_next_one_runs(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def work(point: PackedPoint) -> None:
            if point.number == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            finish(point.run_dir, "ok")

        points = [PackedPoint(number, [], tmp_path / f"p{number}") for number in (0, 1)]
        assert run_one_by_one(points, work, "no_such_task") == [-signal.SIGKILL, 0]
        assert "error: p0: its process was ended by SIGKILL" in capfd.readouterr().err
        # Queued again, the job goes on with what has no result.
        assert run_one_by_one(points, lambda point: finish(point.run_dir, "ok"), "no_such_task") == [0, None]


def finish(run_dir: Path, status: str, job: str | None = None) -> None:
    record = RunRecord(run_dir, task="quantize", config={})
    record.provenance["slurm_job"] = job
    record.finish(status) if status != "running" else record.save()


def test_a_job_that_was_queued_again_leaves_its_own_failures_and_runs_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    expected = {("ok", None): True, ("failed", "8_1"): True, ("out_of_memory", "8_1"): True}
    expected |= {("failed", "7_1"): False, ("interrupted", "8_1"): False, ("running", "8_1"): False}
    for number, ((status, job), over) in enumerate(expected.items()):
        finish(tmp_path / str(number), status, job)
        assert is_over(tmp_path / str(number)) is over, (status, job)
    assert not is_over(tmp_path / "never")
    # The first sweep and its resuming in one allocation are in one job, which was never queued again.
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert not is_over(tmp_path / "1")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    finish(tmp_path / "here", "failed")
    assert not is_over(tmp_path / "here")


def test_points_behind_one_that_took_the_job_down_are_launched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {
        "7_0": JobState("OUT_OF_MEMORY", "0:125"),
        "7_1": JobState("CANCELLED", "0:0"),
        "7_2": JobState("COMPLETED", "0:0"),
        "7_3": JobState("FAILED", "1:0"),
    }
    monkeypatch.setattr("kvquant.sweep_plan.job_states", lambda ids: {i: states[i] for i in ids})
    points = [Point(f"p{i}", [], str(i), job_id=f"7_{i % 4}") for i in range(8)]
    folder, sweep = open_sweep(tmp_path / "s", points, launcher="athena", resume=False)
    before = {point.folder: started_at(folder, point) for point in points}
    # Each job but the last started its first point; that one's never did.
    for point in points[:3]:
        finish(folder / point.folder, "running")
    assert [p.folder for p in cut_off(folder, sweep, points, before)] == ["p4"]


def test_what_is_imported_before_a_fork_touches_no_gpu_and_starts_no_thread() -> None:
    code = """
import os, torch
def touched(*args, **kwargs):
    raise SystemExit("CUDA was touched")
for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_name", "current_device"):
    setattr(torch.cuda, name, touched)
from hydra_plugins.kvquant_sweeps._packs import warm_up
from kvquant.tasks import prefill  # what is wrong with it must not be hidden
warm_up("prefill")
print(len(os.listdir("/proc/self/task")))
"""
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"


@pytest.mark.gpu
def test_a_fork_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    code = """
import sys
from hydra_plugins.kvquant_sweeps._packs import in_a_fork, warm_up
warm_up("prefill")
def work():
    import torch
    assert float(torch.ones(8, device="cuda").sum()) == 8
sys.exit(in_a_fork(work) or in_a_fork(work))
"""
    # Packages that the tests found through it are there for the fork too.
    paths = os.pathsep.join([str(SRC), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_points_share_a_process_of_the_local_launcher_and_fail_alone(tmp_path: Path) -> None:
    # tests/slurm/faults_task.py: 2 raises, 3 kills its process, 1 is ok and runs behind it.
    sweep = ("-m", "task=quantize", "task.tokens=2,3,1", "hydra/launcher=local", "sweep.points_per_job=3")
    done = subprocess.run(
        [sys.executable, str(SRC / "run.py"), *sweep, "energy.meter=none"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SRC.parent / "tests" / "slurm"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "3 points: 1 failed, 1 lost, 1 ok" in done.stdout, (
        done.stdout + done.stderr
    )
    assert "its process was ended by SIGKILL" in done.stdout and "this point raises" in done.stdout
    (path,) = tmp_path.glob("multirun/*/*/sweep.json")
    assert len({point.job_id for point in load_sweep(path).points}) == 1


def test_a_launcher_without_jobs_refuses_to_pack_them(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(SRC / "run.py"),
            "-m",
            "task=quantize",
            "quant.bits=2,3",
            "sweep.points_per_job=2",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "error: sweep.points_per_job must be 1 with a launcher that starts no jobs, got 2" in done.stderr
