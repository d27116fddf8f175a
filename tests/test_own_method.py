"""README's method of one's own, followed to the letter in a copy of the checkout."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvquant.results import load_result

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy with the files that README tells to write, and nothing else changed."""
    copy = tmp_path_factory.mktemp("checkout")
    skipped = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "src", copy / "src", ignore=skipped)
    shutil.copytree(ROOT / "conf", copy / "conf")
    # Loops that were compiled for these sources (README's file is not among them) need not be compiled again. Under the
    # lock of those who write them (disk_cache.py), or an index and what it names could be of different moments.
    cache = Path("src", "kvquant", "compiled", "__pycache__")
    (copy / cache).mkdir()
    if (ROOT / cache).is_dir():
        with (ROOT / cache / "loops.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for path in (ROOT / cache).glob("*.nb?"):
                shutil.copy(path, copy / cache)
    (copy / "src" / "kvquant" / "assets").symlink_to(ROOT / "src" / "kvquant" / "assets")
    (copy / "tests").mkdir()
    for name in ("test_methods.py", "small_models.py"):
        shutil.copy(ROOT / "tests" / name, copy / "tests")
    shutil.copy(ROOT / "pyproject.toml", copy)
    _, _, section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## A method of your own")
    written = re.findall(r"`((?:src|conf)/[^`<]+)`[^`]*(?:`[^`]+`[^`]*)?```\w+\n(.*?)```", section, re.DOTALL)
    assert [Path(name).suffix for name, _ in written] == [".py", ".yaml"]
    assert sum(text.count("\n") for _, text in written) <= 30, "README promises thirty lines"
    for name, text in written:
        assert not (copy / name).exists()
        (copy / name).write_text(text, encoding="utf-8")
    return copy


def execute(checkout: Path, *command: str) -> str:
    environment = {**os.environ, "KVQUANT_CALIBRATION_DIR": str(checkout / "calibration"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_method_runs(checkout) -> None:
    overrides = ("experiment=smoke", "task=perplexity", "task.window=128", "energy.meter=none", "device=cpu")
    execute(
        checkout,
        "src/run.py",
        "quant=power",
        "quant.options.power=1.2",
        *overrides,
        "hydra.run.dir=outputs/own",
    )
    result = load_result(checkout / "outputs" / "own")
    assert result["config"]["quant"]["options"] == {"power": 1.2}
    assert 3 < result["metrics"]["effective_bits"] < 6 and 0 < result["metrics"]["kl_mean"] < 0.5


@pytest.mark.slow
def test_the_tests_of_methods_pick_it_up(checkout) -> None:
    found = execute(
        checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_methods.py", "-k", "power"
    )
    assert int(re.search(r"(\d+) passed", found).group(1)) >= 8
