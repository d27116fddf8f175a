"""A report over run directories made up for it: nothing mixed, nothing dropped silently, thousands in seconds."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from kvquant.cli import conf_dir
from kvquant.config import register_schemas
from kvquant.errors import ResultError
from kvquant.report.collect import collect
from kvquant.report.figures import pareto_front
from kvquant.report.quantities import FIGURES
from kvquant.report.series import Point, lines
from kvquant.report.tables import build_tables, latex, latex_escape, markdown
from kvquant.results import SCHEMA, load_result
from kvquant.slurm import JobState
from kvquant.sweeps import Point as SweepPoint
from kvquant.sweeps import Sweep, slug
from kvquant.tasks import run_task

PAPER_DATA = Path(__file__).resolve().parent.parent / "paper" / "data"
BY_NAME = {spec.name: spec for spec in FIGURES}


def write_run(
    folder: Path,
    *,
    status: str = "ok",
    task: str = "prefill",
    bits: int = 3,
    prompts: int = 8,
    model: str = "a" * 64,
    data: str = "d" * 64,
    device: str = "A100",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A run directory as the task ``prefill`` leaves it."""
    tokens = 500 * prompts
    result = {
        "schema": SCHEMA,
        "status": status,
        "task": task,
        "started_at": "2026-01-01T00:00:00+00:00",
        "duration_s": 1.0,
        "metrics": {
            "batch": {"prompts": prompts, "tokens": tokens, "lengths": [500] * prompts},
            "memory": {
                "exact": {"held_bytes": tokens * 1000, "effective_bits": 16.1},
                "quantized": {"held_bytes": tokens * 66 * bits, "effective_bits": bits + 0.9},
            },
            "quality": {"perplexity_exact": 20.0, "perplexity_quantized": 20.0 + 8 / 4**bits},
            "prefill": {"ttft_s_exact": 0.1 * prompts, "ttft_s_quantized": 0.12 * prompts},
            "decode": {"tokens_per_s_exact": 10.0, "tokens_per_s_quantized": 9.0},
        },
        "table": None,
        "figures": [],
        "error": {"type": "E", "message": "it broke", "traceback": ""} if status == "failed" else None,
        "config_hash": "0" * 16,
        "config": {
            "model": {"name": "tiny"},
            "data": {"name": "stdlib"},
            "quant": {"method": "nuq", "bits": bits},
            "cache": {"block_size": 64},
            "batch": {"num_prompts": prompts},
            "seed": seed,
            "tracking": {"name": "none"},
        },
        "provenance": {"model_hash": model, "data_hash": data, "device": device, "git_sha": "c" * 40},
        "nulls": {},
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def report(tmp_path: Path):
    def execute(*runs: Path | str) -> dict[str, Any]:
        register_schemas()
        names = ",".join(str(path) for path in runs)
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose(
                "config",
                overrides=["task=report", "device=cpu", "energy.meter=none", f"report.runs=[{names}]"],
            )
        run_task.execute(cfg, run_dir=tmp_path / "report", console=Console(quiet=True))
        return load_result(tmp_path / "report")

    return execute


def test_a_report_writes_every_format_and_links_numbers_to_runs(tmp_path: Path, report) -> None:
    for bits in (2, 3, 4):
        for prompts in (1, 8):
            write_run(tmp_path / "runs" / f"b{bits} n{prompts}", bits=bits, prompts=prompts)
    result = report(tmp_path / "runs")
    folder = tmp_path / "report"
    assert result["status"] == "ok" and result["metrics"]["by_status"] == {"ok": 6}
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    assert {(row["config.quant.bits"], row["metrics.batch.prompts"]) for row in rows} == {
        (b, n) for b in "234" for n in "18"
    }
    table = pyarrow.parquet.read_table(folder / "runs.parquet")
    assert table.num_rows == 6 and str(table.schema.field("metrics.prefill.ttft_s_exact").type) == "double"
    drawn = {"quality_bits", "speed_batch", "memory_tokens"}
    assert {Path(name).stem for name in result["figures"]} == drawn
    for name in drawn:
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (folder / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
    page = (folder / "report.html").read_text()
    links = set(re.findall(r'href="([^"]+)"', page))
    assert len(links) == 6 and all((folder / link.replace("%20", " ")).is_file() for link in links)
    assert not re.search(r'(src|href)="https?:', page), "the page must need nothing else"
    assert "| 2 | 1 | 2.900 |" in (folder / "tables.md").read_text()
    assert r"\begin{tabular}" in (folder / "tables.tex").read_text()


@pytest.mark.parametrize(
    "other",
    [{"model": "b" * 64}, {"data": "e" * 64}, {"device": "H100"}, {"provenance_sha": "f" * 40}],
    ids=lambda change: next(iter(change)),
)
def test_runs_of_different_origin_never_share_a_line_or_a_table(tmp_path: Path, other: dict) -> None:
    sha = other.pop("provenance_sha", None)
    for prompts in (1, 2, 4):
        write_run(tmp_path / f"one-{prompts}", prompts=prompts)
        folder = write_run(tmp_path / f"two-{prompts}", prompts=prompts, **other)
        if sha:
            result = json.loads((folder / "result.json").read_text())
            result["provenance"]["git_sha"] = sha
            (folder / "result.json").write_text(json.dumps(result))
    runs = collect([str(tmp_path)]).ok
    for spec in FIGURES:
        for panel in spec.panels:
            for line in lines(runs, panel.variants, spec.axis):
                named = {run.folder.name[:3] for point in line.points for run in point.runs}
                assert len(named) == 1, f"{spec.name}: {line.label}"
    tables = build_tables(runs)
    assert len(tables) == 2 and tables[0].title != tables[1].title


def test_settings_beside_the_axis_make_lines_of_their_own_and_name_them(tmp_path: Path) -> None:
    for bits in (2, 3):
        for prompts in (1, 2):
            write_run(tmp_path / f"{bits}-{prompts}", bits=bits, prompts=prompts)
    spec = BY_NAME["speed_batch"]
    found = lines(collect([str(tmp_path)]).ok, spec.panels[0].variants, spec.axis)
    # The exact cache does not depend on the bits of the other one.
    assert [line.label for line in found] == ["exact", "quantized, bits=2", "quantized, bits=3"]
    assert [len(point.runs) for point in found[0].points] == [2, 2]


def test_seeds_are_repeats_of_one_point(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        folder = write_run(tmp_path / str(seed), seed=seed)
        result = json.loads((folder / "result.json").read_text())
        result["metrics"]["prefill"]["ttft_s_quantized"] = 1.0 + seed
        (folder / "result.json").write_text(json.dumps(result))
    spec = BY_NAME["speed_batch"]
    quantized = lines(collect([str(tmp_path)]).ok, spec.panels[0].variants, spec.axis)[1]
    (point,) = quantized.points
    assert (point.low, point.y, point.high, len(point.runs)) == (1, 2, 3, 3)


def test_only_runs_that_ended_well_give_numbers_and_the_others_are_named(tmp_path: Path, report) -> None:
    write_run(tmp_path / "runs" / "good")
    write_run(tmp_path / "runs" / "failed", status="failed")
    write_run(tmp_path / "runs" / "running", status="running")
    result = report(tmp_path / "runs")
    assert result["metrics"]["by_status"] == {"ok": 1, "failed": 1, "running": 1}
    assert len((tmp_path / "report" / "runs.csv").read_text().splitlines()) == 4
    assert "it broke" in json.dumps(result["table"])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "it broke" in page and page.count("0.960") == 1


@pytest.mark.parametrize(
    "text", ["", '{"schema": "kvq', '{"schema": "somebody/1"}', "[1]", "\x00\x01", '{"schema": null}']
)
def test_broken_and_foreign_files_are_named_counted_and_left_out(tmp_path: Path, report, text: str) -> None:
    write_run(tmp_path / "runs" / "good")
    bad = tmp_path / "runs" / "bad" / "result.json"
    bad.parent.mkdir()
    bad.write_text(text)
    result = report(tmp_path / "runs")
    assert (result["metrics"]["runs"], result["metrics"]["left_out"]) == (1, 1)
    assert str(bad) in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("content", ["nothing", "only foreign"])
def test_a_report_over_nothing_is_one_line(tmp_path: Path, report, content: str) -> None:
    (tmp_path / "runs").mkdir()
    if content == "only foreign":
        (tmp_path / "runs" / "result.json").write_text("{}")
    with pytest.raises(ResultError, match="at least one run directory, got none under.*try report.runs"):
        report(tmp_path / "runs")
    assert load_result(tmp_path / "report")["status"] == "failed"


def test_a_half_finished_sweep_names_its_missing_points(tmp_path: Path, report) -> None:
    sweep = tmp_path / "multirun" / "sweep"
    write_run(sweep / "bits=2-aa", bits=2)
    write_run(sweep / "bits=3-bb", status="running")
    points = [SweepPoint(f, [f"quant.{f[:6]}"], "0") for f in ("bits=2-aa", "bits=3-bb", "bits=4-cc")]
    Sweep("grid", "athena", {}, points, "2026-01-01").save(sweep)
    result = report(tmp_path / "multirun")
    assert result["metrics"]["missing"] == 1 and result["metrics"]["by_status"] == {"ok": 1, "running": 1}
    assert "quant.bits=4" in (tmp_path / "report" / "report.html").read_text()


def test_the_terminal_gets_fifty_lines_and_the_page_all(tmp_path: Path, report) -> None:
    points = [SweepPoint(f"p{i}", [f"a={i}"], str(i)) for i in range(300)]
    Sweep("grid", "athena", {}, points, "2026-01-01").save(tmp_path / "runs")
    write_run(tmp_path / "runs" / "p0")
    result = report(tmp_path / "runs")
    assert result["metrics"]["missing"] == 299 and len(result["table"]["rows"]) == 51
    assert "a=299" in (tmp_path / "report" / "report.html").read_text()


def test_a_point_killed_outright_is_lost_with_the_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "bits=3-bb", status="running")
    point = SweepPoint("bits=3-bb", [], "0", job_id="7_0", ended="OUT_OF_MEMORY")
    Sweep("grid", "athena", {}, [point], "2026-01-01").save(tmp_path)
    found = collect([str(tmp_path)])
    assert found.status(found.runs[0]) == "lost" and found.lost[tmp_path / "bits=3-bb"] == "OUT_OF_MEMORY"


def test_slurm_is_asked_about_a_sweep_that_nobody_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {
        "7_0": JobState("CANCELLED", "0:15"),
        "7_1": JobState("RUNNING", "0:0"),
        "7_2": JobState("PENDING", "0:0"),
    }
    monkeypatch.setattr("kvquant.sweep_plan.job_states", lambda ids: {i: states[i] for i in ids})
    points = [SweepPoint(f"p{i}", [f"a={i}"], str(i), job_id=f"7_{i}") for i in range(3)]
    for point in points[:2]:
        write_run(tmp_path / point.folder, status="running")
    Sweep("grid", "athena", {}, points, "2026-01-01").save(tmp_path)
    found = collect([str(tmp_path)])
    assert [found.status(run) for run in found.runs] == ["lost", "running"]
    assert found.missing == [(tmp_path / "p2", "a=2 (Slurm: PENDING, exit code 0:0)")]


def test_reports_are_not_runs(tmp_path: Path, report) -> None:
    write_run(tmp_path / "runs" / "good")
    write_run(tmp_path / "runs" / "earlier report", task="report")
    assert report(tmp_path / "runs")["metrics"]["runs"] == 1


def test_a_thousand_runs_are_read_without_looking_into_them(tmp_path: Path) -> None:
    for index in range(1000):
        folder = write_run(tmp_path / str(index % 10) / str(index), seed=index)
        (folder / "wandb").mkdir()
    assert len(collect([str(tmp_path)]).ok) == 1000


def test_the_pareto_front_holds_what_no_other_beats() -> None:
    points = [Point(x, y, y, y, ()) for x, y in [(2, 9), (3, 7), (3, 8), (4, 7.5), (5, 5)]]
    assert [(p.x, p.y) for p in pareto_front(points)] == [(2, 9), (3, 7), (5, 5)]


def test_methods_that_one_run_compared_are_rows_and_points_of_their_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", task="compare")
    result = json.loads((folder / "result.json").read_text())
    result["metrics"] = {
        "variants": {
            f"m{bits}": {"effective_bits": bits, "perplexity": 20 + 1 / bits, "kl": {"estimate": 0.1 / bits}}
            for bits in (2, 3)
        }
    }
    (folder / "result.json").write_text(json.dumps(result))
    runs = collect([str(tmp_path)]).ok
    (table,) = build_tables(runs)
    assert [[cell.text for cell in row[:3]] for row in table.rows] == [
        ["m2", "2.000", "20.500"],
        ["m3", "3.000", "20.333"],
    ]
    spec = BY_NAME["quality_bits"]
    (line,) = lines(runs, spec.panels[0].variants, spec.axis)
    assert [point.x for point in line.points] == [2, 3]


def test_latex_and_markdown_survive_what_names_contain(tmp_path: Path) -> None:
    write_run(tmp_path / "a", device="GPU_1 & 50% #2 | x")
    (table,) = build_tables(collect([str(tmp_path)]).ok)
    assert latex_escape("a_b & 50% ~^\\") == (
        r"a\_b \& 50\% \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )
    assert latex(table).count("\\\\") == 2
    assert len({line.count("|") for line in markdown(table).splitlines() if line.startswith("|")}) == 1


def test_a_slug_is_readable_and_safe() -> None:
    assert (
        slug(["quant.bits=3", "+experiment=[a,b]", "hydra/launcher=x"])
        == "bits=3,experiment=_a,b_,launcher=x"
    )
    assert (
        slug([f"task.prompt={'x/' * 200}"]).startswith("prompt=x_x_") and len(slug(["k=" + "v" * 500])) == 80
    )


def test_energy_and_kernel_runs_have_figures_and_rows_of_their_own(tmp_path: Path, report) -> None:
    # A run on an H200: one point, of whose caches one is made invalid.
    kept = tmp_path / "energy.json"
    energy = json.loads((PAPER_DATA / "energy_h200_prefill.json").read_text())
    energy["metrics"]["points"][0]["variants"]["nuq4"]["faults"] = ["it slowed down"]
    kept.write_text(json.dumps(energy))
    rows = [
        {
            "operation": operation,
            "shape": "llama31_8b",
            "label": f"8x{tokens}",
            "bits": bits,
            "batch": 8,
            "tokens": tokens,
            "is_trace": False,
            "us": 100.0,
            "bytes": 2_500_000,
            "copy_fraction": 0.25,
            "speedup_over_full_precision": 0.5,
        }
        for operation in ("write_keys", "decode")
        for tokens in (2048, 32768)
        for bits in (2, 4)
    ]
    write_run(tmp_path / "runs" / "kernels", task="kernels", metrics={"rows": rows})
    figures = set(report(tmp_path / "runs", kept)["figures"])
    assert {"energy.png", "energy.pdf", "kernels.png", "kernels.pdf"} <= figures
    (table,) = build_tables(collect([str(tmp_path / "runs")]).ok)
    assert [cell.text for cell in table.rows[0]][:9] == (
        ["write_keys", "llama31_8b", "8x2048", "2", "100", "2.5", "", "25.0", "0.50"]
    )


def test_outlier_fractions_compared_in_one_run_are_lines_by_method_and_width(tmp_path: Path) -> None:
    variants = {
        f"{method}{bits}-{fraction}": {
            "method": method,
            "key_bits": bits,
            "value_bits": bits,
            "outlier_fraction": fraction,
            "effective_bits": bits + 40 * fraction,
            "perplexity_excess_percent": {"estimate": 10 - 100 * fraction},
        }
        for method in ("nuq", "uniform")
        for bits in (2, 3)
        for fraction in (0.0, 0.01, 0.05)
    }
    exact = {
        "method": "none",
        "key_bits": 3,
        "value_bits": 3,
        "outlier_fraction": 0.01,
        "effective_bits": 16.0,
    }
    metrics = {"variants": {"exact": exact, **variants}}
    write_run(tmp_path / "run", task="compare", metrics=metrics)
    spec = BY_NAME["outlier_fraction"]
    for panel, last in zip(spec.panels, (4.0, 5.0), strict=True):
        found = lines(collect([str(tmp_path)]).ok, panel.variants, spec.axis)
        assert [series.label for series in found] == [
            f"{method}, {bits} bits" for method in ("nuq", "uniform") for bits in (2, 3)
        ]
        assert all([p.x for p in series.points] == [0.0, 0.01, 0.05] for series in found)
        assert found[0].points[-1].y == pytest.approx(last)
