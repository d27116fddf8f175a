"""The command line as a user meets it: one clear line for a slip, exit codes, Ctrl-C, nothing heavy before main."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path
from typing import Any

import pytest

from kvquant.errors import DataError, PoolExhausted
from kvquant.results import load_result

SRC = Path(__file__).resolve().parent.parent / "src"
# Runs run.py with a stand-in for a task's module, which needs no model and no torch.
DRIVER = """
import contextlib, runpy, sys, types
sys.path.insert(0, {src!r})
import kvquant.tasks.run_task as run_task
from kvquant.errors import DataError
run_task.seed_everything = lambda seed: None
run_task.resolve_device = lambda name: types.SimpleNamespace(type="cpu")
# CodeCarbon takes two seconds to look the hardware up.
run_task.TaskContext.metered_run = lambda self: contextlib.nullcontext()
task = types.ModuleType("kvquant.tasks.prefill")
def run(cfg, context):
{body}
task.run = run
sys.modules["kvquant.tasks.prefill"] = task
sys.argv = ["run.py", *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


def start(cwd: Path, *args: str, body: str | None = None, **kwargs: Any) -> subprocess.Popen[str]:
    script = str(SRC / "run.py")
    if body is not None:
        driver = cwd / "driver.py"
        indented = textwrap.indent(textwrap.dedent(body), "    ")
        driver.write_text(DRIVER.format(src=str(SRC), body=indented, script=script))
        script = str(driver)
    env = {**os.environ, "COLUMNS": "200"}
    env.pop("HYDRA_FULL_ERROR", None)
    return subprocess.Popen(
        [sys.executable, script, *args],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def run(cwd: Path, *args: str, body: str | None = None, **kwargs: Any) -> tuple[int, str, str]:
    process = start(cwd, *args, body=body, **kwargs)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def results(cwd: Path) -> list[dict[str, Any]]:
    return [load_result(path) for path in sorted(cwd.rglob("result.json"))]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["quant.bitz=3"], "error: unknown key quant.bitz; did you mean quant.bits?"),
        (["-m", "quant.bitz=2,3"], "error: unknown key quant.bitz; did you mean quant.bits?"),
        (["quant.bits=9"], "error: quant.bits must be 1 to 8, got 9; try 4"),
        (
            ["-m", "quant.bits=2,9"],
            "error: quant.bits must be 1 to 8, got 9; try 4 (in the sweep's point quant.bits=9)",
        ),
        (
            ["experiment=ablation_bits", "kernel=triton", "device=cpu"],
            "error: kernel.backend=triton must run on an NVIDIA GPU, got device=cpu; try kernel=pytorch_fused",
        ),
        (["hydra.foo=1"], "error: unknown key hydra.foo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_slip_costs_one_line_and_exit_code_2(tmp_path: Path, args: list[str], line: str) -> None:
    code, out, err = run(tmp_path, *args)
    assert code == 2
    assert err.startswith(line) and err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == [], "nothing was started"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["quant=nuqq"], "unknown option quant=nuqq; did you mean quant=nuq?"),
        (["experiment=[smoke,ablation_bitz]"], "did you mean experiment=ablation_bits?"),
        (["hydra/launcher=slurmm"], "unknown option hydra/launcher=slurmm"),
        (["qunat=nuq"], "unknown key qunat; did you mean quant?"),
        (["task.reepats=2"], "unknown key task.reepats; did you mean task.repeats?"),
        (["quant.bits"], "cannot read override 'quant.bits'"),
        (["quant.bits=x"], "quant.bits must be a whole number, got x; try quant.bits=3"),
        (["quant.bits=2,3"], "add -m to run one job for each"),
        (["++quant.foo=3"], "unknown key quant.foo"),
        (["+foo.bar=3"], "unknown key foo"),
        (["model=local"], "model.path must be given"),
        (["-m", "experiment=ablation_bits,smoke"], "try experiment=[a,b]"),
        (["--cfg", "job", "-m"], "only one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_kind_of_slip_names_what_was_meant(
    args: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvquant import cli

    code = cli.main(lambda: pytest.fail("Hydra must not be entered"), args)
    err = capsys.readouterr().err
    assert code == 2
    assert line in err and err.count("\n") == 1


def test_help_and_cfg_are_instant_and_import_no_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = ['run.py', *{args!r}]\n"
        "try: runpy.run_path({script!r}, run_name='__main__')\n"
        "finally: print('HEAVY', sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    )
    for args, expected in ((["--help"], "quant="), (["--cfg", "job"], "block_size: 64")):
        script = code.format(args=args, script=str(SRC / "run.py"))
        start_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SRC)},
        )
        assert time.perf_counter() - start_s < 10
        assert done.returncode == 0
        assert expected in done.stdout
        assert "HEAVY []" in done.stdout


def test_help_lists_every_option_with_what_it_is_for() -> None:
    from kvquant.cli import conf_dir, help_text

    text = help_text()
    for path in conf_dir().rglob("*.yaml"):
        if path.parent != conf_dir():
            assert any(line.strip().startswith(path.stem) and len(line) > 40 for line in text.splitlines()), (
                path
            )


def test_a_run_leaves_a_complete_result(tmp_path: Path) -> None:
    body = """
    assert context.record.status == "running" and (context.run_dir / "result.json").is_file()
    context.record.metrics["ttft_s"] = 0.25
    context.record.set_table("What it cost", ["", "fp16", "nuq3"], [["TTFT [s]", 0.5, 0.25], ["empty", None, 1]])
    with context.meter.window("prefill") as window:
        pass
    context.record.metrics.update(window.as_metrics())
    """
    code, out, err = run(tmp_path, "quant.bits=2", "energy.meter=constant", body=body)
    assert (code, err) == (0, "")
    assert "TTFT [s]" in out and "fp16" in out
    (result,) = results(tmp_path)
    assert result["status"] == "ok" and result["error"] is None
    assert result["metrics"]["ttft_s"] == 0.25 and result["metrics"]["energy_kind"] == "estimated"
    assert result["config"]["quant"]["bits"] == 2
    assert result["provenance"]["overrides"] == ["quant.bits=2", "energy.meter=constant"]
    assert result["provenance"]["device"]
    (run_dir,) = (tmp_path / "outputs").glob("*/*")
    assert f"result: {run_dir.relative_to(tmp_path)}" in out.replace(str(tmp_path) + "/", "")
    assert (run_dir / "run.log").is_file()


def test_a_failure_costs_one_line_and_keeps_its_traceback(tmp_path: Path) -> None:
    code, _, err = run(tmp_path, body="raise KeyError('a b')")
    assert code == 1
    assert err.startswith("error: KeyError: 'a b' (traceback in") and err.count("\n") == 1
    (result,) = results(tmp_path)
    assert result["status"] == "failed"
    assert "KeyError: 'a b'" in result["error"]["traceback"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("data.path must exist"), "failed"),
        (ValueError("a plain one"), "failed"),
        (MemoryError("32 GiB for nothing"), "out_of_memory"),
        (PoolExhausted("3 blocks are missing"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), "out_of_memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "out_of_memory"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(-1), "interrupted"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_status_says_how_a_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: str
) -> None:
    from hydra import compose, initialize_config_dir

    from kvquant.cli import conf_dir
    from kvquant.config import register_schemas
    from kvquant.tasks import run_task

    def fail(cfg: Any, context: Any) -> None:
        raise error

    register_schemas()
    monkeypatch.setitem(sys.modules, "kvquant.tasks.prefill", types.SimpleNamespace(run=fail))
    monkeypatch.setattr(run_task, "seed_everything", lambda seed: None)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", overrides=["device=cpu"])
    with pytest.raises(type(error)):
        run_task.execute(cfg, run_dir=tmp_path)
    result = load_result(tmp_path)
    assert result["status"] == status
    sizes = result["metrics"].get("at_out_of_memory", {})
    assert (sizes.get("host_peak_bytes", 0) > 2**20) == (status == "out_of_memory")


def test_one_failing_point_does_not_stop_a_sweep(tmp_path: Path) -> None:
    body = """
    if cfg.quant.bits == 2:
        raise DataError("this point fails")
    """
    code, out, err = run(tmp_path, "-m", "quant.bits=2,3,4", body=body)
    assert code == 1
    assert "error: 1 of 3 points did not end well (quant.bits=2: this point fails)" in err
    assert "3 points: 1 failed, 2 ok" in out
    by_bits = {result["config"]["quant"]["bits"]: result["status"] for result in results(tmp_path)}
    assert by_bits == {2: "failed", 3: "ok", 4: "ok"}


def test_a_preset_sweeps_without_dash_m(tmp_path: Path) -> None:
    code, _, _ = run(tmp_path, "experiment=[ablation_bits,smoke]", "quant.bits=3,4", body="pass")
    assert code == 0
    assert sorted(result["config"]["quant"]["bits"] for result in results(tmp_path)) == [3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_ctrl_c_and_sigterm_leave_a_result_that_says_interrupted(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, body="import time; (context.run_dir / 'ready').touch(); time.sleep(60)")
    deadline_s = time.monotonic() + 30
    while not list(tmp_path.rglob("ready")):
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err == "error: interrupted; what was finished until then is in the run's folder\n"
    (result,) = results(tmp_path)
    assert result["status"] == "interrupted" and result["error"]["type"] == "KeyboardInterrupt"


def test_a_killed_run_goes_on_with_its_next_item(tmp_path: Path) -> None:
    body = """
    import os, signal
    def compute(key):
        if key == 2 and not (context.run_dir / "second").exists():
            (context.run_dir / "second").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(context.run_dir / "computed", "a") as file:
            file.write(str(key))
        return {"square": key * key}
    context.record.metrics["sum"] = sum(item.values["square"] for item in context.items.run(range(4), compute))
    """
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    assert run(tmp_path, folder, body=body)[0] == -signal.SIGKILL
    assert load_result(tmp_path / "run")["status"] == "running"
    for computed, resumed in (("0123", 2), ("01230123", 0)):
        assert run(tmp_path, folder, body=body)[0] == 0
        result = load_result(tmp_path / "run")
        assert (result["status"], result["metrics"]["sum"]) == ("ok", 14)
        assert result["provenance"]["resumed_items"] == resumed
        assert (tmp_path / "run" / "computed").read_text() == computed


def test_a_job_that_slurm_takes_back_during_its_requeue_has_no_result_yet(tmp_path: Path) -> None:
    body = """
    import os, signal, subprocess
    def ask(signum, frame):
        # Slurm ends the step, and scontrol in it, before scontrol returns.
        raise subprocess.CalledProcessError(-signal.SIGTERM, ["scontrol", "requeue", "7"])
    signal.signal(signal.SIGUSR2, ask)
    os.kill(os.getpid(), signal.SIGUSR2)
    """
    code, _, err = run(tmp_path, f"hydra.run.dir={tmp_path / 'run'}", body=body)
    # submitit counts any other exception as the end of the job, and stops waiting for the next attempt.
    assert code == 255 and err == ""
    assert load_result(tmp_path / "run")["status"] == "interrupted"


@pytest.mark.parametrize("place", ["file_in_the_way", "no_such_filesystem"])
def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path, place: str) -> None:
    folder = "/proc/kvquant-outputs"
    if place == "file_in_the_way":
        (tmp_path / "file").write_text("")
        folder = str(tmp_path / "file" / "outputs")
    code, _, err = run(tmp_path, f"hydra.run.dir={folder}", body="raise AssertionError('never reached')")
    assert code == 1
    assert err.startswith("error: the output folder must be writable") and folder in err
    assert "hydra.run.dir=<folder>" in err and err.count("\n") == 1


def test_a_full_disk_fails_before_the_work_starts(tmp_path: Path) -> None:
    def no_room() -> None:
        # Every write past the first byte fails, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    code, _, err = run(tmp_path, body="raise AssertionError('never reached')", preexec_fn=no_room)
    assert code == 1
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "writable" in err


def test_cuda_asked_for_and_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from kvquant.errors import DeviceError
    from kvquant.tasks.run_task import resolve_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="got cuda.*try device=auto"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


def test_tracking_never_fails_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kvquant.tracking import NoTracker, WandbTracker, flatten, open_tracker

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise ConnectionError("no internet")

    settings = {"name": "wandb", "mode": "offline", "project": "p", "entity": None, "group": None}
    monkeypatch.setitem(sys.modules, "wandb", Broken())
    assert isinstance(open_tracker(settings, run_dir=tmp_path, config={}), NoTracker)
    tracker = WandbTracker.__new__(WandbTracker)
    tracker._run = Broken()
    tracker.log({"a": 1})
    tracker.finish({"a": 1}, "ok")
    assert json.dumps(flatten({"a": {"b": 1}, "c": 2})) == '{"a.b": 1, "c": 2}'


def test_wandb_writes_locally_without_a_word(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    from kvquant.tracking import WandbTracker, open_tracker

    settings = {"name": "wandb", "mode": "offline", "project": "p", "entity": None, "group": None}
    tracker = open_tracker(settings, run_dir=tmp_path, config={"quant": {"bits": 3}})
    assert isinstance(tracker, WandbTracker)
    tracker.log({"decode": {"tokens_per_s": 1.0}}, step=1)
    tracker.finish({"ttft_s": 0.5}, "ok")
    assert os.environ["WANDB_ERROR_REPORTING"] == "false", "offline sends nothing"
    assert list(tmp_path.rglob("*.wandb"))
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_a_sweep_with_wandb_is_one_group_of_named_runs(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    body = "context.record.metrics['perplexity_quantized'] = 1.0 + cfg.quant.bits"
    sweep = ("-m", "quant.bits=2,3", "tracking=wandb", "hydra.sweep.dir=multirun/day/one")
    code, out, err = run(tmp_path, *sweep, body=body)
    assert code == 0 and err == "" and "2 points: 2 ok" in out
    # README's argument of `wandb sync`.
    folders = sorted(tmp_path.glob("multirun/day/one/*/wandb/offline-run-*"))
    assert len(folders) == 2
    for folder in folders:
        (file,) = folder.glob("*.wandb")
        written, point = file.read_bytes(), folder.parent.parent
        assert load_result(point)["provenance"]["sweep"] == "day-one"
        assert all(text in written for text in (b"day-one", point.name.encode(), b"perplexity_quantized"))


def test_a_launcher_whose_package_is_missing_is_refused_and_otherwise_not_mentioned(tmp_path: Path) -> None:
    # Only this project's part of the namespace package, as where hydra-submitit-launcher is not installed.
    (tmp_path / "driver.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(SRC)!r})\nimport hydra_plugins\n"
        f"hydra_plugins.__path__ = [{str(SRC / 'hydra_plugins')!r}]\n"
        f"runpy.run_path({str(SRC / 'run.py')!r}, run_name='__main__')\n"
    )

    def without(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tmp_path / "driver.py"), *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    plain = without("--cfg", "job")
    assert plain.returncode == 0 and plain.stderr == "" and "seed: 0" in plain.stdout
    for launcher in ("athena", "local"):
        refused = without("-m", "quant.bits=2,3", f"hydra/launcher={launcher}")
        assert refused.returncode == 2 and refused.stderr == (
            f"error: hydra/launcher={launcher} must have the package hydra-submitit-launcher, got none installed; "
            "try pip install hydra-submitit-launcher\n"
        )
