"""The paper: no number typed by hand, every number traced, every named function and every reference there."""

from __future__ import annotations

import importlib
import json
import re
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from kvquant.report.collect import Run, collect
from kvquant.report.paper import tex
from kvquant.report.paper.build import used_commands, write_paper
from kvquant.report.paper.macros import fill
from kvquant.report.paper.registry import MACROS
from kvquant.report.paper.sources import SOURCES, choose

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "paper"
SECTIONS = sorted((PAPER / "sections").glob("*.tex"))
sys.path.insert(0, str(PAPER))
import check_log  # noqa: E402

# Names that hold digits, and nothing that could be a result.
ALLOWED = (
    "Llama-2-7B-32K",
    "Llama-2-7B",
    "Llama-3.1-8B",
    "A100",
    r"\_a100",
    r"CO\textsubscript{2}",
    "icml2026",
)
REFERENCES = (
    r"\\(?:cite[tp]?|ref|eqref|label|input|fn|setting|generatedtable|generatedfigure|url|href)\*?\{[^}]*\}"
)
DIMENSION = r"\d*\.?\d+\s*(?:pt|in|em|ex|cm|mm|pc|\\linewidth|\\textwidth|\\columnwidth)(?![a-z])"
# A formula's constants: 8 bits make a byte, 100 a per cent.
CONSTANT = r"(?<![\d.,])(?:[0128]|100)(?![\d.,]*\d|\s*\\times|\s*\\?%)"
MATHS = (r"\\begin\{(equation|align)\}.*?\\end\{\1\}", r"(?<!\\)\$[^$]*\$")


def literals(source: str) -> list[str]:
    """Every digit of a source that may be a result, with what stands around it."""
    text = re.sub(r"(?<!\\)%.*", "", source)
    text = re.sub(r"\\published\{[^}]*\}\{[^}]*\}", " ", text)
    for name in ALLOWED:
        text = text.replace(name, " ")
    text = re.sub(REFERENCES, " ", text)
    text = re.sub(DIMENSION, " ", text)
    for pattern in MATHS:
        text = re.sub(pattern, lambda m: re.sub(CONSTANT, "", m.group()), text, flags=re.DOTALL)
    return [
        text[max(0, m.start() - 30) : m.end() + 20].replace("\n", " ")
        for m in re.finditer(r"\d[\d.,]*", text)
    ]


@pytest.mark.parametrize("path", [PAPER / "main.tex", *SECTIONS], ids=lambda path: path.name)
def test_no_result_is_typed_by_hand(path: Path) -> None:
    assert literals(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "is_literal"),
    [
        ("perplexity rises by 1.59 per cent", True),
        ("it is $4.2\\times$ smaller", True),
        ("it is $2\\times$ smaller", True),
        ("a loss of $2\\%$", True),
        ("of 24 pass keys", True),
        ("$x = 0.75$", True),
        ("\\begin{equation} y = 37 x \\end{equation}", True),
        ("$(1 - f/2)$ and $2n$ and $C = 2^b$", False),
        ("\\begin{equation} 8 \\lceil \\mu / 8 \\rceil \\end{equation}", False),
        ("see Table~\\ref{tab:a1} \\citep{hooper2024kvquant} % 12 comments", False),
        ("\\vskip 0.3in on an A100 with \\NuqThreeExcessPpl{}", False),
        ("\\published{5.12}{hooper2024kvquant} in half precision", False),
    ],
)
def test_the_scan_tells_results_from_formulas(text: str, is_literal: bool) -> None:
    assert bool(literals(text)) == is_literal


def test_every_command_of_the_text_is_defined_and_names_are_unique() -> None:
    names = [macro.name for macro in MACROS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Z][A-Za-z]+", name) for name in names)
    assert {macro.source for macro in MACROS} <= {source.name for source in SOURCES}
    latex = {"IfFileExists", "Bigl", "Bigr", "DeclareUrlCommand", "Large"}
    unknown = {name for name in used_commands(PAPER) if name[0].isupper()} - set(names) - latex
    assert unknown == set()


def test_a_macro_is_followed_by_braces_so_that_no_space_is_lost() -> None:
    names = "|".join(sorted((macro.name for macro in MACROS), key=len, reverse=True))
    for path in SECTIONS:
        assert re.findall(rf"\\(?:{names})(?![A-Za-z]|\{{\}})", path.read_text()) == [], path.name


@pytest.mark.parametrize(
    "name", sorted({n for p in SECTIONS for n in re.findall(r"\\fn\{([^}]*)\}", p.read_text())})
)
def test_every_named_function_exists(name: str) -> None:
    if "triton_kernels" in name:
        pytest.importorskip("triton")
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(["kvquant", *parts[:split]]))
        except ModuleNotFoundError:
            continue
        reduce(getattr, parts[split:], module)
        return
    pytest.fail(f"kvquant.{name} is no function of a module")


def test_references_are_complete_and_each_is_cited() -> None:
    bib = (PAPER / "references.bib").read_text()
    entries = {m.group(1): m.group(2) for m in re.finditer(r"@\w+\{(\w+),(.*?)\n\}", bib, re.DOTALL)}
    assert len(entries) == bib.count("\n@")
    checked = re.findall(r"^% checked: \S.*\n@\w+\{(\w+),", bib, re.MULTILINE)
    assert checked == list(entries), "each entry says where it was looked up"
    for key, body in entries.items():
        fields = set(re.findall(r"^\s*(\w+) = \{", body, re.MULTILINE))
        assert {"title", "author", "year"} <= fields and fields & {"booktitle", "journal", "note"}, key
        (year,) = re.findall(r"year = \{(\d{4})\}", body)
        assert year in key, f"{key} is of {year}"
    text = "".join(path.read_text() for path in SECTIONS)
    cited = {k.strip() for m in re.findall(r"\\cite[tp]\{([^}]*)\}", text) for k in m.split(",")}
    cited |= set(re.findall(r"\\published\{[^}]*\}\{(\w+)\}", text))
    assert cited == set(entries)


def run_of(tmp_path: Path, task: str, metrics: dict[str, Any], config: dict[str, Any], **changes: Any) -> Run:
    result = {
        "task": task,
        "status": "ok",
        "started_at": "2026-01-01T00:00:00+00:00",
        "duration_s": 1.0,
        "metrics": metrics,
        "config": config,
        "table": {"title": "t", "columns": ["", "50% & more"], "rows": [["a_b", None], ["p", "<0.001"]]},
        "provenance": {"git_sha": "c" * 40, "git_dirty": False, "device": "GPU_1", "overrides": ["task=x"]},
        **changes,
    }
    return Run(tmp_path / "run", result)


def interval(value: float) -> dict[str, float]:
    return {"estimate": value, "low": value - 0.5, "high": value + 0.5}


def compared(*labels: str) -> dict[str, Any]:
    entry = {
        "effective_bits": 3.6,
        "perplexity_excess_percent": interval(1.594),
        "kl": interval(0.02),
        "flips": interval(0.09),
        "equivalence": {"holds": False},
    }
    return {"variants": dict.fromkeys(labels, entry), "windows": 20}


MAIN = ("exact", "nuq3-1%", "normal_float3-1%", "hadamard3", "kivi3 recent_tokens=32")
TINY = {"task": {"part": "all", "margin_nats": 0.002}, "model": {"name": "tiny"}}


def test_numbers_come_from_runs_with_their_origin_and_the_rest_is_listed(tmp_path: Path) -> None:
    run = run_of(tmp_path, "compare", compared(*MAIN), TINY)
    manifest = write_paper([run], tmp_path / "generated")
    entry = manifest["macros"]["NuqThreeExcessPpl"]
    assert entry["text"] == "1.59" and entry["git_sha"] == "c" * 40
    assert entry["metric"] == "/metrics/variants/nuq3-1%/perplexity_excess_percent/estimate"
    assert entry["run"].endswith("run/result.json")
    assert manifest == json.loads((tmp_path / "generated" / "manifest.json").read_text())
    macros = (tmp_path / "generated" / "macros.tex").read_text()
    assert r"\newcommand{\NuqThreeExcessPpl}{1.59}" in macros
    assert r"\newcommand{\NuqThreeExcessPplInterval}{1.59 [1.09,~2.09]}" in macros
    assert r"\newcommand{\AppendBlocksGrowth}{\notmeasured{}}" in macros
    assert "AppendBlocksGrowth" in manifest["not_measured"]["allocation"]
    assert (
        r"experiment=\allowbreak{}ablation\_\allowbreak{}allocation"
        in (tmp_path / "generated" / "missing.tex").read_text()
    )
    assert r"GPU\_1; code cccccccccc" in (tmp_path / "generated" / "commands.tex").read_text()
    assert r"50\% \& more" in (tmp_path / "generated" / "table-fullmain.tex").read_text()
    # A bare less-than sign prints as an exclamation mark upside down.
    assert "p & $<$0.001" in (tmp_path / "generated" / "table-fullmain.tex").read_text()
    assert "notmeasured" in (tmp_path / "generated" / "table-serve.tex").read_text()
    assert (tmp_path / "generated" / "figure-pareto.pdf").read_bytes()[:4] == b"%PDF"
    assert not (tmp_path / "generated" / "figure-append.pdf").exists()


def test_a_bench_in_several_parts_and_the_compile_table_fill_their_tables(tmp_path: Path) -> None:
    def part(operation: str, label: str, **values: Any) -> Run:
        row = {
            "operation": operation,
            "shape": "llama31_8b",
            "label": label,
            "bits": 3,
            "is_trace": False,
            **values,
        }
        metrics = {"rows": [{"batch": 8, "tokens": 32768, **row}], "copy_gb_per_s": 2000.0}
        run = run_of(tmp_path, "kernels", metrics, {"task": {}})
        run.result["provenance"]["device"] = "NVIDIA H100"
        return Run(tmp_path / operation, run.result)

    (tmp_path / "data").mkdir()
    row = {"kernel": "_decode", "case": "a_b", "sm": 90, "registers": 128, "spills": 0}
    (tmp_path / "data" / "compile_table.json").write_text(json.dumps({"rows": [row, {**row, "spills": 26}]}))
    runs = [
        part("decode", "8x32768", speedup_over_full_precision=1.75, copy_fraction=0.5),
        part("layer_share", "1x32768", percent_of_layer=0.81),
    ]
    manifest = write_paper(runs, tmp_path / "generated")
    macros = manifest["macros"]
    assert (
        macros["KernelDecodeThreeSpeedup"]["text"] == "1.75"
        and macros["KernelShareThirtyTwoKThree"]["text"] == "0.81"
    )
    assert macros["KernelDecodeThreeSpeedup"]["run"] != macros["KernelShareThirtyTwoKThree"]["run"]
    decode = (tmp_path / "generated" / "table-decode.tex").read_text()
    assert r"\multicolumn{3}{c}{times full precision}" in decode and "& -- & 1.75 & --" in decode
    assert (tmp_path / "generated" / "figure-decode.pdf").is_file()
    assert (
        r"\_decode & 90 & 2 & -- & 128 & 0--26 &"
        in (tmp_path / "generated" / "table-compiled.tex").read_text()
    )


def test_a_fleets_day_and_the_meters_cost_have_their_runs(tmp_path: Path) -> None:
    found = collect([str(PAPER / "data" / "energy_h200_*.json")]).ok
    record = json.loads((PAPER / "data" / "energy_h200_meter_cost.json").read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "energy_h200_meter_cost.json").write_text(json.dumps(record))
    manifest = write_paper(found, tmp_path / "generated")
    assert len(manifest["tables"]["table-fleet"]) == len(manifest["figures"]["figure-energy"]) == 3
    # A table of a phase holds every history that was measured.
    assert len(manifest["tables"]["table-energydecode"]) == 2
    table = (tmp_path / "generated" / "table-energydecode.tex").read_text()
    assert "32 $\\times$ 2048" in table and "32 $\\times$ 8192" in table and "prefill" not in table
    assert manifest["macros"]["EnergyDecodeTokens"]["text"] == "2,048"
    assert manifest["macros"]["EnergyDecodeLongTokens"]["text"] == "8,192"
    assert manifest["macros"]["MeterCostHost"]["git_sha"] == record["provenance"]["git_sha"]
    assert "8 & nuq4 &" in (tmp_path / "generated" / "table-fleet.tex").read_text()
    commands = (tmp_path / "generated" / "commands.tex").read_text()
    assert r"kvquant.\allowbreak{}bench.\allowbreak{}meter\_\allowbreak{}cost --seconds 20" in commands
    # One phase alone is no bill, and a run that is no longer there has no number.
    (tmp_path / "data" / "energy_h200_meter_cost.json").unlink()
    decode = [run for run in found if "decode" in run.folder.name]
    manifest = write_paper(decode, tmp_path / "generated")
    assert manifest["tables"]["table-fleet"] == [] and manifest["macros"]["MeterCostHost"]["text"] is None


def test_a_second_call_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    write_paper([run_of(tmp_path, "compare", compared(*MAIN), TINY)], tmp_path / "generated")
    write_paper([], tmp_path / "generated")
    assert not (tmp_path / "generated" / "figure-pareto.pdf").exists()
    assert "1.59" not in (tmp_path / "generated" / "macros.tex").read_text()


def test_the_latest_of_several_runs_counts_and_another_model_is_another_source(tmp_path: Path) -> None:
    old = run_of(tmp_path, "compare", compared(*MAIN), TINY)
    new = run_of(tmp_path, "compare", compared(*MAIN), TINY, started_at="2026-02-01T00:00:00+00:00")
    llama = run_of(tmp_path, "compare", compared(*MAIN), {**TINY, "model": {"name": "llama2_7b_32k"}})
    chosen = choose([new, llama, old])
    assert chosen["main"] is new and chosen["llama"] is llama


def test_a_long_history_counts_beside_a_shorter_one_of_the_same_device_alone(tmp_path: Path) -> None:
    def decode(tokens: int, device: str, day: int) -> Run:
        metrics = {
            "meter": {"kind": "measured"},
            "points": [{"phase": "decode", "batch": 32, "prompt_tokens": tokens}],
        }
        where = {"device": device, "git_sha": "c" * 40}
        return run_of(
            tmp_path, "energy", metrics, {}, started_at=f"2026-01-0{day}T00:00:00+00:00", provenance=where
        )

    short, long, elsewhere = decode(2048, "H200", 1), decode(8192, "H200", 2), decode(1024, "A100", 3)
    assert choose([short, long]) == {"energydecode": short, "energydecodelong": long}
    assert choose([short, long, elsewhere]) == {"energydecode": elsewhere}
    assert choose([long]) == {"energydecodelong": long}


def test_an_estimate_or_a_flagged_ratio_never_becomes_a_headline(tmp_path: Path) -> None:
    point = {"phase": "prefill", "batch": 8, "variants": {}, "ratios": {}, "headline": {}}
    point["ratios"] = {
        "nuq3": {"faults": ["it slowed down"], "total": {"value": 1.1, "low": 1.0, "high": 1.2}}
    }
    metrics = {"meter": {"kind": "measured"}, "points": [point]}
    measured = run_of(tmp_path, "energy", metrics, {"task": {}})
    estimated = run_of(tmp_path, "energy", {**metrics, "meter": {"kind": "estimated"}}, {"task": {}})
    assert choose([estimated]) == {}
    texts = {entry.macro.name: entry.text for entry in fill(choose([measured]))}
    assert texts["EnergyPrefillNuqThreeRatio"] is None and texts["EnergyPrefillBatch"] == "8"


def test_the_text_says_how_the_steps_of_decoding_were_launched(tmp_path: Path) -> None:
    point = {"phase": "decode", "batch": 8, "prompt_tokens": 64, "ratios": {}, "captured": True}
    point["variants"] = {
        "none": {**dict.fromkeys(("j_per_token_mean", "above_idle_j_per_token_mean"), 1.0), "faults": []}
        | {"power_w": 1.0, "cv_percent": 0.5}
    }
    metrics = {"meter": {"kind": "measured"}, "points": [point]}
    for task, said in (({"cuda_graph": True}, "replayed as a CUDA graph"), ({}, "launched one by one")):
        run = run_of(tmp_path, "energy", metrics, {"task": task})
        texts = {entry.macro.name: entry.text for entry in fill(choose([run]))}
        assert texts["EnergyDecodeSteps"].startswith(said)
    write_paper([run], tmp_path / "generated")
    assert "decode, graph 8" in (tmp_path / "generated" / "table-energydecode.tex").read_text()


def test_the_kept_results_fill_the_paper_and_every_pointer_leads_to_its_number(tmp_path: Path) -> None:
    found = collect([str(PAPER / "data" / "*.json")])
    manifest = write_paper(found.ok, tmp_path / "generated")
    measured = [m for m in manifest["macros"].values() if m["text"] is not None]
    assert len(measured) > 150
    for entry in measured:
        value: Any = json.loads((Path.cwd() / entry["run"]).read_text())
        for key in entry["metric"].partition(" (")[0].split("/")[1:]:
            value = value[int(key)] if isinstance(value, list) else value[key.replace("~1", "/")]
        assert value is not None


@pytest.mark.parametrize(
    ("value", "spec", "factor", "text"),
    [
        (-0.034, ".2f", 1.0, "$-$0.03"),
        (0.0908, ".1f", 100, "9.1"),
        (131072, ",d", 1.0, "131,072"),
        (4, "d", 1, "4"),
        (True, "d", 1, None),
        (None, ".2f", 1, None),
    ],
)
def test_numbers_as_text(value: Any, spec: str, factor: float, text: str | None) -> None:
    assert tex.number(value, spec, factor) == text


def test_an_interval_without_ends_is_not_measured() -> None:
    assert tex.interval({"estimate": 1.0, "low": None, "high": None}, ".2f") is None
    assert tex.interval({"value": 1.0, "low": 0.5, "high": 2.0}, ".1f") == "1.0 [0.5,~2.0]"


GOOD = "This is pdfTeX\nOverfull \\hbox (9.9pt too wide) in paragraph\nOutput written on build/main.pdf (12 pages, 1 bytes).\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", None),
        ("Overfull \\hbox (10.1pt too wide) in paragraph at lines 3--4", "overfull box by 10.1 pt"),
        ("LaTeX Warning: Float too large for page by 55.2pt on input line 93.", "float too large"),
        ("LaTeX Warning: Reference `tab:x' on page 1 undefined on input line 7.", "undefined reference"),
        (
            "Package natbib Warning: Citation `nobody2020' on page 1 undefined on input li",
            "undefined citation",
        ),
        ("LaTeX Warning: Label `a' multiply defined.", "label defined twice"),
    ],
)
def test_the_log_is_read_for_what_a_reader_would_see(
    tmp_path: Path, line: str, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "main.log"
    log.write_text(f"{line}\n{GOOD}")
    assert check_log.main(log) == (0 if said is None else 1)
    if said:
        assert said in capsys.readouterr().err


def test_a_long_line_of_the_log_is_joined_before_it_is_read() -> None:
    warning = "LaTeX Warning: Reference `" + "x" * 60 + "' on page 1 undefined on input line 7."
    assert len(check_log.problems(f"{warning[:79]}\n{warning[79:]}\n")) == 1
