"""result.json: one shape, never half written, never NaN; foreign or broken files are named."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.errors import ResultError
from kvquant.provenance import MAX_DIFF_CHARS, git_state
from kvquant.results import FILE_NAME, REQUIRED, RunRecord, config_hash, load_result, plain

CONFIG = {
    "quant": {"bits": 3},
    "seed": 0,
    "tracking": {"name": "none"},
    "calibration": {"dir": "/a", "tokens": 5},
}


def make(tmp_path: Path) -> RunRecord:
    return RunRecord(tmp_path / "run", task="prefill", config=CONFIG, seed=7)


def test_a_run_is_running_then_ok(tmp_path: Path) -> None:
    record = make(tmp_path)
    record.save()
    assert load_result(tmp_path / "run")["status"] == "running"
    record.metrics["ttft_s"] = 0.5
    record.set_table("Title", ["a", "b"], [["x", 1]])
    record.finish("ok")
    result = load_result(tmp_path / "run" / FILE_NAME)
    assert result["status"] == "ok"
    assert result["metrics"] == {"ttft_s": 0.5}
    assert result["table"] == {"title": "Title", "columns": ["a", "b"], "rows": [["x", 1]]}
    assert result["provenance"]["seed"] == 7
    assert result["provenance"]["packages"]["numpy"]
    assert set(REQUIRED) <= set(result)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE_NAME]


def test_an_error_keeps_one_line_and_its_traceback(tmp_path: Path) -> None:
    record = make(tmp_path)
    try:
        raise RuntimeError("first\nsecond")
    except RuntimeError as error:
        record.finish("failed", error)
    error = load_result(tmp_path / "run")["error"]
    assert error["type"] == "RuntimeError" and error["message"] == "first second"
    assert "test_results.py" in error["traceback"]


def test_numbers_json_cannot_hold_become_null_with_their_reason(tmp_path: Path) -> None:
    record = make(tmp_path)
    record.metrics = {"ppl": math.inf, "by_bits": {"2": float("nan")}, "list": [1.0, np.float32("nan")]}
    record.finish("ok")
    text = (tmp_path / "run" / FILE_NAME).read_text()
    assert "NaN" not in text and "Infinity" not in text
    result = load_result(tmp_path / "run")
    assert result["metrics"] == {"ppl": None, "by_bits": {"2": None}, "list": [1.0, None]}
    assert result["nulls"] == {
        "metrics.ppl": "was inf",
        "metrics.by_bits.2": "was nan",
        "metrics.list.1": "was nan",
    }


@given(
    st.dictionaries(
        st.text(max_size=5), st.floats() | st.integers() | st.text(max_size=5) | st.none(), max_size=5
    )
)
def test_any_metrics_give_strict_json(metrics: dict) -> None:
    nulls: dict[str, str] = {}
    json.dumps(plain(metrics, "metrics", nulls), allow_nan=False)
    assert len(nulls) == sum(
        isinstance(value, float) and not math.isfinite(value) for value in metrics.values()
    )


def test_numpy_and_paths_are_converted_and_objects_refused(tmp_path: Path) -> None:
    record = make(tmp_path)
    record.metrics = {"n": np.int64(3), "v": np.arange(2), "p": Path("/x"), "b": np.bool_(True)}
    assert record.as_dict()["metrics"] == {"n": 3, "v": [0, 1], "p": "/x", "b": True}
    record.metrics = {"bad": object()}
    with pytest.raises(ResultError, match="metrics.bad must be plain"):
        record.as_dict()


def test_a_table_row_must_fit_its_columns(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="must have 2 entries, got 1"):
        make(tmp_path).set_table("t", ["a", "b"], [["x"]])


@pytest.mark.parametrize("broken", ["open", "replace"])
def test_a_full_disk_gives_one_line_and_no_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    record = make(tmp_path)
    record.save()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    if broken == "open":
        monkeypatch.setattr("builtins.open", full)
    else:
        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResultError) as caught:
        record.finish("ok")
    monkeypatch.undo()
    assert "No space left on device" in caught.value.message and "hydra.run.dir" in caught.value.message
    assert load_result(tmp_path / "run")["status"] == "running", "the old file is still whole"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE_NAME]


def test_a_folder_that_cannot_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(ResultError, match="must be writable"):
        make(tmp_path).save()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "complete JSON"),
        ('{"schema": "kvquant', "complete JSON"),
        ("[]", "must have schema"),
        ('{"schema": "other/1"}', "got other/1"),
        ('{"schema": "kvquant.result/1"}', "got none for status"),
    ],
)
def test_foreign_and_truncated_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(text)
    with pytest.raises(ResultError, match=message) as caught:
        load_result(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message
    with pytest.raises(ResultError, match="must be readable"):
        load_result(tmp_path / "nowhere" / FILE_NAME)


def test_the_hash_covers_what_changes_a_result_and_nothing_else() -> None:
    base = config_hash(CONFIG)
    assert len(base) == 16
    assert config_hash({**CONFIG, "tracking": {"name": "wandb"}}) == base
    assert config_hash({**CONFIG, "calibration": {"dir": "/b", "tokens": 5}}) == base
    assert config_hash({**CONFIG, "calibration": {"dir": "/a", "tokens": 6}}) != base
    assert config_hash({**CONFIG, "seed": 1}) != base


def test_provenance_tells_a_dirty_tree_and_bounds_its_diff(tmp_path: Path) -> None:
    import subprocess

    def git(*args: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *args], check=True, capture_output=True)

    assert git_state(tmp_path)["git_sha"] is None, "outside a checkout nothing is claimed"
    (tmp_path / "__init__.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    clean = git_state(tmp_path)
    assert len(clean["git_sha"]) == 40 and clean["git_dirty"] is False and clean["git_diff"] is None
    (tmp_path / "__init__.py").write_text("b = 2\n" * MAX_DIFF_CHARS)
    (tmp_path / "new.py").write_text("")
    dirty = git_state(tmp_path)
    assert dirty["git_dirty"] is True and dirty["git_untracked"] == ["new.py"]
    assert len(dirty["git_diff"]) < MAX_DIFF_CHARS + 100 and "left out" in dirty["git_diff"]
