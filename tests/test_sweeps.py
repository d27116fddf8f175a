"""Sweeps without Slurm: folders that keep their names, resuming, refusals, what a queued job notices, sacct's words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kvquant.errors import ConfigError, LaunchError, ResultError
from kvquant.results import RunRecord, config_hash, load_result
from kvquant.slurm import _parse, job_states
from kvquant.sweep_plan import check_submission, finish_sweep, open_sweep, plan_points, todo
from kvquant.sweeps import Point, Sweep, load_sweep

ROOT = Path(__file__).resolve().parent.parent
# Ways to end in place of task=quantize (tests/slurm/faults_task.py): task.tokens=1 is ok, 2 raises, 6 works the second time.
FAULTS = ROOT / "tests" / "slurm"


def run(cwd: Path, *args: str, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        # No meter: CodeCarbon alone takes as long to open as everything that is tested here.
        [sys.executable, str(ROOT / "src" / "run.py"), *args, "task=quantize", "energy.meter=none"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(FAULTS), "COLUMNS": "200", **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def sweep_dir(cwd: Path) -> Path:
    (path,) = cwd.glob("multirun/*/*/sweep.json")
    return path.parent


def configs(*bits: int, **more: Any) -> list[dict[str, Any]]:
    return [{"quant": {"bits": b}, "sweep": {"resume": False}, **more} for b in bits]


def grid(*bits: int) -> list[Point]:
    return plan_points([[f"quant.bits={b}", "task=x"] for b in bits], configs(*bits))


def finish(folder: Path, point: Point, status: str = "ok") -> None:
    record = RunRecord(folder / point.folder, task="quantize", config={})
    record.finish(status) if status != "running" else record.save()


class TestPoints:
    def test_a_folder_says_what_the_point_changes_and_keeps_its_name_in_another_grid(self) -> None:
        small, large = grid(2, 3), grid(3, 4, 8)
        assert [p.folder.partition("-")[0] for p in small] == ["bits=2", "bits=3"]
        assert small[1].folder == large[0].folder

    def test_the_hash_ignores_what_does_not_affect_the_result(self) -> None:
        same = [
            {"quant": {"bits": 3}, key: {"a": i}} for i, key in enumerate(["sweep", "tracking", "report"])
        ]
        assert len({config_hash(config) for config in same}) == 1
        assert len(plan_points([["a=1"], ["a=2"], ["a=3"]], same)) == 1, "equal points run once"


class TestResume:
    def test_only_points_without_an_ok_result_are_left(self, tmp_path: Path) -> None:
        folder, sweep = open_sweep(tmp_path / "m/d/t", grid(2, 3, 4, 8), launcher="basic", resume=False)
        sweep.save(folder)
        for point, status in zip(sweep.points, ("ok", "failed", "running"), strict=False):
            finish(folder, point, status)
        again, resumed = open_sweep(tmp_path / "m/d/other", grid(8, 4, 3, 2), launcher="basic", resume=True)
        assert again == folder, "the latest sweep of the same grid is found"
        assert [p.folder[:6] for p in todo(again, resumed)] == ["bits=8", "bits=4", "bits=3"]

    def test_a_larger_grid_adds_points_and_loses_none(self, tmp_path: Path) -> None:
        folder, sweep = open_sweep(tmp_path / "s", grid(2, 3), launcher="basic", resume=False)
        sweep.save(folder)
        _, resumed = open_sweep(folder, grid(3, 4), launcher="basic", resume=True, explicit_dir=True)
        assert [p.folder[:6] for p in resumed.points] == ["bits=3", "bits=4", "bits=2"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"points": grid(5, 6)}, "must belong to this sweep"),
            ({"resume": False}, "must not hold a sweep yet.*add sweep.resume=true"),
            ({"folder": "nowhere"}, "must find a sweep in hydra.sweep.dir"),
            ({"explicit_dir": False, "points": grid(5)}, "sweep of the same grid.*got none"),
            ({"code": "other"}, "code that started.*sweep.any_code=true"),
            ({"text": "{"}, "complete JSON"),
            ({"text": '{"schema": "other"}'}, "written by something else"),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
    )
    def test_a_folder_of_another_sweep_is_refused(self, tmp_path: Path, change: dict, message: str) -> None:
        folder = tmp_path / "m" / "d" / "t"
        _, sweep = open_sweep(folder, grid(2, 3), launcher="basic", resume=False)
        if "code" in change:
            sweep.code = {"code_hash": change["code"]}
        sweep.save(folder)
        if "text" in change:
            (folder / "sweep.json").write_text(change["text"])
        with pytest.raises(ConfigError, match=message) as caught:
            open_sweep(
                folder.parent / change.get("folder", "t"),
                change.get("points", grid(2, 3)),
                launcher="basic",
                resume=change.get("resume", True),
                explicit_dir=change.get("explicit_dir", True),
            )
        assert "\n" not in str(caught.value)

    def test_another_code_version_can_be_mixed_knowingly(self, tmp_path: Path) -> None:
        _, sweep = open_sweep(tmp_path / "s", grid(2), launcher="basic", resume=False)
        sweep.code = {"code_hash": "other"}
        sweep.save(tmp_path / "s")
        open_sweep(tmp_path / "s", grid(2), launcher="basic", resume=True, any_code=True, explicit_dir=True)


class TestQueuedJobs:
    def test_a_changed_configuration_or_code_is_noticed(self, tmp_path: Path) -> None:
        (config,) = configs(3)
        folder, sweep = open_sweep(tmp_path / "date" / "time", grid(3), launcher="athena", resume=False)
        sweep.save(folder)
        run_dir = folder / sweep.points[0].folder
        assert check_submission(run_dir, config) == "date-time"
        assert check_submission(tmp_path / "elsewhere", config) is None, "a single run is no point of a sweep"
        with pytest.raises(ConfigError, match="configuration must be the one that was submitted"):
            check_submission(run_dir, {**config, "seed": 1})
        sweep.code = {"code_hash": "other"}
        sweep.save(folder)
        with pytest.raises(ConfigError, match="code must be the one that was submitted .other."):
            check_submission(run_dir, config)

    def test_the_points_of_a_sweep_are_one_group_of_the_tracker(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from hydra import compose, initialize_config_dir
        from omegaconf import OmegaConf

        from kvquant.cli import conf_dir
        from kvquant.config import register_schemas
        from kvquant.tasks import run_task
        from kvquant.tracking import NoTracker

        groups = []

        def opened(settings: dict, **kwargs: Any) -> NoTracker:
            groups.append(settings["group"])
            return NoTracker()

        monkeypatch.setattr(run_task, "open_tracker", opened)
        monkeypatch.setattr(run_task, "seed_everything", lambda seed: None)
        monkeypatch.setitem(
            sys.modules, "kvquant.tasks.quantize", types.SimpleNamespace(run=lambda cfg, context: None)
        )
        register_schemas()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("config", overrides=["task=quantize", "device=cpu"])
        points = plan_points([["a=1"]], [OmegaConf.to_container(cfg, resolve=True)])  # type: ignore[list-item]
        folder, sweep = open_sweep(tmp_path / "day" / "hour", points, launcher="basic", resume=False)
        sweep.save(folder)
        run_task.execute(cfg, run_dir=folder / points[0].folder)
        run_task.execute(cfg, run_dir=tmp_path / "single")
        assert groups == ["day-hour", None]

    def test_a_point_killed_outright_is_lost(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        folder, sweep = open_sweep(tmp_path / "s", grid(2, 3, 4), launcher="local", resume=False)
        for point, status in zip(sweep.points, ("ok", "running"), strict=False):
            finish(folder, point, status)
        with pytest.raises(LaunchError, match=r"2 of 3 points.*sweep.resume=true hydra.sweep.dir="):
            finish_sweep(folder, sweep, detached=False)
        assert "3 points: 1 ok, 2 lost" in capsys.readouterr().out
        stored = load_sweep(folder)
        assert stored.finished_at and stored.points[1].ended == "its process was killed"

    def test_sacct_lines_are_read(self) -> None:
        states = _parse(
            "7_0|COMPLETED|0:0\n7_1|CANCELLED by 0|0:15\n7_[2-3,5%8]|PENDING|0:0\njunk\n8|OUT_OF_MEMORY|0:125"
        )
        assert {job: state.alive for job, state in states.items()} == {
            "7_0": False, "7_1": False, "7_2": True, "7_3": True, "7_5": True, "8": False,
        }  # fmt: skip
        assert str(states["7_1"]) == "Slurm: CANCELLED, exit code 0:15"

    @pytest.mark.parametrize(
        ("accounting", "alive"),
        [("7_0|PREEMPTED|0:0", True), ("", True), ("7_0|COMPLETED|0:0", False)],
        ids=["preempted, queued again", "just submitted", "over"],
    )
    def test_the_queue_is_asked_where_accounting_is_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accounting: str, alive: bool
    ) -> None:
        for tool, text in (("sacct", accounting), ("squeue", "7_0|PENDING|0:0")):
            (tmp_path / tool).write_text(f"#!/bin/sh\necho '{text}'\n")
            (tmp_path / tool).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert job_states(["7_0"])["7_0"].alive is alive


class TestCommandLine:
    @pytest.mark.parametrize("launcher", ["basic", "local"])
    def test_failing_points_are_run_again_and_others_are_not(self, tmp_path: Path, launcher: str) -> None:
        sweep = ("-m", "task.tokens=1,6", f"hydra/launcher={launcher}")
        if launcher == "local":
            sweep += ("hydra.launcher.parallelism=2",)
        code, out, err = run(tmp_path, *sweep)
        assert code == 1 and "2 points: 1 ok, 1 failed" in out
        assert "task.tokens=6: only the second try works" in err and err.count("\n") == 1
        folder = sweep_dir(tmp_path)
        (good,) = folder.glob("tokens=1-*")
        before = load_result(good)["started_at"]
        code, out, err = run(tmp_path, *sweep, "sweep.resume=true")
        assert code == 0, err
        assert "2 points: 2 ok" in out and load_result(good)["started_at"] == before
        assert sweep_dir(tmp_path) == folder

    def test_local_points_get_one_gpu_each(self, tmp_path: Path) -> None:
        sweep = ("-m", "task.tokens=1", "quant.bits=2,3,4", "hydra/launcher=local")
        code, _, err = run(tmp_path, *sweep, CUDA_VISIBLE_DEVICES="4,6")
        assert code == 0, err
        found = [load_result(path) for path in sweep_dir(tmp_path).glob("*/result.json")]
        assert len(found) == 3 and {result["metrics"]["gpus"] for result in found} == {"4", "6"}
        code, _, err = run(tmp_path, *sweep, "sweep.detach=true", "hydra.sweep.dir=other")
        assert code == 1 and "sweep.detach must be false with hydra/launcher=local" in err

    def test_a_launcher_without_a_sweep_is_refused(self, tmp_path: Path) -> None:
        code, out, err = run(tmp_path, "hydra/launcher=local")
        assert (code, out) == (2, "") and "hydra/launcher=local must come with -m" in err
        assert not list(tmp_path.iterdir())

    def test_no_account_and_no_sbatch_cost_one_line_each(self, tmp_path: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "SLURM_ACCOUNT"}
        command = [sys.executable, str(ROOT / "src/run.py"), "-m", "quant.bits=2,3", "hydra/launcher=athena"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: hydra.launcher.account must be given")
        assert done.stderr.count("\n") == 1
        environment |= {"SLURM_ACCOUNT": "plgx-gpu-a100", "PATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(
            "error: hydra/launcher=athena must find sbatch, got none on this machine"
        )

    def test_slurm_check_names_all_that_is_missing_at_once(self, tmp_path: Path) -> None:
        environment = {
            key: value for key, value in os.environ.items() if key not in ("SLURM_ACCOUNT", "SCRATCH")
        }
        command = [sys.executable, str(ROOT / "src/run.py"), "task=slurm_check", "hydra/launcher=athena"]
        command += ["model=llama31_8b", "task.points=10", "task.minutes_per_point=30", "device=cpu"]
        command += ["energy.meter=none"]
        environment |= {
            "PATH": str(tmp_path),
            "COLUMNS": "200",
            "KVQUANT_CALIBRATION_DIR": str(tmp_path / "c"),
        }
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "2 of 5 checks failed: Slurm: no sbatch, sinfo, sacctmgr" in done.stderr
        assert (
            "holds no config.json" in done.stdout and "10 points x 1 GPU x 0.5 h = 5 GPU-hours" in done.stdout
        )

    @pytest.mark.parametrize(
        ("per_job", "minutes", "ok", "cost", "says"),
        [
            (1, None, True, 288.0, "24 points x 1 GPU x 12 h = 288 GPU-hours at most"),
            (5, None, True, 60.0, "24 points in 5 jobs x 1 GPU x 12 h = 60 GPU-hours at most"),
            (5, 30, True, 12.0, "24 points x 1 GPU x 0.5 h = 12 GPU-hours"),
            (25, 30, True, 12.0, "24 points x 1 GPU x 0.5 h = 12 GPU-hours"),
            (25, 31, False, 12.4, "a job of 24 takes 12.4 h, beyond its limit of 12 h"),
        ],
    )
    def test_slurm_check_counts_what_a_sweep_costs(
        self, per_job: int, minutes: float | None, ok: bool, cost: float, says: str
    ) -> None:
        from kvquant.tasks.slurm_check import cost_check

        check, hours = cost_check(24, per_job, 1, minutes, 720)
        assert (check.ok, hours) == (ok, pytest.approx(cost)) and says in check.found, check.found

    def test_a_sweep_into_a_used_folder_costs_one_line(self, tmp_path: Path) -> None:
        sweep = ("-m", "task.tokens=1", "hydra.sweep.dir=s")
        assert run(tmp_path, *sweep)[0] == 0
        code, _, err = run(tmp_path, *sweep)
        assert code == 2 and "add sweep.resume=true" in err and err.count("\n") == 1


def test_the_grid_is_written_before_anything_runs(tmp_path: Path) -> None:
    code, _, _ = run(tmp_path, "-m", "task.tokens=1,2", "hydra.sweep.dir=s")
    assert code == 1
    body = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [point["overrides"][0] for point in body["points"]] == ["task.tokens=1", "task.tokens=2"]
    shutil.rmtree(tmp_path / "s" / body["points"][0]["folder"])
    with pytest.raises(ResultError):
        load_sweep(tmp_path)
    assert isinstance(load_sweep(tmp_path / "s"), Sweep)
