"""What ``task=energy`` found, in a report: joules per token that are valid, reasons where they are not, a fleet's bill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvquant.energy.fleet import (
    DECODE,
    PREFILL,
    FleetLoad,
    assumptions_text,
    fleet_bill,
    is_valid,
    phase_name,
)
from kvquant.energy.windows import CarbonIntensity
from kvquant.report.collect import Run
from kvquant.report.series import blocks
from kvquant.report.style import CYCLE, figure
from kvquant.report.tables import Cell, ReportTable, table_title

TASK = "energy"
COLUMNS = (
    *("phase", "batch", "tokens", "cache", "J/token [95%]", "above idle", "W", "ratio to exact [95%]"),
    *("gCO2e/Mtoken", "g/kWh", "PUE", "source of g/kWh", "valid", "run"),
)
FLEET_COLUMNS = ("batch", "cache", "J/request", "kWh/day", "kgCO2e/day")


def energy_tables(runs: Sequence[Run]) -> list[ReportTable]:
    """Return, per group of runs that may be compared, their joules and what a fleet would take by them.

    The numbers of an invalid result are left out and its reason stands there. Grams are J/token x 1e6 / 3.6e6 x PUE x
    g/kWh, all of which are in the row.

    Args:
        runs: those that ended well, of any task.
    """
    out: list[ReportTable] = []
    for origin, members in blocks([run for run in runs if run.result["task"] == TASK]):
        rows = [row for run in members for point in _points(run) for row in _rows(run, point)]
        systematic = {run.metric("meter.systematic_percent") for run in members} - {None}
        note = f"; systematic +-{max(systematic):g}% beside every interval" if systematic else ""  # type: ignore[type-var]
        out.append(ReportTable(f"{table_title(origin)}{note}", origin, list(COLUMNS), rows))
    return [*out, *fleet_tables(runs)]


def fleet_tables(runs: Sequence[Run]) -> list[ReportTable]:
    """Return what a fleet would take a day, per model, device, grid and idea of the fleet; with one phase alone, nothing.

    Both phases are of the same code where that was measured; otherwise each is of the code that measured it last, and
    the title names both.

    Args:
        runs: those that ended well, of any task.
    """
    places: dict[tuple[Any, ...], list[tuple[dict[str, str], list[Run]]]] = {}
    for origin, members in blocks([run for run in runs if run.result["task"] == TASK]):
        where = tuple(text for name, text in origin.items() if name != "code")
        by_load: dict[tuple[Any, ...], list[Run]] = {}
        for run in members:
            by_load.setdefault((*where, _grid(run), *map(repr, _asked(run))), []).append(run)
        for key, found in by_load.items():
            places.setdefault(key, []).append((origin, found))
    out: list[ReportTable] = []
    for groups in places.values():
        same_code = [
            table
            for origin, found in groups
            for table in _bill(origin, found[0], [point for run in found for point in _points(run)])
        ]
        out += same_code or _fleet_of_two_codes(groups)
    return out


def _points(run: Run) -> list[dict[str, Any]]:
    points = run.result["metrics"].get("points")
    return points if isinstance(points, list) else []


def _grid(run: Run) -> CarbonIntensity:
    carbon = run.result["metrics"]["carbon"]
    return CarbonIntensity(carbon["g_per_kwh"], carbon["source"], carbon["pue"])


def _rows(run: Run, point: dict[str, Any]) -> list[list[Cell]]:
    grid, rows = _grid(run), []
    for name, cell in point["variants"].items():
        texts = ["", "", "", "", ""]
        if is_valid(cell):
            interval, ratio = cell["j_per_token_interval"], point["headline"].get(name)
            above = cell.get("above_idle_j_per_token_mean")
            texts = [
                f"{cell['j_per_token_mean']:.5g} [{interval['low']:.4g}, {interval['high']:.4g}]",
                "" if above is None else f"{above:.4g}",
                f"{cell['power_w']:.0f}",
                f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else "",
                f"{cell['gco2e_per_million_tokens']:.4g}",
            ]
        reason = cell.get("does_not_fit") or "; ".join(cell["faults"])
        carbon = [f"{grid.g_per_kwh:g}", f"{grid.pue:g}", grid.source]
        place = [phase_name(point), str(point["batch"]), str(point["prompt_tokens"]), name]
        rows.append(
            [
                *map(Cell, place),
                *(Cell(text, run if text else None) for text in texts),
                *map(Cell, carbon),
                Cell(f"no: {reason}" if reason else "yes"),
                Cell(run.folder.name, run),
            ]
        )
    return rows


def _asked(run: Run) -> tuple[Any, ...]:
    """What the fleet of a run is asked for, in the order of `FleetLoad`."""
    keys = ("fleet_requests_per_day", "fleet_levels", "fleet_context_tokens", "fleet_generated_tokens")
    return tuple(run.config(f"task.{key}") for key in keys)


def _fleet_of_two_codes(groups: Sequence[tuple[dict[str, str], list[Run]]]) -> list[ReportTable]:
    """A bill from each phase's points by the code that measured it last; the title says which code that was."""
    latest: dict[str, tuple[str, dict[str, str], list[Run]]] = {}
    for origin, runs in groups:
        for phase in (PREFILL, DECODE):
            started = [
                str(run.result.get("started_at"))
                for run in runs
                if any(p["phase"] == phase for p in _points(run))
            ]
            if started and (phase not in latest or max(started) > latest[phase][0]):
                latest[phase] = (max(started), origin, runs)
    if len(latest) < 2:
        return []
    points = [
        p
        for phase, (_, _, runs) in latest.items()
        for run in runs
        for p in _points(run)
        if p["phase"] == phase
    ]
    code = ", ".join(
        f"{phase} of code {origin['code']}" for phase, (_, origin, _) in sorted(latest.items(), reverse=True)
    )
    _, origin, (one, *_) = latest[DECODE]
    return _bill({**origin, "code": code}, one, points, f"; not one code: {code}")


def _bill(
    origin: dict[str, str], one: Run, points: Sequence[dict[str, Any]], also_assumed: str = ""
) -> list[ReportTable]:
    """The bill as a table, or none where no method has both phases.

    Args:
        origin: what its runs have in common.
        one: of them, whose grid and idea of the fleet count.
        points: of both phases.
        also_assumed: what the title says after the bill's own assumptions.
    """
    bill = fleet_bill(points, FleetLoad(*_asked(one)), _grid(one))
    if not bill["rows"]:
        return []
    rows = [
        [
            Cell(str(row["batch"])),
            Cell(row["variant"]),
            Cell(f"{row['j_per_request']:.4g}", one),
            Cell(f"{row['kwh_per_day']:.4g}", one),
            Cell(f"{row['kgco2e_per_day']:.4g}", one),
        ]
        for row in bill["rows"]
    ]
    title = f"what if a fleet: {assumptions_text(bill['assumptions'])}{also_assumed}"
    return [ReportTable(title, origin, list(FLEET_COLUMNS), rows)]


def draw_energy_figures(runs: Sequence[Run], folder: Path) -> list[tuple[str, list[Path]]]:
    """Draw valid joules per token against the batch, one panel per phase; a figure per group of runs.

    Returns:
        Title and files of each, PNG first; a group whose batch does not vary has none.
    """
    out: list[tuple[str, list[Path]]] = []
    for origin, members in blocks([run for run in runs if run.result["task"] == TASK]):
        name = f"energy_batch{f'_{len(out) + 1}' if out else ''}"
        points = [point for run in members for point in _points(run)]
        paths = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
        if all(draw_energy_figure(points, path) for path in paths):
            out.append((f"Energy per token against the batch ({table_title(origin)})", paths))
    return out


def draw_energy_figure(points: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the valid points with their intervals; returns False, drawing nothing, where no batch size varies."""
    lines: dict[tuple[str, str, int], list[tuple[int, float, float, float]]] = {}
    for point in points:
        for name, cell in point["variants"].items():
            if is_valid(cell):
                interval = cell["j_per_token_interval"]
                lines.setdefault((point["phase"], name, point["prompt_tokens"]), []).append(
                    (point["batch"], cell["j_per_token_mean"], interval["low"], interval["high"])
                )
    lines = {key: sorted(found) for key, found in lines.items() if len({at[0] for at in found}) > 1}
    phases = [phase for phase in ("prefill", "decode") if any(key[0] == phase for key in lines)]
    if not phases:
        return False
    with figure(path, 1.2 + 4.2 * len(phases), 3.4, columns=len(phases)) as axes:
        for axis, phase in zip(axes, phases, strict=True):
            shown = [(key, found) for key, found in lines.items() if key[0] == phase]
            for index, ((_, name, length), found) in enumerate(shown):
                at, mean, low, high = zip(*found, strict=True)
                errors = [[m - a for m, a in zip(mean, low, strict=True)]]
                errors.append([b - m for m, b in zip(mean, high, strict=True)])
                style = {"color": CYCLE[index % len(CYCLE)], "marker": "o", "markersize": 4, "capsize": 2}
                axis.errorbar(at, mean, yerr=errors, label=f"{name}, {length} tokens", **style)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel("sequences in the batch")
            axis.set_ylabel(f"{phase} [J/token]")
            axis.legend(fontsize=6, frameon=False)
    return True
