"""Measured joules on README's page: a table by batch and width, a fleet's day by it, and what speaks for the meter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvquant.energy.fleet import is_valid, phase_name
from kvquant.report.collect import Run
from kvquant.report.energy import fleet_tables
from kvquant.report.paper.build import meter_cost
from kvquant.report.paper.sources import METER_COST, choose, energy_runs
from kvquant.report.tables import ReportTable

Result = dict[str, Any]
AsTable = Callable[[Sequence[str], Sequence[Sequence[Any]]], str]
CACHES = {"none": "exact", "nuq4": "4 bits", "nuq3": "3 bits", "nuq2": "2 bits"}


def chosen_of(kept: Mapping[str, Result]) -> dict[str, Run]:
    """Return the runs whose joules are shown, by source; the latest of each."""
    return choose([Run(Path(f"{name}.json"), result) for name, result in kept.items()])


def fleet_of(chosen: Mapping[str, Run]) -> ReportTable | None:
    """What a fleet would take a day by the joules that are shown; None: not both phases were measured at one batch."""
    tables = fleet_tables(energy_runs(chosen))
    return tables[0] if tables else None


def energy_parts(kept: Mapping[str, Result], paper: Path, as_table: AsTable) -> list[str]:
    """Return README's paragraphs on energy; none where no run has a counter behind it.

    Args:
        kept: results by name.
        paper: paper/, with the record of the meter's cost.
        as_table: makes Markdown of columns and rows.
    """
    chosen = chosen_of(kept)
    shown = energy_runs(chosen)
    if not shown:
        return []
    points = [point for run in shown for point in run.result["metrics"]["points"]]
    points.sort(key=lambda point: (phase_name(point), point["batch"], point["prompt_tokens"]))
    one = shown[0]
    model, meter = one.result["metrics"]["model"], one.result["metrics"]["meter"]
    sha = {run.file: (run.result["provenance"].get("git_sha") or "no git")[:10] for run in shown}
    codes = {file: f" of code {text}" if len(set(sha.values())) > 1 else "" for file, text in sha.items()}
    cards = len({run.result["metrics"]["meter"].get("uuid") for run in shown})
    *most, last = (f"`{run.file.stem}`{codes[run.file]}" for run in shown)
    names = f"{', '.join(most)} and {last}" if most else last
    # Of one code it is said once.
    names += "" if any(codes.values()) else f", of code {sha[one.file]},"
    said = (
        f"Joules per token ({names} in [paper/results.md](paper/results.md); "
        f"{one.result['provenance']['device']}{', a card for each run' if cards > 1 else ''}): {model['num_layers']} layers of {model['num_query_heads']} query and "
        f"{model['num_kv_heads']} KV heads of {model['head_dim']}, random weights, {model['parameters'] / 1e9:.2f} billion of "
        "them. In brackets the ratio to the exact cache, with its 95% interval, and the ratio above idle power."
    )
    if meter["systematic_percent"] is not None:
        said += (
            f" +-{meter['systematic_percent']:g}% systematic stands beside every figure; how much of it a ratio's two sides "
            "share was not measured."
        )
    head = ["sequences x tokens", *CACHES.values()]
    table = as_table(head, [[_place(point), *(_cell(point, label) for label in CACHES)] for point in points])
    lines = [*_said_of_steps(points), *_said_of_fleet(chosen), *_said_of_meter(chosen, paper)]
    return [said, table, "\n".join(f"- {line}" for line in lines)]


def _place(point: dict[str, Any]) -> str:
    return f"{phase_name(point)}, {point['batch']} x {point['prompt_tokens']:,}"


def _cell(point: dict[str, Any], label: str) -> str:
    cell = point["variants"].get(label, {})
    if not is_valid(cell):
        return "not valid" if cell else ""
    joules, ratio = f"{cell['j_per_token_mean']:.4g}", point["headline"].get(label)
    if not ratio:
        return joules
    above = point["ratios"][label].get("above_idle")
    idle = f"; {above['value']:.3f}" if above else ""
    return f"{joules} ({ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]{idle})"


def _step_ms(point: dict[str, Any], label: str) -> float | None:
    cell = point["variants"].get(label, {})
    took = cell.get("s_per_token") if is_valid(cell) else None
    return 1e3 * point["batch"] * sum(took) / len(took) if took else None


def _said_of_steps(points: Sequence[dict[str, Any]]) -> list[str]:
    """How long steps took and at which power: whether joules fall with the time or with the watts, and where they do not."""
    told, longer, less_power, dearer = [], [], [], []
    for point in points:
        exact_ms, four_ms = _step_ms(point, "none"), _step_ms(point, "nuq4")
        if point["phase"] != "decode" or exact_ms is None or four_ms is None:
            continue
        exact_w, four_w = (point["variants"][label]["power_w"] for label in ("none", "nuq4"))
        size = f"{point['batch']} x {point['prompt_tokens']:,}"
        told.append(f"{exact_ms:.2f} and {four_ms:.2f} ms at {size}, at {exact_w:.0f} and {four_w:.0f} W")
        longer.append(100 * (four_ms / exact_ms - 1))
        less_power.append(four_w < exact_w)
        if point["headline"].get("nuq4", {}).get("low", 0) > 1:
            dearer.append(size)
    if not told:
        return []
    line = f"A decoding step takes, with the exact cache and at 4 bits, {'; '.join(told)}."
    # A hundredth of a step's time is no saving to speak of.
    if all(less_power) and min(longer) > -1:
        line += (
            f" At 4 bits a step's time differs by {min(longer):+.1f}% to {max(longer):+.1f}% and its power is lower: what is saved is "
            "power, as of bytes that are not moved, and no time."
        )
    if dearer:
        line += f" At {', '.join(dearer)} nothing is saved."
    return [line]


def _said_of_fleet(chosen: Mapping[str, Run]) -> list[str]:
    table = fleet_of(chosen)
    if table is None:
        return []
    days: dict[str, list[str]] = {}
    for row in table.rows:
        days.setdefault(row[0].text, []).append(f"{row[3].text} kWh ({CACHES.get(row[1].text, row[1].text)})")
    told = "; ".join(f"{batch} sequences at once: {', '.join(found)}" for batch, found in days.items())
    assumed = table.title.removeprefix("what if a fleet: ")
    return [f"What a fleet would take a day with this model. {told}. Assumed: {assumed}."]


def _said_of_meter(chosen: Mapping[str, Run], paper: Path) -> list[str]:
    lines = []
    runs = {run.file: run.result for run in chosen.values() if run.result["task"] == "energy"}
    agreements = [result["metrics"]["agreement"] for result in runs.values()]
    longest = max(agreements, key=lambda entry: entry["window_s"])
    lines.append(
        f"Counter and integrated power differ by {abs(longest['disagreement_percent']):.2f}% over {longest['window_s']:.0f} s of "
        "prefill: one sensor, read twice."
    )
    if "energyload" in chosen:
        found, device = (
            chosen["energyload"].result["metrics"]["load"],
            chosen["energyload"].result["provenance"],
        )
        lines.append(
            f"Matrix products on an {device['device']}: joules above idle, {min(found['above_idle_j']):,.0f} to "
            f"{max(found['above_idle_j']):,.0f}, are proportional to their number, to {found['max_residual_percent']:.1f}%; "
            f"intercept {found['intercept']['value']:.0f} J [{found['intercept']['low']:.0f}, {found['intercept']['high']:.0f}]."
        )
    record = meter_cost(paper).get(METER_COST)
    if record is not None:
        shares = {pace: record.result[pace]["share"] for pace in ("host", "device") if pace in record.result}
        told = " and ".join(
            f"{100 * share['value']:.2f}% [{100 * share['low']:.2f}, {100 * share['high']:.2f}] of work that the {pace} paces"
            for pace, share in shares.items()
            if share
        )
        lines.append(f"The meter's readings cost {told} ({record.result['source']}).")
    return lines
