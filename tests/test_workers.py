"""Threads that take runs of rows: the order of results, errors, inference mode, and what torch is left with."""

from __future__ import annotations

import pytest
import torch

from kvquant.kernels import workers
from kvquant.kernels.workers import map_rows

LARGE = 1 << 20


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    yield
    workers._executor.cache_clear()


def test_runs_make_up_all_rows_in_order(three_threads):
    runs = map_rows(lambda rows: rows, 10, LARGE)
    assert runs == [slice(0, 3), slice(3, 6), slice(6, 10)]


def test_little_work_stays_on_this_thread(three_threads):
    assert map_rows(lambda rows: rows, 10, 1) == [slice(0, 10)]
    assert map_rows(lambda rows: rows, 0, LARGE) == [slice(0, 0)]


def test_no_more_runs_than_rows(three_threads):
    assert map_rows(lambda rows: rows, 2, LARGE) == [slice(0, 1), slice(1, 2)]


def test_an_error_in_a_thread_is_raised(three_threads):
    def fail(rows: slice) -> None:
        raise RuntimeError(f"rows from {rows.start}")

    with pytest.raises(RuntimeError, match="rows from 0"):
        map_rows(fail, 10, LARGE)


@pytest.mark.parametrize("inference", [False, True])
def test_threads_work_without_autograd_in_the_callers_inference_mode(three_threads, inference):
    with torch.inference_mode(inference):
        modes = map_rows(lambda rows: (torch.is_inference_mode_enabled(), torch.is_grad_enabled()), 3, LARGE)
    assert modes == [(inference, False)] * 3


def test_torch_keeps_its_threads_and_workers_have_one():
    before = torch.get_num_threads()
    if before == 1:
        pytest.skip("torch has one thread here")
    workers._executor.cache_clear()
    assert set(map_rows(lambda rows: torch.get_num_threads(), 10, LARGE)) == {1}
    assert torch.get_num_threads() == before
