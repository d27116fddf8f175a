"""Finished items survive a kill at any byte, and are never mixed with those of another configuration or code."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.errors import ResultError
from kvquant.items import ItemStore

IDENTITY = {"config_hash": "a", "git_sha": "b"}


def test_what_was_committed_is_there_again(tmp_path: Path) -> None:
    store = ItemStore(tmp_path, IDENTITY)
    assert store.get("a") is None and "a" not in store and store.resumed == 0
    store.commit("a", {"nll": 0.1 + 0.2, "words": ["x"]}, {"kl": np.arange(5, dtype=np.float32)})
    store.commit(7, {"nll": math.inf})
    again = ItemStore(tmp_path, IDENTITY)
    assert again.resumed == len(again) == 2
    item = again.get("a")
    assert item is not None
    assert item.values == {"nll": 0.1 + 0.2, "words": ["x"]}
    assert item.arrays["kl"].dtype == np.float32 and item.arrays["kl"].tolist() == [0, 1, 2, 3, 4]
    seven = again.get(7)
    assert seven is not None and seven.values["nll"] == math.inf


def test_another_identity_starts_from_nothing_and_leaves_the_first_alone(tmp_path: Path) -> None:
    ItemStore(tmp_path, IDENTITY).commit("a", {"n": 1})
    other = ItemStore(tmp_path, {**IDENTITY, "git_sha": "c"})
    assert len(other) == 0
    other.commit("a", {"n": 2})
    first = ItemStore(tmp_path, IDENTITY).get("a")
    assert first is not None and first.values == {"n": 1}


def test_a_finished_run_started_again_measures_again(tmp_path: Path) -> None:
    ItemStore(tmp_path, IDENTITY).commit("a", {"n": 1})
    assert len(ItemStore(tmp_path, IDENTITY, fresh=True)) == 0
    assert len(ItemStore(tmp_path, IDENTITY)) == 0


@pytest.mark.parametrize("kept_bytes", range(-12, 0))
def test_a_line_cut_short_is_computed_again(tmp_path: Path, kept_bytes: int) -> None:
    store = ItemStore(tmp_path, IDENTITY)
    store.commit("a", {"n": 1})
    store.commit("b", {"n": 2})
    with open(store.path, "r+b") as file:
        file.truncate(os.path.getsize(store.path) + kept_bytes)
    again = ItemStore(tmp_path, IDENTITY)
    assert "a" in again and "b" not in again
    again.commit("b", {"n": 3})
    last = ItemStore(tmp_path, IDENTITY)
    assert [last.get(key).values["n"] for key in "ab"] == [1, 3]  # type: ignore[union-attr]


def test_killed_between_items_it_goes_on_with_the_next(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from kvquant.items import ItemStore
def compute(key):
    if key == 3 and not sys.argv[1:]:
        os.kill(os.getpid(), signal.SIGKILL)
    print(key)
    return {{"square": key * key}}
items = ItemStore(Path({str(tmp_path)!r}), {IDENTITY!r})
print(sum(item.values["square"] for item in items.run(range(6), compute)))
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent / "src")}
    outputs = []
    for argument in ([], ["again"]):
        done = subprocess.run(
            [sys.executable, "-u", "-c", code, *argument], env=env, capture_output=True, text=True
        )
        outputs.append(done.stdout.split())
    assert outputs == [["0", "1", "2"], ["3", "4", "5", "55"]]


def test_a_key_is_committed_once(tmp_path: Path) -> None:
    store = ItemStore(tmp_path, IDENTITY)
    store.commit("a", {})
    with pytest.raises(ResultError, match="committed once, got 'a' again"):
        store.commit("a", {})


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="must be writable"):
        ItemStore(tmp_path / "file", IDENTITY).commit("a", {})


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(allow_nan=False), max_size=5), st.text(max_size=5))
def test_numbers_come_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, numbers: list, key: str
) -> None:
    folder = tmp_path_factory.mktemp("items")
    ItemStore(folder, IDENTITY).commit(key, {"numbers": numbers})
    item = ItemStore(folder, IDENTITY).get(key)
    assert item is not None and item.values["numbers"] == numbers
