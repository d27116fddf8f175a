"""``task=energy`` from its command line to its result: estimates, recorded counters, points that do not fit."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console

from kvquant.cli import conf_dir
from kvquant.config import register_schemas, validate
from kvquant.energy import CarbonIntensity, CounterLimits, Sample, Window
from kvquant.energy.fleet import FleetLoad, assumptions_text, fleet_bill
from kvquant.energy.protocol import FilledWindow
from kvquant.energy.sampling import SampledMeter, ThreadSampler
from kvquant.errors import ConfigError, MeterUnavailable, PoolExhausted
from kvquant.models import quantized_kv_cache
from kvquant.models.decode_graph import DecodeGraph
from kvquant.results import load_result
from kvquant.tasks import energy, energy_loads, run_task
from kvquant.tasks.energy_loads import LoadShelf, ModelLoad, Point
from kvquant.tasks.energy_summary import compare_point, energy_table, summarize_variant
from small_models import exact, prompts_of, small_model

GRID = CarbonIntensity(662.0, "test grid", pue=1.5)
QUICK = (
    "task=energy",
    "task.windows=2",
    "task.window_s=0.1",
    "task.idle_s=0.1",
    "task.warmup_s=0.1",
    "task.cooldown_s=0",
    "task.prompt_tokens=[40]",
    "task.batch_sizes=[2]",
    "task.decode_steps=2",
)


def composed(calibration_dir: Path, *overrides: str) -> DictConfig:
    register_schemas()
    always = ["experiment=smoke", "device=cpu", "energy.meter=constant", f"calibration.dir={calibration_dir}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=[*always, *overrides])


@pytest.fixture(scope="module")
def calibration_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture
def run(calibration_dir, tmp_path):
    def execute(*overrides: str) -> dict:
        other_task = any(override.startswith("task=") for override in overrides)
        cfg = composed(calibration_dir, *(() if other_task else QUICK), *overrides)
        run_task.execute(cfg, run_dir=tmp_path, console=Console(quiet=True))
        return load_result(tmp_path)

    return execute


def counter_meter(name: str, **kwargs) -> SampledMeter:
    """A counter of 200 W that is as fresh as its reading, as if measured."""

    def read() -> Sample:
        now_s = time.perf_counter()
        return Sample(now_s, 200.0 * now_s, {"instant": 200.0})

    limits = CounterLimits(0.0, 1000.0)
    return SampledMeter("recorded", "measured", GRID, ThreadSampler(read), limits, poll_s=0.01)


def test_an_estimate_says_so_and_compares_nothing(run, tmp_path) -> None:
    result = run()
    metrics = result["metrics"]
    assert metrics["meter"]["kind"] == "estimated"
    assert result["table"]["title"].startswith("tiny: estimated (constant 65 W, not a meter); ")
    assert {p["phase"] for p in metrics["points"]} == {"prefill", "decode"}
    for point in metrics["points"]:
        assert set(point["variants"]) == {"none", "nuq3"}
        assert point["variants"]["nuq3"]["j_per_token_mean"] > 0
        assert "total" not in point["ratios"]["nuq3"] and point["headline"] == {}
    assert metrics["fleet"]["rows"] == [] and "skipped" in metrics["load"]
    windows = json.loads((tmp_path / "windows.json").read_text())
    assert len([w for w in windows if w["name"] in ("prefill", "decode")]) == 2 * 2 * 2
    assert all("estimated" in w["faults"][0] for w in windows)


def test_a_measured_run_gives_ratios_and_says_why_they_are_no_headline(run, monkeypatch) -> None:
    monkeypatch.setattr("kvquant.energy.open_meter", counter_meter)
    threads = set(threading.enumerate())
    metrics = run("task.bits=[4,2]", "task.load_size=64")["metrics"]
    assert not {t.name for t in set(threading.enumerate()) - threads} & {"kvquant-energy"}
    assert metrics["idle"]["power_w"] == pytest.approx(200, rel=1e-3)
    assert abs(metrics["agreement"]["disagreement_percent"]) < 0.1
    for point in metrics["points"]:
        for name in ("nuq4", "nuq2"):
            ratio = point["ratios"][name]
            assert ratio["total"]["n"] == 2 and ratio["total"]["low"] <= ratio["total"]["high"]
            assert "fewer than 5 windows" in ratio["faults"] and "window shorter than 5 s" in ratio["faults"]
        assert point["headline"] == {}
        for cell in point["variants"].values():
            # By hand: 200 J for each second of a token.
            seconds = sum(cell["s_per_token"]) / 2
            assert cell["j_per_token_mean"] == pytest.approx(200 * seconds, rel=0.01)
            grams = cell["j_per_token_mean"] * 1e6 / 3.6e6 * 662 * 1.5
            assert cell["gco2e_per_million_tokens"] == pytest.approx(grams)
            assert cell["energy_delay_js"] == pytest.approx(200 * seconds**2, rel=0.02)
    # A machine that draws as much at work as at rest: nothing is above idle.
    assert all(abs(j) < 1 for j in metrics["load"]["above_idle_j"])
    # Windows of a tenth of a second are no basis for a fleet.
    assert metrics["fleet"]["rows"] == []


def test_every_task_says_what_it_took_also_when_it_fails(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("kvquant.energy.open_meter", counter_meter)
    result = run("task=generate", "task.max_new_tokens=2")
    block = result["metrics"]["run_energy"]
    assert block["energy_j"] == pytest.approx(200 * block["energy_window_s"], rel=0.01)
    assert block["energy_kind"] == "measured" and block["carbon_gco2e"] > 0
    assert block["faults"] in ([], ["window shorter than 5 s"])
    with pytest.raises(PoolExhausted):
        run("task=prefill", "cache.num_blocks=1")
    failed = load_result(tmp_path)
    assert failed["status"] == "out_of_memory" and failed["metrics"]["run_energy"]["energy_j"] > 0
    assert "kvquant-energy" not in {thread.name for thread in threading.enumerate()}


def test_a_point_that_does_not_fit_is_told_and_the_rest_measured(run) -> None:
    # Four blocks hold two prompts of 40 tokens and not eight.
    points = run("cache.num_blocks=4", "task.batch_sizes=[2,8]", "task.phases=[decode]")["metrics"]["points"]
    assert "j_per_token_mean" in points[0]["variants"]["none"]
    for cell in points[1]["variants"].values():
        assert "cache.num_blocks" in cell["does_not_fit"]


class CrowdedLoad:
    """A load of which no more than ``most`` can exist at once."""

    most, made = 2, 0
    alive: weakref.WeakSet

    def __init__(self) -> None:
        if len(self.alive) >= self.most:
            raise PoolExhausted("no room")
        self.alive.add(self)
        type(self).made += 1

    @contextlib.contextmanager
    def ready(self):
        yield lambda: None


@pytest.mark.parametrize(("most", "made"), [(2, 2), (1, 6)], ids=["both fit", "one at a time"])
def test_loads_are_kept_while_all_fit(most: int, made: int) -> None:
    kind = type("Load", (CrowdedLoad,), {"most": most, "alive": weakref.WeakSet()})
    shelf = LoadShelf(lambda name: kind(), torch.device("cpu"))
    for name in "abbaab":
        with shelf.ready(name) as work:
            work()
            assert 1 <= len(kind.alive) <= most
    assert kind.made == made
    shelf.clear()
    assert not kind.alive


def test_a_load_that_does_not_fit_alone_says_so() -> None:
    kind = type("Load", (CrowdedLoad,), {"most": 0, "alive": weakref.WeakSet()})
    with pytest.raises(PoolExhausted), LoadShelf(lambda name: kind(), torch.device("cpu")).ready("a"):
        pass


def test_captured_decoding_repeats_the_same_steps(monkeypatch) -> None:
    """A load fills its cache piece by piece, and records its steps once."""
    model, recorded = small_model("llama-gqa-llama3"), []

    def record(work):
        recorded.append(work)
        return work

    monkeypatch.setattr(energy_loads, "DecodeGraph", functools.partial(DecodeGraph, record=record))
    monkeypatch.setattr(energy_loads, "FILL_TOKENS", 100)
    settings = {"block_size": 64, "num_blocks": None, "memory_budget_gib": None}
    bench = SimpleNamespace(model=model, cache_settings=lambda: dict(settings))
    prompts, point = prompts_of([40, 40, 40]), Point("decode", 3, 40)
    load = ModelLoad(bench, SimpleNamespace(quantizers=exact(model)), point, prompts, 4, cuda_graph=True)
    with torch.inference_mode(), quantized_kv_cache(model, exact(model)) as kv:
        expected = kv.new_cache(num_blocks=6, max_sequences=3).append(prompts).argmax(-1)
    assert torch.equal(load._first, expected)
    for _ in range(2):
        with load.ready() as work:
            work()
        assert isinstance(work, DecodeGraph) and len(recorded) == 1
        first, *_ = work.tokens.T
        assert len(work.tokens.T) == 4 and torch.equal(work._first, expected) and len(first) == 3


def filled(joules: list[float], repetitions: int = 10) -> list[FilledWindow]:
    return [
        FilledWindow(Window("prefill", "m", "measured", GRID, 6.0, j, tick_s=0.1), repetitions)
        for j in joules
    ]


def test_a_sound_series_is_a_headline() -> None:
    exact = summarize_variant(filled([1000, 1010, 990, 1005, 995]), tokens=100, idle_w=50.0)
    method = summarize_variant(filled([800, 809, 791, 805, 796]), tokens=100, idle_w=50.0)
    assert exact["j_per_token_mean"] == pytest.approx(1.0)
    assert exact["above_idle_j_per_token_mean"] == pytest.approx(1.0 - 50 * 6 / 1000)
    assert exact["power_w"] == pytest.approx(1000 / 6)
    # By hand: 1 J a token, 6 s for 1,000 tokens, 662 g/kWh at a PUE of 1.5.
    assert exact["energy_delay_js"] == pytest.approx(0.006)
    assert exact["gco2e_per_million_tokens"] == pytest.approx(1e6 / 3.6e6 * 1.5 * 662)
    point = compare_point({"none": exact, "nuq3": method}, "none")
    assert point["headline"]["nuq3"]["value"] == pytest.approx(0.8, abs=1e-3)
    assert point["ratios"]["nuq3"]["above_idle"]["value"] == pytest.approx(500 / 700, abs=2e-3)
    shared = summarize_variant(filled([800] * 5), tokens=100, idle_w=50.0, mig=True)
    assert compare_point({"none": exact, "nuq3": shared}, "none")["headline"] == {}


def fleet_points(**cell) -> list[dict]:
    return [
        {
            "phase": phase,
            "batch": 8,
            "prompt_tokens": length,
            "variants": {"none": {"j_per_token_mean": j, "energy_kind": "measured", "faults": [], **cell}},
        }
        for phase, length, j in [
            ("prefill", 500, 0.1),
            ("prefill", 1500, 0.3),
            ("decode", 500, 1.0),
            ("decode", 1500, 3.0),
        ]
    ]


def test_the_fleets_bill_can_be_done_by_hand() -> None:
    load = FleetLoad(3600, [0.0, 1.0], [1000, 1000], [200, 200])
    table = fleet_bill(fleet_points(), load, GRID)
    (row,) = table["rows"]
    # 1,000 prompt tokens at 0.2 J and 200 answer tokens at 2 J: 600 J; 3,600 of them are 0.6 kWh, times PUE.
    assert row["j_per_request"] == pytest.approx(600)
    assert row["kwh_per_day"] == pytest.approx(0.9)
    assert row["kgco2e_per_day"] == pytest.approx(0.9 * 0.662)
    assert assumptions_text(table["assumptions"]).startswith(
        "3,600 requests a day of 1000 prompt and 200 answer tokens on average; prefill measured at 500, 1500 prompt tokens; "
        "decode measured at 500, 1500 prompt tokens, between lengths interpolated and beyond them as at the nearest; what "
    )
    assert assumptions_text(table["assumptions"]).endswith("; 662 g/kWh (test grid), PUE 1.5")


def test_a_fleet_of_captured_steps_says_what_they_leave_out() -> None:
    points = [{**p, "captured": True} if p["phase"] == "decode" else p for p in fleet_points()]
    bill = fleet_bill(points, FleetLoad(3600, [0.0, 1.0], [1000, 1000], [200, 200]), GRID)
    text = assumptions_text(bill["assumptions"])
    assert (
        "decode (CUDA graph) measured at 500, 1500 prompt tokens without the host's part of a decoding step"
        in text
    )


def test_a_fleet_of_batches_measured_at_different_lengths_says_which() -> None:
    load = FleetLoad(3600, [0.0, 1.0], [1000, 1000], [200, 200])
    more = [{**p, "batch": 32} for p in fleet_points() if p["prompt_tokens"] == 500]
    # One sequence was decoded alone: it has no row, and no part in the text.
    alone = [{**p, "batch": 1} for p in fleet_points() if p["phase"] == "decode"]
    bill = fleet_bill([*fleet_points(), *more, *alone], load, GRID)
    assert [row["batch"] for row in bill["rows"]] == [8, 32]
    assert bill["assumptions"]["joules_per_token"].startswith(
        "prefill measured at 500, 1500 (batch 8) and 500 (batch 32) prompt tokens; decode measured at 500, 1500 (batch 8) "
        "and 500 (batch 32) prompt tokens, between"
    )


@pytest.mark.parametrize("cell", [{"faults": ["fewer than 5 windows"]}, {"energy_kind": "estimated"}])
def test_a_fleet_is_never_billed_by_invalid_figures(cell: dict) -> None:
    load = FleetLoad(3600, [0.0, 1.0], [1000, 1000], [200, 200])
    assert fleet_bill(fleet_points(**cell), load, GRID)["rows"] == []
    # Nor by one phase alone.
    assert fleet_bill(fleet_points()[:2], load, GRID)["rows"] == []


def test_reasons_are_numbered_under_the_table(calibration_dir) -> None:
    cell = summarize_variant(filled([1000] * 3), tokens=100, idle_w=None)
    point = {"phase": "prefill", "batch": 1, "prompt_tokens": 64, "variants": {"none": cell}, "ratios": {}}
    metrics = {
        "meter": {"kind": "measured", "source": "m", "systematic_percent": 5.0},
        "carbon": {"g_per_kwh": 662.0, "source": "grid", "pue": 1.0},
        "points": [point],
        "fleet": {"rows": [], "assumptions": {}},
    }
    title, columns, rows = energy_table(metrics, composed(calibration_dir, *QUICK))
    assert "systematic +-5% beside every interval" in title
    assert rows[0][-1] == "no (1)" and rows[1][0] == "(1) fewer than 5 windows"
    assert all(len(row) == len(columns) for row in rows)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.phases=[prefil]", "task.phases must be prefill, decode or both"),
        ("task.bits=[9]", "task.bits must be widths from 1 to 8"),
        ("task.batch_sizes=[]", "task.batch_sizes must be 1 or more each"),
        ("task.prompt_tokens=[0]", "task.prompt_tokens must be 1 or more each"),
        ("task.windows=1", "task.windows must be 2 or more"),
        ("task.window_s=0", "task.window_s must be above 0 seconds"),
        ("task.fleet_levels=[0.5,0.2]", "task.fleet_levels must be rising"),
        ("task.fleet_generated_tokens=[5]", "task.fleet_generated_tokens must be as long as"),
        ("task.cuda_graph=true", "task.cuda_graph must be false with device=cpu"),
        ("energy.pue=0.9", "energy.pue must be 1 or more"),
        ("energy.g_per_kwh=-1", "energy.g_per_kwh must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(calibration_dir, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(composed(calibration_dir, *QUICK, override))
    assert message in str(error.value) and "; try " in str(error.value)


def test_a_stopped_run_keeps_whole_rounds_and_measures_the_rest(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("kvquant.energy.open_meter", counter_meter)
    real, calls = energy.fill_window, []

    def stopping(meter, name, *args, **kwargs):
        calls.append(name)
        # The second cache of the first point's second round.
        if calls.count("prefill") == 4:
            raise KeyboardInterrupt
        return real(meter, name, *args, **kwargs)

    monkeypatch.setattr(energy, "fill_window", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("task.load_size=64")
    monkeypatch.setattr(energy, "fill_window", real)
    (path,) = tmp_path.glob("items/*/prefill-2x40-round0.item.json")
    kept = json.loads(path.read_text())["values"]
    assert not list(tmp_path.glob("items/*/prefill-2x40-round1.item.json")), "half a round is no item"
    result = run("task.load_size=64")
    # The load's line and one round.
    assert result["provenance"]["resumed_items"] == 2
    point = result["metrics"]["points"][0]
    assert set(kept["caches"]) == set(point["variants"]) == {"none", "nuq3"}
    for name, cell in kept["caches"].items():
        assert point["variants"][name]["energy_j"][0] == cell["window"]["energy_j"]
        assert len(point["variants"][name]["energy_j"]) == 2
    windows = json.loads((tmp_path / "windows.json").read_text())
    assert len([w for w in windows if w["name"] in ("prefill", "decode")]) == 2 * 2 * 2
    assert len([w for w in windows if w["name"] == "load"]) == len(energy.LOAD_STEPS)


def test_a_window_comes_back_as_it_was() -> None:
    window = Window("decode", "m", "measured", GRID, 6.0, 12.5, None, 0.1, {"instant": 12.0}, {"x": [1]}, {})
    failed = Window("decode", "m", "measured", GRID, 6.0, failure=MeterUnavailable("the counter stood still"))
    for one in (window, failed):
        again = Window.from_item(json.loads(json.dumps(one.as_item())))
        assert again.as_metrics() == one.as_metrics() and type(again.failure) is type(one.failure)
        assert (again.tick_s, again.state, again.polled_j) == (one.tick_s, one.state, one.polled_j)
