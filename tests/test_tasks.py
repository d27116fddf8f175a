"""Each task from its command line to its result.json, on the shipped model and as little text as works."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console

from kvquant.cli import conf_dir
from kvquant.config import register_schemas
from kvquant.errors import CalibrationError, DataError, MeterUnavailable, PoolExhausted
from kvquant.results import load_result
from kvquant.tasks import prefill_share, run_task


@pytest.fixture(scope="module")
def calibration_dir(tmp_path_factory) -> Path:
    """One folder for the module: what one test calibrates the next finds."""
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture
def configure(calibration_dir):
    def composed(*overrides: str) -> DictConfig:
        register_schemas()
        always = [
            "experiment=smoke",
            "device=cpu",
            "energy.meter=constant",
            f"calibration.dir={calibration_dir}",
        ]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("config", overrides=[*always, *overrides])

    return composed


@pytest.fixture
def run(configure, tmp_path):
    def execute(*overrides: str) -> dict:
        run_task.execute(configure(*overrides), run_dir=tmp_path, console=Console(quiet=True))
        return load_result(tmp_path)

    return execute


def test_prefill_reports_quality_memory_time_and_energy(run, tmp_path) -> None:
    result = run("batch.num_prompts=3", "task.repeats=1")
    metrics = result["metrics"]
    assert result["status"] == "ok"
    assert metrics["batch"]["prompts"] == 3
    exact, quantized = metrics["memory"]["exact"], metrics["memory"]["quantized"]
    assert quantized["effective_bits"] < exact["effective_bits"] / 2
    assert sum(quantized["parts_bytes"].values()) == quantized["held_bytes"]
    assert 0.002 < quantized["key_outlier_fraction"] < 0.05
    quality = metrics["quality"]
    assert quality["kl_mean"] > 0 and quality["perplexity_exact"] > 1 and quality["prompts_compared"] == 3
    for name in ("perplexity_excess_percent", "kl_mean", "top1_agreement"):
        assert quality[f"{name}_low"] < quality[name] < quality[f"{name}_high"]
    assert metrics["capacity"]["sequences_quantized"] > metrics["capacity"]["sequences_exact"]
    assert metrics["energy"]["quantized"]["energy_kind"] == "estimated"
    assert len(result["provenance"]["model_hash"]) == len(result["provenance"]["data_hash"]) == 64
    assert {"bytes.png", "times.png", "divergence.png"} == set(result["figures"])
    assert all((tmp_path / name).stat().st_size > 5000 for name in result["figures"])


RESUMED = {
    # The task's command, and the function that is called once per item.
    "prefill": (["batch.num_prompts=3", "task.repeats=4"], "_one_pass"),
    "generate": (["task.max_new_tokens=4", "task.prompt_tokens=20", "task.count=3"], "_continue"),
    "serve_trace": (
        ["task.num_requests=4", "task.generated_quantiles=[1,2,2,2,3,3,3,4,4,4,6]"],
        "replay",
    ),
}


@pytest.mark.parametrize("task", RESUMED)
def test_a_task_that_was_stopped_keeps_what_it_had_finished(run, tmp_path, monkeypatch, task) -> None:
    options, step = RESUMED[task]
    module = importlib.import_module(f"kvquant.tasks.{task}")
    real, calls = getattr(module, step), []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6 - 2 * (task != "prefill"):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, step, stopping)
    with pytest.raises(KeyboardInterrupt):
        run(f"task={task}", *options)
    monkeypatch.setattr(module, step, real)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("items/*/*.item.json")}
    assert finished and load_result(tmp_path)["status"] == "interrupted"
    resumed = run(f"task={task}", *options)
    assert resumed["provenance"]["resumed_items"] == len(finished)
    assert all(path.stat().st_mtime_ns == then for path, then in finished.items()), "measured again"
    # The same command in the same folder, now that it had finished, begins from nothing.
    whole = run(f"task={task}", *options)
    assert whole["provenance"]["resumed_items"] == 0
    deterministic = {
        "prefill": ("quality", "memory", "capacity", "batch"),
        "generate": ("tokens", "equal_tokens", "equal_tokens_mean", "effective_bits"),
        "serve_trace": ("requests", "rules"),
    }
    for name in deterministic[task]:
        assert resumed["metrics"][name] == whole["metrics"][name]
    assert resumed["figures"] == whole["figures"] and resumed["table"]["columns"] == whole["table"]["columns"]


def test_prefill_with_exact_reads_does_not_claim_quality(run) -> None:
    quality = run("cache.prefill_reads=exact", "batch.num_prompts=2", "task.repeats=1")["metrics"]["quality"]
    assert quality == {"skipped": "cache.prefill_reads=exact"}


def test_prefill_without_quantization_changes_nothing(run) -> None:
    metrics = run("quant=none", "batch.num_prompts=2", "task.repeats=1")["metrics"]
    assert metrics["quality"]["kl_mean"] == 0
    assert metrics["quality"]["top1_agreement"] == 1
    assert metrics["memory"]["exact"]["held_bytes"] == metrics["memory"]["quantized"]["held_bytes"]


def test_calibrate_finds_what_it_made(run) -> None:
    assert run("task=calibrate", "quant.bits=5")["metrics"]["found_on_disk"] is False
    assert run("task=calibrate", "quant.bits=5")["metrics"]["found_on_disk"] is True
    assert run("task=calibrate", "quant.bits=5", "task.overwrite=true")["metrics"]["found_on_disk"] is False


def test_perplexity_keeps_sums_per_window(run, tmp_path) -> None:
    metrics = run("task=perplexity", "task.max_tokens=300", "task.window=100")["metrics"]
    windows = json.loads((tmp_path / "windows.json").read_text())
    assert len(windows) == metrics["windows"] == 3
    assert sum(w["n_tokens"] for w in windows) == metrics["compared_tokens"] == 297


def test_overlapping_windows_predict_every_token_once(run) -> None:
    metrics = run("task=perplexity", "task.max_tokens=250", "task.window=100", "task.stride=40")["metrics"]
    assert metrics["compared_tokens"] == 249


def test_perplexity_and_divergence_rise_as_bits_fall(run) -> None:
    # The text is this Python's own library: 2,048 tokens of 3.11.2's cannot tell 4 bits from 3 by perplexity, 6,144 can.
    metrics = [
        run(
            "task=perplexity",
            "task.max_tokens=6144",
            "task.window=512",
            f"quant.bits={bits}",
            "data.calibration_tokens=4096",
        )["metrics"]
        for bits in (4, 3, 2)
    ]
    for name in ("perplexity_quantized", "kl_mean"):
        values = [found[name] for found in metrics]
        assert values == sorted(values) and values[0] > 0, name


def test_generate_compares_two_continuations(run) -> None:
    metrics = run("task=generate", "task.max_new_tokens=6", "task.prompt='import os'")["metrics"]
    assert len(metrics["tokens"]["exact"]) == len(metrics["tokens"]["quantized"]) == 6
    assert 0 <= metrics["equal_tokens"] <= 6


def test_generate_counts_tokens_until_continuations_part(run, tmp_path) -> None:
    metrics = run(
        "task=generate", "task.max_new_tokens=8", "task.prompt_tokens=40", "task.count=3", "quant.bits=2"
    )["metrics"]
    records = json.loads((tmp_path / "items.json").read_text())
    assert len(records) == metrics["prompts"] == 3 and metrics["equal_tokens_mean"]["n"] == 3
    for record in records:
        exact, quantized, same = *record["tokens"].values(), record["equal_tokens"]
        assert exact[:same] == quantized[:same]
        assert record["diverged"] == (exact != quantized)
        if record["diverged"] and None not in record["first_diverging"]:
            assert exact[same] != quantized[same]


def test_generate_refuses_what_does_not_fit(run, tmp_path) -> None:
    with pytest.raises(DataError, match="shorten"):
        run("task=generate", "task.max_new_tokens=3000")
    assert load_result(tmp_path)["status"] == "failed"


def test_allocation_measures_every_way_at_every_length(run) -> None:
    result = run(
        "task=allocation", "task.lengths=[64,256]", "task.repeats=2", "task.channels=128", "task.head_dim=64"
    )
    assert set(result["metrics"]["append_s"]["cat_fp16"]) == {"64", "256"}
    assert result["figures"] == ["append.png"]


def test_quantize_measures_both_ways(run, monkeypatch) -> None:
    small = {"hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setattr(prefill_share, "SHAPE", {**prefill_share.SHAPE, **small, "vocab_size": 64})
    sizes = (
        "tokens=70",
        "channels=128",
        "repeats=1",
        "lengths=[64]",
        "length_channels=128",
        "decode_tokens=130",
    )
    metrics = run("task=quantize", *(f"task.{size}" for size in sizes))["metrics"]
    assert metrics["speedup"] > 0 and metrics["keys_blocks_s"] > 0
    assert metrics["prefill"]["tokens"] == 97 + 161 + 285 + 481


def test_a_pool_that_is_too_small_is_out_of_memory_in_the_result(run, tmp_path) -> None:
    with pytest.raises(Exception, match=r"missing.*cache.num_blocks"):
        run("cache.num_blocks=2", "batch.num_prompts=4")
    assert load_result(tmp_path)["status"] == "out_of_memory"


def test_prompts_beyond_the_context_are_refused(run) -> None:
    with pytest.raises(DataError, match=r"context of 2048, got 2040 \+ 64"):
        run("batch=uniform", "batch.prompt_tokens=2040", "batch.decode_tokens=64")


def test_a_calibration_folder_that_cannot_be_made_is_one_line(run, tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CalibrationError, match="calibration.dir") as caught:
        run(f"calibration.dir={tmp_path / 'file' / 'below'}")
    assert "\n" not in str(caught.value)


def test_a_machine_without_a_meter_still_says_what_it_estimates(run, monkeypatch) -> None:
    def no_counter(*args: object) -> None:
        raise MeterUnavailable("RAPL must be readable, got nothing")

    monkeypatch.setattr("kvquant.energy.opening.open_rapl", no_counter)
    table = run("energy.meter=auto", "batch.num_prompts=2", "task.repeats=1")["table"]
    rows = {row[0]: row for row in table["rows"]}
    *numbers, said = rows["energy of prefill"][1:]
    # Two estimates side by side would look like a comparison.
    assert numbers == ["", ""] and said.endswith("for both, estimated (CodeCarbon, CPU model)")


def test_history_measures_a_chunk_whose_memory_does_not_follow_what_is_stored(run) -> None:
    result = run(
        *("task=history", "task.lengths=[1024,4096]", "task.chunk_tokens=64", "task.compare_up_to=2048")
    )
    metrics = result["metrics"]
    assert result["status"] == "ok" and result["figures"] == ["history.png"]
    # The text goes on past the model's context.
    assert metrics["model"]["max_length"] < 4096
    extra, held = metrics["quantized"]["extra_bytes"], metrics["quantized"]["held_bytes"]
    assert set(extra) == {"1024", "4096"}
    assert set(metrics["exact"]["extra_bytes"]) == set(metrics["stock"]["chunk_s"]) == {"1024"}
    assert held["4096"] > 3.5 * held["1024"]
    # 2 heads of 64 channels, keys and values, fp32.
    layer_bytes = metrics["dequantized_layer_bytes"]
    assert layer_bytes["4096"] == 4096 * 2 * 2 * 64 * 4
    assert extra["4096"] - extra["1024"] < 0.05 * layer_bytes["4096"]
    assert extra["4096"] < layer_bytes["4096"]
    assert metrics["quantized"]["share_of_dequantized_layer"] < 0.05


SERVE = ("task=serve_trace", "batch=uniform", "batch.prompt_tokens=100", "batch.decode_tokens=6")


@pytest.mark.parametrize(
    ("requests", "budget_gib"), [(16, 0.0013), (9, 0.0005)], ids=["room for several", "one at a time"]
)
def test_serve_trace_loses_nobody_and_holds_three_times_as_many(run, requests, budget_gib) -> None:
    result = run(*SERVE, f"task.num_requests={requests}", f"task.memory_budget_gib={budget_gib}")
    exact, quantized = result["metrics"]["exact"], result["metrics"]["quantized"]
    for served in (exact, quantized):
        assert served["finished"] == requests
        assert served["lost"] == served["duplicated"] == served["wrong_token_count"] == 0
        assert served["blocks_left"] == served["chunks_left"] == served["sequences_left"] == 0
        assert served["pool_bytes"] <= budget_gib * 2**30
        assert 0 < served["ttft_s_p50"] <= served["ttft_s_p99"] and served["inter_token_s_p50"] > 0
        assert served["energy_kind"] == "estimated"
    # A request takes two blocks; both caches must let requests wait.
    assert exact["held_max"] == exact["num_blocks"][0] // 2 < requests
    assert exact["memory_bound_steps"] > 0 and quantized["waiting_max"] > 0
    assert quantized["held_max"] >= 3 * exact["held_max"]
    assert result["figures"] == ["serving.png"]


def test_serve_trace_replays_a_file_with_its_arrivals(run, tmp_path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [("18:15:46.6805900", 374, 44), ("18:15:50.9951690", 396, 109), ("18:16:10.0000000", 2000, 7)]
    lines = [f"2023-11-16 {at},{context},{new}" for at, context, new in rows]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    metrics = run(
        *("task=serve_trace", "batch=trace", f"batch.trace_path={trace}", "task.time_scale=2"),
        *("task.num_requests=3", "task.figures=false"),
    )["metrics"]
    assert metrics["requests"]["last_arrival_s"] == pytest.approx(2 * 23.31941)
    # 2,007 tokens become a tenth of the context of 2,048 (smoke).
    assert metrics["requests"]["longest_tokens"] in (204, 205)
    assert metrics["exact"]["makespan_s"] > 40 > metrics["exact"]["busy_s"]
    with pytest.raises(DataError, match="task.num_requests=3"):
        run("task=serve_trace", "batch=trace", f"batch.trace_path={trace}", "task.num_requests=4")


def test_serve_trace_refuses_a_budget_that_the_longest_request_does_not_fit(run, tmp_path) -> None:
    with pytest.raises(PoolExhausted, match="longest request"):
        run("task=serve_trace", "task.memory_budget_gib=0.0005", "task.num_requests=8")
    assert load_result(tmp_path)["status"] == "out_of_memory"
