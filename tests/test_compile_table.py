"""The compile table: real launchers, compiled for GPUs that are not here, and a spill that fails it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux on x86-64")

import torch
import triton

from kvquant.bench import compile_table
from kvquant.bench.compile_table import Case, compile_case


@pytest.fixture(scope="module")
def rows():
    return compile_case(Case("write_values", "llama31_8b", 4), 80)


def test_a_launcher_is_compiled_for_a_gpu_that_is_not_here(rows):
    assert [row["kernel"] for row in rows] == ["quantize_values"]
    for row in rows:
        assert row["sm"] == 80 and row["warps"] >= 1 and 16 <= row["registers"] <= 255
        assert row["instructions"] > 100 and row["loads"] >= row["loads_128_bit"] >= 0
        # These kernels have no products.
        assert row["hmma"] == row["wgmma"] == row["spills"] == 0


def test_one_process_compiles_for_each_architecture(rows):
    again = compile_case(Case("write_values", "llama31_8b", 4), 90)
    assert {row["source"] for row in again}.isdisjoint(row["source"] for row in rows)


def test_alignment_is_what_a_launch_has(rows):
    # Without it no load is wide.
    assert rows[0]["loads_128_bit"] > 0


@pytest.mark.parametrize("architecture", [80, 90])
def test_a_merge_in_place_stores_what_all_warps_have_loaded(architecture):
    from kvquant.kernels.triton_kernels import prefill

    T, Hq, D = 512, 32, 128
    total, part = torch.empty(T, Hq, D), torch.empty(T, Hq, D, dtype=torch.bfloat16)
    with compile_table.launches_compiled(architecture) as compiled:
        prefill.fold(total, torch.empty(Hq, T), part, torch.empty(Hq, T), total)
    ((name, kernel),) = compiled
    assert name == "_fold_kernel"
    # Log-sum-exps are single words; each layout that needs them loads them anew, and one warp stores them.
    said = [
        kind
        for line in kernel.asm["ptx"].splitlines()
        for kind in ("ld.global.b32", "bar.sync", "st.global.b32")
        if kind in line
    ]
    store = said.index("st.global.b32")
    assert said[:store].count("ld.global.b32") >= 2 and said[store - 1] == "bar.sync"
    assert "ld.global.b32" not in said[store:]


def test_nothing_is_left_behind(rows):
    assert triton.runtime.jit.JITFunction.run.__name__ == "run"
    assert not isinstance(triton.runtime.driver._active, compile_table._NoGpu)


def test_every_operation_of_a_backend_has_a_case():
    assert {case.operation for case in compile_table.cases()} == {
        "decode", "prefill", "write_keys", "write_values", "write_exact", "close_values", "dequantize",
        "rotate", "cuda_decode",
    }  # fmt: skip


@pytest.mark.parametrize("spills", [0, 3])
def test_a_spill_fails_the_table(rows, spills, monkeypatch, tmp_path, capsys):
    changed = [{**row, "spills": spills} for row in rows]
    monkeypatch.setattr(compile_table, "compile_table", lambda *_: changed)
    code = compile_table.main(["--json", str(tmp_path / "t.json"), "--markdown", str(tmp_path / "t.md")])
    captured = capsys.readouterr()
    assert code == (1 if spills else 0) and ("must not spill, got 3" in captured.err) == bool(spills)
    assert len(json.loads((tmp_path / "t.json").read_text())["rows"]) == len(rows)
    assert (tmp_path / "t.md").read_text().count("\n") == 2 + len(rows)
