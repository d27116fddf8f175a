"""Sweeps on a real Slurm, with the product's own command line: every way a job can end leaves what README says.

`tests/slurm/cluster.sh install` once, then `pytest -m slurm`; the cluster is started for the tests and stopped after.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvquant.results import load_result
from kvquant.sweeps import load_sweep

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OK, RAISES, KILLED, MEMORY, SLOW, ONCE = 1, 2, 3, 4, 5, 6
ITEMS = 12
TOOLS = ("sbatch", "slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")
# The athena launcher, on nodes as small as these.
ATHENA = ("hydra/launcher=athena", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1")

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs {', '.join(missing) or 'root'}; as root: tests/slurm/cluster.sh install")
    folder = tmp_path_factory.mktemp("cluster")
    script = str(HERE / "cluster.sh")
    try:
        subprocess.run([script, "start", str(folder)], check=True, timeout=120, stdout=subprocess.DEVNULL)
        yield {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "SLURM_ACCOUNT": "plgkvquant-gpu-a100",
            "OMP_NUM_THREADS": "1",
        }
    finally:
        subprocess.run([script, "stop", str(folder)], timeout=120)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy that a test may edit while jobs are queued; with what numba compiled, which takes longer than a test."""
    folder = tmp_path / "checkout"
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


class Product:
    """The product's command line, with ways to fail in place of ``task=quantize``."""

    def __init__(self, checkout: Path, env: dict[str, str]) -> None:
        self.checkout = checkout
        self.env = {**env, "PYTHONPATH": str(HERE), "COLUMNS": "200"}

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(self.checkout / "src" / "run.py"), *args],
            cwd=self.checkout,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def sweep(self, ways: list[int], *args: str) -> subprocess.Popen[str]:
        tokens = ",".join(map(str, ways))
        return self.start("-m", "task=quantize", f"task.tokens={tokens}", *ATHENA, *args)

    def run(self, *args: str, timeout_s: float = 180) -> tuple[int, str, str]:
        process = self.start(*args)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"still running after {timeout_s} s: {args}\n{out}{err}")
        return process.returncode, out, err

    def slurm(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=30)
        return done.stdout.strip()

    @property
    def sweep_dir(self) -> Path:
        (path,) = self.checkout.glob("multirun/*/*/sweep.json")
        return path.parent

    def point(self, way: int) -> Path:
        return next(self.sweep_dir.glob(f"*tokens={way}-*"))

    def status(self, way: int) -> str:
        return str(load_result(self.point(way))["status"])


@pytest.fixture
def product(checkout: Path, cluster: dict[str, str]) -> Product:
    return Product(checkout, cluster)


def wait(what: str, test: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if test():
                return
        except (OSError, ValueError, StopIteration):
            pass
        time.sleep(0.2)
    pytest.fail(f"waited {seconds} s for {what}")


def computed(product: Product, way: int = SLOW) -> list[int]:
    return [int(line) for line in (product.point(way) / "computed").read_text().split()]


# The real task on the shipped model, its text cut so that there are twenty items.
PERPLEXITY = ("experiment=smoke", "task=perplexity", "task.window=48", "data.heldout_tokens=960")
PERPLEXITY += ("energy.meter=constant", "quant.bits=3")
PERPLEXITY_JOB = ("-m", *PERPLEXITY, *ATHENA, "hydra.launcher.mem_gb=2")


def uninterrupted(product: Product) -> tuple[dict[str, Any], list[Any]]:
    """Metrics and windows of the same run on this machine, with nobody disturbing it."""
    code, out, err = product.run(*PERPLEXITY, "hydra.run.dir=whole")
    assert code == 0, err + out
    return measured(product.checkout / "whole")


def measured(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """What must not depend on interruptions: everything but the joules of the process."""
    metrics = {k: v for k, v in load_result(folder)["metrics"].items() if k != "run_energy"}
    return metrics, json.loads((folder / "windows.json").read_text())


def finished_items(product: Product) -> int:
    return len(list(product.sweep_dir.glob("*/items/*/*.item.json")))


def expect_the_same_numbers(product: Product, whole: tuple[dict[str, Any], list[Any]], least: int) -> None:
    (path,) = product.sweep_dir.glob("*/result.json")
    result = load_result(path)
    assert result["status"] == "ok" and result["provenance"]["resumed_items"] >= least
    assert measured(path.parent) == whole
    assert len(whole[1]) == finished_items(product) == 20


def test_three_points_of_the_small_model_and_a_report(cluster: dict[str, str], tmp_path: Path) -> None:
    def run(*args: str) -> str:
        command = [sys.executable, str(ROOT / "src" / "run.py"), *args]
        done = subprocess.run(command, cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ("experiment=smoke", "task.repeats=1", "energy.meter=constant", "hydra.launcher.mem_gb=2")
    out = run("-m", "quant.bits=2,3,4", *ATHENA, *small)
    assert "3 points: 3 ok" in out
    paths = sorted(tmp_path.glob("multirun/*/*/*/result.json"))
    assert [load_result(path)["config"]["quant"]["bits"] for path in paths] == [2, 3, 4]
    assert {load_result(path)["status"] for path in paths} == {"ok"}
    assert len({load_result(path)["provenance"]["sweep"] for path in paths}) == 1
    run("task=report", "report.runs=multirun")
    (page,) = tmp_path.glob("outputs/*/*/report.html")
    assert page.read_text().count("result.json") >= 3 and (page.parent / "quality_bits.pdf").is_file()


def test_every_way_to_end_leaves_its_state(product: Product) -> None:
    ways = [RAISES, OK, KILLED, MEMORY, SLOW]
    process = product.sweep(ways, "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=1")
    wait("the slow point", lambda: len(computed(product)) >= 1)
    points = {p.folder.partition("-")[0]: p for p in load_sweep(product.sweep_dir).points}
    product.slurm("scancel", points[f"tokens={SLOW}"].job_id or "")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: 4 of 5 points did not end well" in err and err.count("\n") == 1
    statuses = {way: product.status(way) for way in ways}
    assert statuses == {RAISES: "failed", OK: "ok", KILLED: "running", MEMORY: "running", SLOW: "running"}
    assert "TwoArguments" in load_result(product.point(RAISES))["error"]["traceback"]
    assert "this point raises" in out
    ended = {p.folder.partition("-")[0]: p.ended or "" for p in load_sweep(product.sweep_dir).points}
    assert "FAILED" in ended[f"tokens={KILLED}"]
    assert "memory" in ended[f"tokens={MEMORY}"].lower()
    assert "CANCELLED" in ended[f"tokens={SLOW}"]
    code, out, _ = product.run("task=report", "report.runs=multirun", "device=cpu")
    assert code == 0 and out.count(" lost ") >= 3


def test_a_time_limit_queues_the_job_again_and_it_ends_with_the_same_numbers(product: Product) -> None:
    whole = uninterrupted(product)
    # Slurm looks at limits every 30 seconds, and ahead to its next look: USR2 comes between 29 and 59 seconds after a
    # start, which is before the last window and, on a busy machine too, after the first.
    product.env["PERPLEXITY_ITEM_S"] = "3"
    limit = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=1")
    code, out, err = product.run(*PERPLEXITY_JOB, *limit, timeout_s=500)
    assert code == 0, err + out
    logs = "".join(p.read_text() for p in product.sweep_dir.glob(".submitit/*/*_log.*"))
    assert "Caught signal SIGUSR2" in logs
    expect_the_same_numbers(product, whole, least=1)


def test_a_preempted_point_is_queued_again_and_ends_with_the_same_numbers(product: Product) -> None:
    whole = uninterrupted(product)
    product.env["PERPLEXITY_ITEM_S"] = "1"
    process = product.start(*PERPLEXITY_JOB, "+hydra.launcher.additional_parameters.nodelist=ag0002")
    wait("two items", lambda: finished_items(product) >= 2, seconds=120)
    urgent = ("sbatch", "--parsable", "-p", "urgent", "-A", "plgkvquant-gpu-a100", "-w", "ag0002", "-c", "16")
    job = product.slurm(*urgent, "-o", "/dev/null", "--wrap", "sleep 2")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err + out
    assert job
    expect_the_same_numbers(product, whole, least=2)


def test_a_wrong_account_and_a_wrong_partition_are_refused_with_the_reason(product: Product) -> None:
    for setting in ("account=plgother-gpu-a100", "partition=plgrid-gpu-v100"):
        process = product.sweep([OK, RAISES], f"hydra.launcher.{setting}", "hydra.sweep.dir=multirun/a/b")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert err.startswith("error: Slurm must accept the jobs, said: ") and err.count("\n") == 1
        assert "nvalid" in err and setting.partition("=")[2] in err
        shutil.rmtree(product.checkout / "multirun")
    _, err = (
        gpu := product.sweep([OK], "+hydra.launcher.additional_parameters.gres=gpu:h100:1")
    ).communicate()
    assert gpu.returncode == 1 and "nvalid" in err and err.count("\n") == 1


def test_an_unset_account_and_a_launcher_without_m_cost_one_line(product: Product) -> None:
    code, _, err = product.run("task=quantize", *ATHENA)
    assert code == 2 and err == (
        "error: hydra/launcher=athena must come with -m, since Hydra ignores it otherwise and would start the run on "
        "this machine; add -m\n"
    )
    del product.env["SLURM_ACCOUNT"]
    code, _, err = product.run("-m", "task=quantize", *ATHENA)
    assert code == 2 and err.startswith(
        "error: hydra.launcher.account must be given, got no environment variable"
    )


def test_24_points_at_parallelism_8_cost_little_beside_their_own_time(product: Product) -> None:
    preset = ("experiment=[ablation_bits,smoke]", "seed=0,1,2,3,4,5", "task=quantize", "task.tokens=1")
    code, out, err = product.run(*preset, *ATHENA, "hydra.launcher.array_parallelism=8")
    assert code == 0, err + out
    sweep = load_sweep(product.sweep_dir)
    assert len(sweep.points) == 24 and "24 points: 24 ok" in out
    assert sweep.overhead_s_per_job is not None and sweep.overhead_s_per_job < 1


def test_24_points_of_the_real_product_share_eight_jobs(cluster: dict[str, str], tmp_path: Path) -> None:
    preset = ("experiment=[ablation_bits,smoke]", "seed=0,1,2,3,4,5", "sweep.points_per_job=3")
    command = [
        sys.executable,
        str(ROOT / "src" / "run.py"),
        "-m",
        *preset,
        *ATHENA,
        "hydra.launcher.mem_gb=2",
    ]
    env = {**cluster, "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "24 points: 24 ok" in done.stdout
    (path,) = tmp_path.glob("multirun/*/*/sweep.json")
    sweep = load_sweep(path)
    assert len(sweep.points) == 24 and len({point.job_id for point in sweep.points}) == 8
    assert sweep.overhead_s_per_job is not None and sweep.overhead_s_per_job < 1


def test_points_that_share_a_job_end_as_they_do_alone(product: Product) -> None:
    ways = [KILLED, RAISES, MEMORY, OK]
    process = product.sweep(ways, "sweep.points_per_job=4")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "4 points: 2 lost, 1 failed, 1 ok" in out, err + out
    assert {way: product.status(way) for way in ways} == {
        KILLED: "running", RAISES: "failed", MEMORY: "running", OK: "ok",
    }  # fmt: skip
    points = {p.folder.partition("-")[0]: p for p in load_sweep(product.sweep_dir).points}
    assert "its process was ended by SIGKILL" in (points[f"tokens={KILLED}"].ended or "")
    assert "memory" in (points[f"tokens={MEMORY}"].ended or "").lower()
    # Slurm ended the whole job for its memory; what it had not come to was launched again.
    assert points[f"tokens={OK}"].job_id != points[f"tokens={MEMORY}"].job_id


def test_a_job_of_several_points_goes_on_where_it_was_when_it_is_queued_again(product: Product) -> None:
    process = product.sweep([RAISES, SLOW, OK], "sweep.points_per_job=3")
    wait("two items", lambda: len(computed(product)) >= 2)
    before = load_result(product.point(RAISES))["started_at"]
    # What Slurm sends before a time limit.
    product.slurm("scancel", "--signal=USR2", load_sweep(product.sweep_dir).points[0].job_id or "")
    wait("the interruption", lambda: product.status(SLOW) == "interrupted", seconds=30)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 1 and "3 points: 1 failed, 2 ok" in out, err + out
    assert load_result(product.point(RAISES))["started_at"] == before, "it has its result"
    assert load_result(product.point(SLOW))["provenance"]["resumed_items"] >= 2
    assert sorted(computed(product)) == list(range(ITEMS))


def test_a_sweep_goes_on_after_its_launcher_was_killed(product: Product) -> None:
    process = product.sweep([OK, ONCE, SLOW])
    wait("a slow item", lambda: len(computed(product)) >= 1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    ids = [p.job_id for p in load_sweep(product.sweep_dir).points]
    assert all(ids) and load_sweep(product.sweep_dir).finished_at is None
    wait("the jobs it left", lambda: product.status(SLOW) == "ok" and product.status(ONCE) == "failed")
    started_at = load_result(product.point(OK))["started_at"]
    process = product.sweep([OK, ONCE, SLOW], "sweep.resume=true")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "3 points: 3 ok" in out, err
    assert load_result(product.point(OK))["started_at"] == started_at, (
        "a point with a result is not run again"
    )
    assert sorted(computed(product)) == list(range(ITEMS))


@pytest.mark.parametrize("edited", ["conf/quant/nuq.yaml", "src/kvquant/nuq.py"])
def test_what_was_edited_while_a_job_was_queued_is_noticed(product: Product, edited: str) -> None:
    process = product.sweep([OK], "+hydra.launcher.additional_parameters.hold=true")
    wait("the job's number", lambda: load_sweep(product.sweep_dir).points[0].job_id)
    path = product.checkout / edited
    text = path.read_text()
    path.write_text(f"{text}\n# edited\n" if edited.endswith(".py") else text.replace("bits: 3", "bits: 5"))
    assert path.read_text() != text
    product.slurm("scontrol", "release", load_sweep(product.sweep_dir).points[0].job_id or "")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    which = "code" if edited.endswith(".py") else "configuration"
    assert f"the {which} must be the one that was submitted" in err
    assert product.status(OK) == "failed"


def test_detached_it_prints_the_jobs_and_leaves(product: Product) -> None:
    process = product.sweep([OK, SLOW], "sweep.detach=true")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    ids = [p.job_id for p in load_sweep(product.sweep_dir).points]
    assert all(str(job_id) in out for job_id in ids) and "scancel" in out
    # Resuming while the jobs live starts none of them twice.
    process = product.sweep([OK, SLOW], "sweep.resume=true", "sweep.detach=true")
    out, _ = process.communicate(timeout=60)
    assert json.loads((product.sweep_dir / "sweep.json").read_text())["points"][1]["job_id"] == ids[1]
    wait("the jobs", lambda: product.status(SLOW) == product.status(OK) == "ok")


def test_slurm_check_finds_everything_or_says_what_is_wrong(product: Product) -> None:
    check = ("task=slurm_check", *ATHENA, "task.points=24", "device=cpu")
    code, out, err = product.run(*check)
    assert code == 0, err + out
    assert "plgkvquant-gpu-a100 is one of yours" in out and "24 points x 1 GPU x 12 h = 288 GPU-hours" in out
    code, out, err = product.run(
        *check, "hydra.launcher.account=plgother-gpu-a100", "hydra.launcher.mem_gb=99999"
    )
    assert code == 1 and "2 of " in err and "account" in err and "request" in out
