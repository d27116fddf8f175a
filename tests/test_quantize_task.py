"""task=quantize at its smallest: every part runs, and what it compares agrees."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.cli import conf_dir
from kvquant.config import register_schemas
from kvquant.peak_memory import peak_extra_bytes
from kvquant.results import load_result
from kvquant.spec import QuantSpec
from kvquant.tasks import prefill_share, run_task
from kvquant.tasks.decode_ways import DecodeWays
from kvquant.tasks.published_way import published_keys, published_values


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(200, 2, 128, generator=generator) for _ in range(2))
    return BatchedKVQuantizer.calibrate(QuantSpec(4), keys, values), keys, values


def test_published_way_differs_from_ours_by_its_rounding_alone(layer):
    quantizer, keys, values = layer
    packed = quantizer.quantize(keys, values, torch.tensor([0, 200]))
    ours = quantizer.dequantize(packed)
    theirs = (
        published_keys(keys.view(200, -1), quantizer.constants),
        published_values(values.view(200, -1), quantizer.constants, 0.01),
    )
    for mine, other, x in zip(ours, theirs, (keys, values), strict=True):
        errors = [float((y.reshape(x.shape) - x).norm() / x.norm()) for y in (mine, other)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_both_ways_of_decoding_give_the_same(layer):
    quantizer, keys, values = layer
    found = DecodeWays(quantizer, keys.bfloat16(), values.bfloat16(), "auto").measure(1)
    assert found["relative_rms_between"] < 0.02
    assert found["dense_cache_bytes"] == 2 * 200 * 256 * 2


def test_prefill_share_compares_two_whole_runs(monkeypatch):
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setattr(prefill_share, "SHAPE", {**shape, "vocab_size": 64})
    found = prefill_share.measure_prefill_share(
        QuantSpec(3), [5, 70], layers=2, repeats=2, seed=0, backend="auto", device=torch.device("cpu")
    )
    assert found["tokens"] == 75 and found["layers"] == 2
    share = 100 * found["store_s_quantized"] / found["ttft_s_exact"]
    assert found["store_percent_of_exact_ttft"] == pytest.approx(share)
    assert 0 < found["store_s_exact"] < found["ttft_s_exact"]


def test_peak_memory_sees_what_was_freed_again():
    megabytes = 64
    peak = peak_extra_bytes(lambda: torch.ones(megabytes << 20, dtype=torch.uint8).max())
    if peak is None:
        pytest.skip("the peak of the resident set cannot be read here")
    # Pages that the process held already, and a thread's buffers, blur the edges.
    assert 0.9 * megabytes < peak / 2**20 < 3 * megabytes


def test_the_whole_task_from_its_command_line(tmp_path):
    register_schemas()
    sizes = [
        "tokens=64",
        "channels=256",
        "repeats=1",
        "lengths=[64,130]",
        "length_channels=128",
        "decode_tokens=130",
    ]
    overrides = ["task=quantize", "device=cpu", "energy.meter=constant", "task.prefill_lengths=[]"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, *(f"task.{size}" for size in sizes)])
    run_task.execute(cfg, run_dir=tmp_path, console=Console(quiet=True))
    result = load_result(tmp_path)
    assert result["status"] == "ok"
    metrics = result["metrics"]
    assert metrics["by_length"]["tokens"] == [64, 130] and min(metrics["by_length"]["s_per_token"]) > 0
    assert metrics["decode"]["tokens"] == 130
    assert len(result["table"]["rows"]) >= 6
