"""task=kernels at its smallest: every operation measured, wrong results refused, what does not fit left out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from kvquant.bench import operations
from kvquant.bench.full_precision import FullPrecision, fastest
from kvquant.bench.shapes import SHAPES
from kvquant.bench.stored import MadeUpKV, StoredHistory, kept_exactly, quantizers_of
from kvquant.bench.timing import Clock, Timing, copies_past_cache
from kvquant.cli import conf_dir
from kvquant.config import register_schemas, validate
from kvquant.config.cost_tasks import KERNEL_OPERATIONS
from kvquant.errors import ConfigError, DeviceError
from kvquant.report.kernels_figure import draw_kernels
from kvquant.results import load_result
from kvquant.spec import QuantSpec
from kvquant.tasks import kernel_cases, run_task

CPU = torch.device("cpu")
SMALL = [
    "task=kernels",
    "device=cpu",
    "energy.meter=none",
    "task.shapes=[small]",
    "task.tokens=[100]",
    "task.batches=[2]",
    "task.layer_tokens=[64]",
    "task.step_tokens=40",
    "task.seconds=0.001",
]


def composed(*overrides: str):
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=[*SMALL, *overrides])


def history(lengths=(70, 5), copies=2, room=20, bits=4) -> StoredHistory:
    data = MadeUpKV(SHAPES["small"], 2048, torch.bfloat16, CPU, seed=0)
    return StoredHistory(
        quantizers_of(QuantSpec(), [bits], data.sample(4096))[bits],
        SHAPES["small"],
        lengths,
        copies=copies,
        room=room,
        data=data,
        backend="auto",
        block_size=64,
        spill_headroom=2.0,
    )


def test_the_whole_task_from_its_command_line(tmp_path):
    overrides = ["task.bits=[3,2]", "task.ragged_context=400", "batch.num_prompts=3", "batch.decode_tokens=8"]
    run_task.execute(composed(*overrides), run_dir=tmp_path, console=Console(quiet=True))
    result = load_result(tmp_path)
    assert result["status"] == "ok" and result["figures"] == ["kernels.png"]
    metrics = result["metrics"]
    assert {row["operation"] for row in metrics["rows"]} == set(KERNEL_OPERATIONS)
    # The ragged batch has no chunked prefill and no layer.
    assert len(metrics["rows"]) == len(result["table"]["rows"]) == 2 * (len(KERNEL_OPERATIONS) + 4)
    assert metrics["decode_small_2x100_3bit_us"] > 0
    assert metrics["layer_share_small_1x64_2bit_percent_of_layer"] > 0
    assert metrics["decode_small_trace3_2bit_speedup_over_full_precision"] > 0
    assert metrics["decode_small_2x100_2bit_bytes"] < metrics["decode_small_2x100_3bit_bytes"]
    assert all(
        row["us"] > 0 and row.get("difference", 0) < operations.MOST_DIFFERENCE for row in metrics["rows"]
    )
    assert {way["way"] for way in metrics["full_precision"]} >= {"sdpa_flash", "sdpa_math"}
    assert metrics["skipped"] == [] and metrics["copy_gb_per_s"] > 0


@pytest.mark.gpu
def test_the_whole_task_on_a_gpu(tmp_path):
    """What it measures there alone: kernels compiled ahead, every library's attention, a CUDA graph."""
    cfg = composed("device=cuda", "task.bits=[4,2]", "task.ragged_context=0", "task.baselines=[sdpa,varlen]")
    run_task.execute(cfg, run_dir=tmp_path, console=Console(quiet=True))
    metrics = load_result(tmp_path)["metrics"]
    assert metrics["failed"] == metrics["skipped"] == []
    assert {row["operation"] for row in metrics["rows"]} == set(KERNEL_OPERATIONS)
    assert all(row["graph_us"] > 0 for row in metrics["rows"] if row["operation"] == "decode")
    assert any(way["way"] == "sdpa_flash" and way.get("us", 0) > 0 for way in metrics["full_precision"])
    steps = [entry["step"] for entry in metrics["steps"]]
    # No measurement pays for what takes seconds to compile.
    ahead = steps.index("compiling kernels for small")
    assert all(ahead < steps.index(f"decode of small 2x100 at {bits} bits") for bits in (4, 2))


def test_outliers_are_as_many_and_as_clustered_as_in_text():
    """As the shipped model's on held-out text: 1.0% of keys, 25% of (block, head)s spill, 1% hold twice the mean."""
    data = MadeUpKV(SHAPES["llama31_8b"], 16384, torch.bfloat16, CPU, seed=0)
    quantizers = quantizers_of(QuantSpec(), [4, 2], sample := data.sample(16384))
    assert quantizers[2].spec.widths == (2, 2)
    assert torch.equal(quantizers[4].fitted.key_lower, quantizers[2].fitted.key_lower)
    stored = StoredHistory(
        quantizers[4],
        data.shape,
        [8192, 5000],
        copies=1,
        room=1,
        data=data,
        backend="auto",
        block_size=64,
        spill_headroom=2.0,
    )
    stored.fill()
    found = kept_exactly(stored.pool)
    assert 0.009 < found["key_outlier_fraction"] < 0.011 and found["value_outlier_fraction"] == 12 / 1024
    assert 0.15 < found["spilled_blocks"] < 0.4 and found["key_outlier_base"] == 96
    counts = stored.store(0).keys.outlier_count[stored.pool.blocks_of(stored.rows[0])].float()
    assert 1.6 < float(counts.flatten().quantile(0.99)) / found["key_outliers_per_block"] < 2.4
    # Calibration saw other tokens of the same channels.
    keys, _ = data.take(16384)
    seen = {bytes(row) for row in sample.keys.flatten(1).view(torch.uint8).numpy()}
    assert not any(bytes(row) in seen for row in keys[:2000].flatten(1).view(torch.uint8).numpy())
    spreads = [x.float().flatten(1).abs().median(0).values for x in (keys, sample.keys)]
    torch.testing.assert_close(*spreads, rtol=0.1, atol=0)


def test_a_run_that_is_cut_short_leaves_what_it_has(tmp_path, monkeypatch):
    """Table, figure, bandwidths and the steps' seconds of every case that was finished."""
    measure, done = kernel_cases.Bench.measure, []

    def cut(self, case):
        if done:
            raise KeyboardInterrupt
        done.append(case)
        measure(self, case)

    monkeypatch.setattr(kernel_cases.Bench, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        cfg = composed("task.bits=[4,3]", "task.operations=[write_keys,decode]")
        run_task.execute(cfg, run_dir=tmp_path, console=Console(quiet=True))
    result = load_result(tmp_path)
    metrics = result["metrics"]
    assert result["status"] == "interrupted" and result["figures"] == ["kernels.png"]
    assert [row["operation"] for row in metrics["rows"]] == ["write_keys", "decode"]
    assert all(row["copy_fraction"] > 0 for row in metrics["rows"]) and len(result["table"]["rows"]) == 2
    assert metrics["decode_small_2x100_4bit_bytes"] > 0 and (tmp_path / "kernels.png").stat().st_size > 0
    assert [row["bits"] for row in metrics["stored"]] == [4] and metrics["calibration_tokens"] == 16384
    steps = {entry["step"]: entry["seconds"] for entry in metrics["steps"]}
    assert {"storing small 2x100 at 4 bits", "decode of small 2x100 at 4 bits", "sdpa_flash"} <= set(steps)
    assert "calibrating small on 16384 tokens" in steps and min(steps.values()) >= 0


def test_what_does_not_fit_is_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cases, "MEMORY_SHARE", 1e-9)
    run_task.execute(composed("task.bits=[4]"), run_dir=tmp_path, console=Console(quiet=True))
    metrics = load_result(tmp_path)["metrics"]
    assert metrics["rows"] == []
    assert {skip["part"] for skip in metrics["skipped"]} == {"layer_share", "full precision", "history"}
    assert all("GiB are free" in skip["reason"] for skip in metrics["skipped"])


def test_a_failure_costs_no_other_measurement_and_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cases, "measure_dequantize", lambda *_: 1 / 0)
    operations = "task.operations=[write_keys,dequantize,decode]"
    with pytest.raises(DeviceError, match="1 failed, first dequantize: division by zero"):
        cfg = composed("task.bits=[4]", operations)
        run_task.execute(cfg, run_dir=tmp_path, console=Console(quiet=True))
    result = load_result(tmp_path)
    assert result["status"] == "failed"
    assert [row["operation"] for row in result["metrics"]["rows"]] == ["write_keys", "decode"]


@pytest.mark.parametrize(("new", "reads"), [(1, "quantized"), (20, "quantized"), (20, "exact")])
def test_attention_agrees_with_dequantizing_first(new, reads):
    stored = history()
    stored.fill()
    clock = Clock(CPU, seconds=0.0)
    row = operations.measure_attention(stored, clock, new, reads, {}, in_graph=None, slow_clock=clock)
    assert row["difference"] < 0.02  # a rounding to bf16 or two
    assert row["operation"] == ("decode" if new == 1 else "prefill")
    assert [stored.pool.length(r) for r in stored.rows] == [69, 4]


def test_a_wrong_result_is_not_timed(monkeypatch):
    stored = history()
    stored.fill()
    monkeypatch.setattr(
        operations.DequantizeThenAttend, "__call__", lambda *_: torch.full((2, 4, 64), math.nan)
    )
    clock = Clock(CPU, seconds=0.0)
    with pytest.raises(operations.WrongResult, match="must give"):
        operations.measure_attention(stored, clock, 1, "quantized", {}, in_graph=None, slow_clock=clock)


def test_writes_leave_the_pool_as_it_was_and_count_their_bytes():
    stored = history(lengths=(100, 30))
    rows = operations.measure_writes(stored, Clock(CPU, seconds=0.0), most_tokens=110)
    assert [row["tokens_of_call"] for row in rows] == [110, 110]
    C = SHAPES["small"].channels
    outliers = [(row["bytes"] - 110 * C * 2.5) / 4 for row in rows]
    assert 0.005 < outliers[0] / (110 * C) < 0.02
    assert outliers[1] == pytest.approx(110 * (2 * 1 + 1))  # 2n of 128 channels, and a zero and a scale
    assert stored.pool.blocks_in_use == 0 and int(stored.pool.spill_top.min()) == stored.pool.num_chunks


def test_decode_reads_all_that_is_stored_of_its_tokens():
    stored = history(lengths=(64,), copies=1)
    stored.fill()
    step = stored.pool.reserve(stored.rows, [1])
    stored.write(step)
    stored.pool.commit()
    # A full block is read whole but for free places in its base rows of key outliers.
    keys = stored.store(0).keys
    free = keys.outlier_index.shape[-1] * 2 - int(
        keys.outlier_count.clamp(max=keys.outlier_index.shape[-1]).sum()
    )
    spilled = int((keys.outlier_count - keys.outlier_index.shape[-1]).clamp(min=0).sum())
    assert stored.read_bytes(step) == stored.layout.block_bytes - 4 * free + 4 * spilled + 4


def test_full_precision_ways_agree_on_a_ragged_batch():
    shape = SHAPES["small"]
    dense = FullPrecision(shape, [40, 7], 1, 1, torch.float32, CPU)
    padded = {name: make()(0) for name, make in dense.ways(["sdpa"])}
    truth = padded["sdpa_math"]
    for b, n in enumerate(dense.lengths):
        one = torch.nn.functional.scaled_dot_product_attention(
            dense.query[b], dense.keys[0, b, :, :n], dense.values[0, b, :, :n], enable_gqa=True
        )
        torch.testing.assert_close(truth[b], one)
        grouped = padded["sdpa_math_grouped"][b].view_as(one)
        torch.testing.assert_close(grouped, one)
        flash = padded["sdpa_flash"][b][0]
        torch.testing.assert_close(flash, one)


def test_a_way_that_cannot_run_says_why_and_the_fastest_wins():
    dense = FullPrecision(SHAPES["small"], [40, 40], 1, 1, torch.float32, CPU)
    dense.ways = lambda kinds: [
        ("broken", lambda: 1 / torch.zeros(2, 3).view(5)),
        *FullPrecision.ways(dense, kinds),
    ]
    found = dense.measure(Clock(CPU, seconds=0.0), ["sdpa"])
    assert "shape" in found["broken"]
    name, timing = fastest(found)
    assert timing.median_s == min(t.median_s for t in found.values() if isinstance(t, Timing))
    assert name.startswith("sdpa_")


def test_in_a_graph_only_ways_near_the_fastest_are_timed() -> None:
    dense = FullPrecision(SHAPES["small"], [40, 40], 1, 1, torch.float32, CPU)
    dense.ways = lambda kinds: ((name, lambda name=name: name) for name in ("fast", "near", "far", "refused"))
    found = {name: Timing(s, s, s, 1) for name, s in (("fast", 1.0), ("near", 1.1), ("far", 1.3))}

    def graph(way: str, copies: int) -> Timing:
        if way == "fast":
            raise RuntimeError("not while  capturing")
        return Timing(0.9, 0.9, 0.9, copies)

    clock = SimpleNamespace(graph=graph)
    in_graph = dense.measure_graph(clock, ["sdpa"], {**found, "refused": "no"})
    assert in_graph == {"fast": "not while capturing", "near": Timing(0.9, 0.9, 0.9, 1)}
    assert dense.measure_graph(clock, ["sdpa"], {"refused": "no"}) == {}


def test_timings_take_inputs_in_turn_and_put_them_back():
    seen, prepared = [], []
    timing = Clock(CPU, seconds=0.0).measure(seen.append, 2, prepare=prepared.append)
    assert seen == prepared == [0, 0, 1, 0, 1] and timing.repeats == 3
    assert timing.low_s <= timing.median_s <= timing.high_s


def test_ways_take_turns():
    seen = []
    ways = [lambda copy, name=name: seen.append(f"{name}{copy}") for name in "ab"]
    timings = Clock(CPU, seconds=0.0).in_turns(ways, 2)
    assert [t.repeats for t in timings] == [7, 7]
    assert seen[:6] == ["a0", "b0", "a1", "b1", "a0", "b0"]


def test_copies_are_enough_for_the_cache():
    assert copies_past_cache(1 << 40, CPU, 9) == 2 and copies_past_cache(1, CPU, 9) == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.shapes=[gpt2]", "task.shapes must be of llama2_7b"),
        ("task.operations=[]", "task.operations must be at least one"),
        ("task.bits=[9]", "task.bits must be widths"),
        ("task.tokens=[0]", "task.tokens must be 1 or more"),
        ("quant=none", "quant.method must be nuq"),
        ("quant=kivi", "quant.method must be nuq"),
    ],
)
def test_settings_that_cannot_work_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        validate(composed(override))


def test_the_figure_can_be_drawn_from_a_result_alone(tmp_path):
    rows = [
        {
            "operation": operation,
            "shape": "small",
            "batch": 2,
            "tokens": tokens,
            "bits": 4,
            "is_trace": False,
            "copy_fraction": 0.5,
            "speedup_over_full_precision": 2.0,
        }
        for operation in ("decode", "write_keys")
        for tokens in (64, 128)
    ]
    assert draw_kernels(rows, tmp_path / "k.png").stat().st_size > 1000
