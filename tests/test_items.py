"""Finished items survive a kill at any moment, and are never mixed with those of another configuration or code."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant import items
from kvquant.errors import ResultError
from kvquant.items import ItemStore

IDENTITY = {"config_hash": "a", "model_hash": "b"}


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
    assert (store.found, store.computed, again.found, again.computed) == (0, 2, 2, 0)


def test_another_identity_or_other_code_starts_from_nothing_and_leaves_the_first_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ItemStore(tmp_path, IDENTITY).commit("a", {"n": 1})
    other = ItemStore(tmp_path, {**IDENTITY, "model_hash": "c"})
    assert len(other) == 0
    other.commit("a", {"n": 2})
    monkeypatch.setattr(items, "_code", lambda: "edited")
    assert len(ItemStore(tmp_path, IDENTITY)) == 0
    monkeypatch.undo()
    first = ItemStore(tmp_path, IDENTITY).get("a")
    assert first is not None and first.values == {"n": 1}


def test_a_finished_run_started_again_measures_again(tmp_path: Path) -> None:
    ItemStore(tmp_path, IDENTITY).commit("a", {"n": 1})
    assert len(ItemStore(tmp_path, IDENTITY, fresh=True)) == 0
    assert len(ItemStore(tmp_path, IDENTITY)) == 0


def test_a_batch_is_computed_together_or_not_at_all(tmp_path: Path) -> None:
    calls = []

    def compute() -> list[dict[str, int]]:
        calls.append(1)
        return [{"n": 1}, {"n": 2}]

    store = ItemStore(tmp_path, IDENTITY)
    assert store.batch(["a", "b"], compute) == store.batch(["a", "b"], compute) == [{"n": 1}, {"n": 2}]
    assert len(calls) == 1 and (store.found, store.computed) == (2, 2)
    store._path("b").unlink()
    assert store.batch(["a", "b"], compute) == [{"n": 1}, {"n": 2}] and len(calls) == 2


def _commit_for_ever(folder: Path) -> None:
    store, arrays = ItemStore(folder, IDENTITY), {"x": np.full(20_000, 7.0)}
    for key in range(10**6):
        store.commit(key % 4, {"numbers": [0.5] * 5000}, arrays)


def test_killed_at_any_moment_every_item_that_is_there_is_whole(tmp_path: Path) -> None:
    for _ in range(5):
        process = multiprocessing.get_context("fork").Process(target=_commit_for_ever, args=(tmp_path,))
        process.start()
        # Committing goes on while it is read, and while it is killed.
        store, seen = ItemStore(tmp_path, IDENTITY), 0
        while seen < 8:
            for item in map(store.get, range(4)):
                if item is not None:
                    seen += 1
                    assert item.values == {"numbers": [0.5] * 5000} and (item.arrays["x"] == 7).all()
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    assert len(ItemStore(tmp_path, IDENTITY)) <= 4


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


def test_a_folder_that_cannot_be_written_and_a_damaged_item_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="must be writable"):
        ItemStore(tmp_path / "file", IDENTITY)
    store = ItemStore(tmp_path, IDENTITY)
    store.commit("a", {"n": 1})
    store._path("a").write_text("[]")
    with pytest.raises(ResultError, match=r"a\.item\.json must be an item.*delete it"):
        store.get("a")


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(allow_nan=False), max_size=5),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)
def test_numbers_come_back_bit_by_bit_under_any_name(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[float], key: str
) -> None:
    folder = tmp_path_factory.mktemp("items")
    ItemStore(folder, IDENTITY).commit(key, {"numbers": numbers})
    item = ItemStore(folder, IDENTITY).get(key)
    assert item is not None and item.values["numbers"] == numbers
