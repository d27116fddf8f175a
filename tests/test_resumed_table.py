"""The main table, killed outright in its middle and started again: no finished item is measured twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvquant.results import load_result

ROOT = Path(__file__).resolve().parent.parent
PRESET = (
    "experiment=[main_table,smoke]",
    "task.variants=[{option: [nuq, hadamard], bits: [2, 3]}, {option: kivi, bits: 2, recent_tokens: 32}]",
    "task.window=128",
    "task.passkeys=4",
    "task.passkey_length=200",
    "data.heldout_tokens=1280",
    "energy.meter=none",
    "device=cpu",
)
ROWS, WINDOWS, PASSKEYS = 6, 10, 4


def start(folder: Path, run: str, items: str) -> subprocess.Popen[str]:
    overrides = (*PRESET, f"hydra.run.dir={folder / run}", f"task.items_dir={folder / items}")
    environment = {**os.environ, "KVQUANT_CALIBRATION_DIR": str(folder / "calibration")}
    return subprocess.Popen(
        [sys.executable, "src/run.py", *overrides],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output


def items_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.item.json")}


@pytest.mark.slow
def test_a_table_killed_in_its_middle_redoes_nothing(tmp_path) -> None:
    killed = start(tmp_path, "killed", "items")
    # Two windows of every row and part of the third.
    while len(items_of(tmp_path / "items")) < 2 * ROWS + 2:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert load_result(tmp_path / "killed")["status"] == "running"
    before = items_of(tmp_path / "items")
    assert len(before) < ROWS * (WINDOWS + PASSKEYS), "the kill came after the end"

    finish(start(tmp_path, "again", "items"))
    again = load_result(tmp_path / "again")["metrics"]
    assert again["items_found"] == len(before)
    assert again["items_found"] + again["items_computed"] == ROWS * (WINDOWS + PASSKEYS)
    after = items_of(tmp_path / "items")
    assert {path: after[path] for path in before} == before

    finish(start(tmp_path, "whole", "other_items"))
    whole = load_result(tmp_path / "whole")["metrics"]
    assert whole["items_found"] == 0
    assert whole["variants"] == again["variants"]
