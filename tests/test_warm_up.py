"""Kernels compiled ahead are those that the measured calls launch, compiled here for a GPU that is not there."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux on x86-64")

from kvquant import kernels
from kvquant.bench.compile_table import launches_compiled
from kvquant.bench.shapes import SHAPES
from kvquant.bench.stored import MadeUpKV, StoredHistory, quantizers_of
from kvquant.bench.warm_up import compile_ahead
from kvquant.spec import QuantSpec

SHAPE, CHUNK = SHAPES["small"], 40


@pytest.fixture
def stored(monkeypatch):
    """Histories whose kernels are Triton's, on the CPU: their launches are compiled, and nothing is computed."""
    monkeypatch.setattr(kernels, "triton_refusal", lambda device_type: None)
    data = MadeUpKV(SHAPE, 1024, torch.bfloat16, torch.device("cpu"), seed=0)
    quantizers = quantizers_of(QuantSpec(), [4, 2], data.sample(256))

    def make(bits, lengths):
        return StoredHistory(
            quantizers[bits],
            SHAPE,
            lengths,
            copies=2,
            room=CHUNK,
            data=data,
            backend="triton",
            block_size=64,
            spill_headroom=2.0,
        )

    return make


def test_what_is_measured_has_been_compiled(stored):
    with launches_compiled(90) as ahead:
        compile_ahead([stored(bits, [200]) for bits in (4, 2)], [1, CHUNK], "quantized")
    with launches_compiled(90) as measured, torch.no_grad():
        history = stored(2, [400, 130, 200])
        history.fill()
        for new in (1, CHUNK):
            step = history.pool.reserve(history.rows, [new] * 3)
            history.write(step)
            keys, values = history.own(1, step)
            attention = history.attention("quantized")
            query = history.data.query(3 * new)
            attention.attend(query, keys, values, history.store(1), step, history.rope)
            history.quantizer.reader(history.store(1), backend="triton")(step.block_table[:2, :2].long())
            history.pool.rollback()
    found, needed = ({(name, kernel.hash) for name, kernel in launched} for launched in (ahead, measured))
    assert {
        "_decode_kernel",
        "_codes_and_marks_of_pairs",
        "_store_outliers",
        "_quantize_values",
        "_dequantize_keys",
    } <= {name for name, _ in needed}
    assert needed <= found, sorted(name for name, _ in needed - found)
    # And those of the other width too.
    assert len({kernel for name, kernel in found if name == "_decode_kernel"}) == 2


def test_a_failure_is_left_to_where_it_is_measured(stored, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    broken = stored(4, [200])
    monkeypatch.setattr(broken, "fill", lambda: 1 / 0)
    threads = torch.get_num_threads()
    compile_ahead([broken], [1], "quantized")
    assert "compiling ahead failed: division by zero" in caplog.text and torch.get_num_threads() == threads
