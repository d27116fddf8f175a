"""Energy in a report: valid joules alone, grams that can be done by hand, a fleet's bill from several runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvquant.report.collect import Collection, Run
from kvquant.report.energy import draw_energy_figures, energy_tables, fleet_tables
from kvquant.report.page import write_page
from kvquant.report.readme_energy import energy_parts
from kvquant.report.tables import latex, markdown

PAPER = Path(__file__).resolve().parent.parent / "paper"


def cell(j_per_token: float, **changes: Any) -> dict[str, Any]:
    interval = {"value": j_per_token, "low": 0.99 * j_per_token, "high": 1.01 * j_per_token, "n": 5}
    return {
        "energy_kind": "measured",
        "faults": [],
        "j_per_token_mean": j_per_token,
        "j_per_token_interval": interval,
        "above_idle_j_per_token_mean": 0.8 * j_per_token,
        "power_w": 400.0,
        "gco2e_per_million_tokens": j_per_token * 1e6 / 3.6e6 * 1.5 * 662,
        **changes,
    }


def energy_run(folder: str, phase: str, exact_j: float, **nuq: Any) -> Run:
    ratio = {"value": 0.8, "low": 0.78, "high": 0.82, "n": 5}
    points = [
        {
            "phase": phase,
            "batch": batch,
            "prompt_tokens": 2048,
            "variants": {"none": cell(exact_j / batch), "nuq3": cell(0.8 * exact_j / batch, **nuq)},
            "headline": {} if nuq else {"nuq3": ratio},
        }
        for batch in (1, 8)
    ]
    fleet = {
        "fleet_requests_per_day": 3600,
        "fleet_levels": [0.0, 1.0],
        "fleet_context_tokens": [1000, 1000],
        "fleet_generated_tokens": [200, 200],
    }
    result = {
        "task": "energy",
        "status": "ok",
        "metrics": {
            "meter": {"systematic_percent": 5.0},
            "carbon": {"g_per_kwh": 662.0, "source": "given", "pue": 1.5},
            "points": points,
        },
        "config": {"task": fleet, "model": {"name": "llama"}, "data": {"name": "stdlib"}},
        "provenance": {"model_hash": "a" * 64, "data_hash": "d" * 64, "device": "H100", "git_sha": "c" * 40},
        "error": None,
    }
    return Run(Path(folder), result)


def column(table: Any, name: str) -> list[str]:
    return [row[table.columns.index(name)].text for row in table.rows]


def test_grams_can_be_done_by_hand_from_a_row() -> None:
    table, *_ = energy_tables([energy_run("one", "decode", 2.0)])
    names = ("J/token [95%]", "PUE", "g/kWh", "gCO2e/Mtoken")
    for joules, pue, grams_per_kwh, grams in zip(*(column(table, name) for name in names), strict=True):
        by_hand = float(joules.split()[0]) * 1e6 / 3.6e6 * float(pue) * float(grams_per_kwh)
        assert float(grams) == pytest.approx(by_hand, rel=1e-3)
    assert set(column(table, "source of g/kWh")) == {"given"}
    assert column(table, "ratio to exact [95%]") == ["", "0.800 [0.780, 0.820]"] * 2
    assert "systematic +-5% beside every interval" in table.title
    assert "| decode | 8 | 2048 | nuq3 | 0.2 [0.198, 0.202] |" in markdown(table) and "tabular" in latex(
        table
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"faults": ["window shorter than 5 s"]}, "no: window shorter than 5 s"),
        (
            {"energy_kind": "estimated", "faults": ["estimated, not measured (m)"]},
            "no: estimated, not measured (m)",
        ),
    ],
)
def test_an_invalid_result_shows_its_reason_and_no_number(tmp_path: Path, changes: dict, reason: str) -> None:
    runs = [energy_run("a", "decode", 2.0, **changes), energy_run("b", "prefill", 0.02)]
    joules, bill = energy_tables(runs)
    invalid = [row for row in joules.rows if row[3].text == "nuq3" and row[0].text == "decode"]
    assert len(invalid) == 2 and all(row[-2].text == reason for row in invalid)
    assert all(c.text == "" for row in invalid for c in row[4:9])
    # The exact cache's figures are valid in both phases, the method's are not.
    assert {row[1].text for row in bill.rows} == {"none"}


def test_a_fleets_bill_takes_phases_from_several_runs_and_says_what_it_assumes() -> None:
    assert len(energy_tables([energy_run("a", "decode", 2.0)])) == 1
    _, bill = energy_tables([energy_run("a", "decode", 2.0), energy_run("b", "prefill", 0.02)])
    assert bill.title.startswith("what if a fleet: 3,600 requests a day of 1000 prompt and 200 answer tokens")
    assert "every batch full all day; 662 g/kWh (given), PUE 1.5" in bill.title
    row = next(row for row in bill.rows if [c.text for c in row[:2]] == ["8", "none"])
    # 1,000 x 0.0025 J + 200 x 0.25 J; 3,600 of them are 0.0525 kWh, times PUE.
    assert float(row[2].text) == pytest.approx(52.5) and float(row[3].text) == pytest.approx(
        0.07875, rel=1e-3
    )


def test_a_fleets_phases_are_of_one_code_where_they_can_be_and_else_both_are_named() -> None:
    old, new = "a" * 40, "b" * 40

    def run(phase: str, joules: float, sha: str, started: str, **where: Any) -> Run:
        found = energy_run(f"{phase}-{started}", phase, joules)
        found.result["provenance"] |= {"git_sha": sha, **where}
        found.result["started_at"] = started
        return found

    prefill, decode = run("prefill", 0.02, old, "1"), run("decode", 2.0, old, "2")
    newer, newest = run("decode", 4.0, new, "3"), run("prefill", 0.04, new, "4")

    def j_per_request(table: Any) -> float:
        return float(column(table, "J/request")[column(table, "batch").index("8")])

    # One code: the newer decode has no prefill of its own code beside it.
    (bill,) = fleet_tables([newer, prefill, decode])
    assert j_per_request(bill) == pytest.approx(52.5) and "of code" not in bill.title
    assert bill.origin["code"] == old[:8]
    # Two codes alone: both are named, with each phase from its own.
    (bill,) = fleet_tables([newer, prefill])
    assert j_per_request(bill) == pytest.approx(1000 * 0.0025 + 200 * 0.5)
    assert bill.title.endswith("; not one code: prefill of code aaaaaaaa, decode of code bbbbbbbb")
    # Of several codes that measured a phase, the last counts.
    (bill,) = fleet_tables([run("decode", 8.0, "c" * 40, "2"), newer, prefill])
    assert "decode of code bbbbbbbb" in bill.title
    assert len(fleet_tables([prefill, decode, newer, newest])) == 2
    # Another device or model is never joined.
    assert fleet_tables([prefill, run("decode", 2.0, new, "5", device="A100")]) == []
    assert fleet_tables([prefill, run("decode", 2.0, new, "5", model_hash="e" * 64)]) == []


def kept_energy() -> dict[str, Any]:
    names = ("energy_h200_decode", "energy_h200_decode_8k", "energy_h200_prefill")
    return {name: json.loads((PAPER / "data" / f"{name}.json").read_text()) for name in names}


def test_what_is_kept_of_joules_is_of_one_clean_commit_as_the_text_says() -> None:
    origins = [run["provenance"] for run in kept_energy().values()]
    assert len({origin["git_sha"] for origin in origins}) == 1
    assert not any(origin["git_dirty"] for origin in origins)


def parts_of(kept: dict[str, Any], paper: Path = PAPER) -> list[str]:
    return energy_parts(
        kept, paper, lambda columns, rows: "\n".join(" | ".join(row) for row in [columns, *rows])
    )


def test_readme_says_joules_by_batch_and_what_speaks_for_the_meter(tmp_path: Path) -> None:
    kept = kept_energy()
    said, table, lines = parts_of(kept)
    assert (
        "(`energy_h200_prefill`, `energy_h200_decode` and `energy_h200_decode_8k`, of code 6402d75ed8, in"
        in said
    )
    assert "a card for each run" in said and "+-5% systematic" in said
    assert [row.split(" | ")[0] for row in table.splitlines()[1:]] == [
        *(f"decode (CUDA graph), {at}" for at in ("1 x 2,048", "8 x 2,048", "32 x 2,048", "32 x 8,192")),
        *(f"prefill, {at}" for at in ("8 x 2,048", "32 x 2,048")),
    ]
    for text in (
        "8 sequences at once: 7.378 kWh (exact), 7.141 kWh (4 bits)",
        "32 sequences at once: 3.974 kWh (exact), 3.734 kWh (4 bits)",
        "measured at 2048 (batch 8) and 2048, 8192 (batch 32) prompt tokens",
        "Matrix products on an NVIDIA H200",
        "% [0.15, 0.24]",
        "2.39 and 2.48 ms at 32 x 2,048, at 509 and 447 W",
        "what is saved is power",
        "At 1 x 2,048 nothing is saved.",
    ):
        assert text in lines
    assert "not one code" not in lines
    # Phases of two commits are both named.
    kept = kept_energy()
    kept["energy_h200_prefill"]["provenance"]["git_sha"] = "a" * 40
    said, _, lines = parts_of(kept)
    assert "`energy_h200_prefill` of code aaaaaaaaaa, `energy_h200_decode` of code 6402d75ed8 and" in said
    assert "prefill of code aaaaaaaa, decode of code 6402d75e" in lines
    # One phase makes no bill, and nothing is said of what was not measured.
    kept.pop("energy_h200_prefill")
    kept.pop("energy_h200_decode_8k")
    kept["energy_h200_decode"]["metrics"]["points"][0]["variants"]["nuq3"]["faults"] = ["it slowed down"]
    said, table, lines = parts_of(kept, tmp_path)
    assert "(`energy_h200_decode`, of code 6402d75ed8, in" in said and "not valid" in table
    assert "a card for each run" not in said
    assert "kWh" not in lines and "readings cost" not in lines and "Matrix products" not in lines
    # Shorter steps are no saving of power alone.
    for cell in (p["variants"]["nuq4"] for p in kept["energy_h200_decode"]["metrics"]["points"]):
        cell["s_per_token"] = [0.5 * s for s in cell["s_per_token"]]
    assert "what is saved is power" not in parts_of(kept, tmp_path)[2]
    assert parts_of({}) == []


def test_joules_by_batch_are_drawn_and_land_on_the_page(tmp_path: Path) -> None:
    runs = [energy_run(str(tmp_path / "a"), "decode", 2.0)]
    ((title, paths),) = draw_energy_figures(runs, tmp_path)
    assert paths[0].read_bytes()[:4] == b"\x89PNG" and paths[1].suffix == ".pdf" and "H100" in title
    write_page(tmp_path / "report.html", Collection(runs=runs), energy_tables(runs), [(title, paths[0])], [])
    assert "gCO2e/Mtoken" in (tmp_path / "report.html").read_text()
    # One batch size is no line.
    for point in runs[0].result["metrics"]["points"]:
        point["batch"] = 8
    assert draw_energy_figures(runs, tmp_path) == []
