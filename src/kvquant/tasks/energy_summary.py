"""From windows to what may be said: joules per token, ratios with their intervals, a fleet's bill."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from kvquant.energy.fleet import assumptions_text, phase_name
from kvquant.energy.protocol import FilledWindow
from kvquant.energy.statistics import coefficient_of_variation, mean_interval, paired_ratio
from kvquant.energy.validity import disagreement_percent, series_faults
from kvquant.energy.windows import MEASURED

Row = list[str | None]


def summarize_variant(
    filled: Sequence[FilledWindow], tokens: int, idle_w: float | None, *, mig: bool = False
) -> dict[str, Any]:
    """Numbers of one method at one point: totals first, what is above idle second.

    Args:
        filled: its windows, in order of their rounds.
        tokens: tokens per repetition.
        idle_w: power with the model loaded and nothing to do, for windows that do not say their own.
        mig: whether the counter is that of a whole GPU cut into slices.
    """
    windows = [one.window for one in filled]
    out: dict[str, Any] = {
        "energy_kind": windows[0].kind,
        "tokens_per_repetition": tokens,
        "repetitions": [one.repetitions for one in filled],
        "faults": series_faults(windows, mig=mig),
        "s_per_token": [one.window.duration_s / (one.repetitions * tokens) for one in filled],
    }
    if any(window.energy_j is None for window in windows):
        return out
    per_token = [one.window.joules() / (one.repetitions * tokens) for one in filled]
    grams = windows[0].intensity.grams
    seconds = statistics.mean(out["s_per_token"])
    out |= {
        "energy_j": [window.energy_j for window in windows],
        "j_per_token": per_token,
        "j_per_token_mean": statistics.mean(per_token),
        "j_per_token_interval": _dict(mean_interval(per_token)),
        "cv_percent": _percent(coefficient_of_variation(per_token)),
        "power_w": statistics.mean(w.joules() / w.duration_s for w in windows),
        "gco2e_per_million_tokens": grams(statistics.mean(per_token)) * 1e6,
        "energy_delay_js": statistics.mean(per_token) * seconds,
        "disagreement_percent": [disagreement_percent(w) for w in windows],
    }
    idle = [idle_w if one.idle_w is None else one.idle_w for one in filled]
    if None not in idle:
        above = [
            (one.window.joules() - (w or 0.0) * one.window.duration_s) / (one.repetitions * tokens)
            for one, w in zip(filled, idle, strict=True)
        ]
        out["above_idle_j_per_token"] = above
        out["above_idle_j_per_token_mean"] = statistics.mean(above)
    clocks = [w.state["sm_clock_mhz"] for w in windows if w.state.get("sm_clock_mhz") is not None]
    if clocks:
        out["sm_clock_mhz"] = statistics.mean(clocks)
        out["normal_slowdowns"] = sorted({r for w in windows for r in w.state.get("normal_slowdowns", [])})
    return out


def compare_point(cells: dict[str, Any], exact: str) -> dict[str, Any]:
    """Paired ratios of every method's joules per token over the exact cache's.

    Returns:
        ``ratios``: by method, total and above idle, with ``faults``; ``headline``: those without any fault.
    """
    ratios: dict[str, Any] = {}
    base = cells[exact]
    for name, cell in cells.items():
        if name == exact or "does_not_fit" in cell or "does_not_fit" in base:
            continue
        faults = sorted({*base["faults"], *cell["faults"]})
        ratio: dict[str, Any] = {"faults": faults}
        # An estimate mostly counts seconds: a ratio of two would look like a finding.
        if "j_per_token" in cell and "j_per_token" in base and cell["energy_kind"] == MEASURED:
            ratio["total"] = _dict(paired_ratio(cell["j_per_token"], base["j_per_token"]))
            above, below = cell.get("above_idle_j_per_token"), base.get("above_idle_j_per_token")
            if above and below and min(above) > 0 and min(below) > 0:
                ratio["above_idle"] = _dict(paired_ratio(above, below))
        ratios[name] = ratio
    headline = {n: r["total"] for n, r in ratios.items() if not r["faults"] and r.get("total")}
    return {"ratios": ratios, "headline": headline}


COLUMNS = ["", "cache", "J/token", "above idle", "W", "gCO2e/Mtoken", "EDP", "CV", "ratio [95%]", "valid"]


def energy_table(metrics: dict[str, Any], cfg: Any) -> tuple[str, list[str], list[Row]]:
    """Return title, columns and rows of the printed table; reasons against a row follow by number."""
    meter, grid, fleet = metrics["meter"], metrics["carbon"], metrics["fleet"]
    title = (
        f"{cfg.model.name}: {meter['kind']} ({meter['source']}); {grid['g_per_kwh']:.0f} g/kWh "
        f"({grid['source']}), PUE {grid['pue']:g}"
    )
    if meter["systematic_percent"] is not None:
        title += f"; systematic +-{meter['systematic_percent']:g}% beside every interval"
    reasons: dict[str, int] = {}
    rows = [row for point in metrics["points"] for row in _rows(point, reasons)]
    for one in fleet["rows"]:
        label = f"{fleet['assumptions']['requests_per_day']:,} requests/day, batch {one['batch']}"
        day = f"{one['kwh_per_day']:.4g} kWh", f"{one['kgco2e_per_day']:.4g} kgCO2e"
        rows.append([label, one["variant"], *day, *[None] * 6])
    if fleet["rows"]:
        rows.append([f"(requests/day) {assumptions_text(fleet['assumptions'])}", *[None] * 9])
    rows += [[f"({number}) {reason}", *[None] * 9] for reason, number in reasons.items()]
    return title, COLUMNS, rows


def _rows(point: dict[str, Any], reasons: dict[str, int]) -> list[Row]:
    label = f"{phase_name(point)} {point['batch']} x {point['prompt_tokens']}"
    rows: list[Row] = []
    for name, cell in point["variants"].items():
        if "does_not_fit" in cell:
            rows.append([label, name, "too large", *[None] * 7])
            continue
        faults = point["ratios"].get(name, cell)["faults"]
        numbers = [str(reasons.setdefault(fault, len(reasons) + 1)) for fault in faults]
        ratio = point["ratios"].get(name, {}).get("total")
        rows.append(
            [
                label,
                name,
                _number(cell.get("j_per_token_mean"), "{:.4g}"),
                _number(cell.get("above_idle_j_per_token_mean"), "{:.4g}"),
                _number(cell.get("power_w"), "{:.0f}"),
                _number(cell.get("gco2e_per_million_tokens"), "{:.3g}"),
                _number(cell.get("energy_delay_js"), "{:.1e}"),
                _number(cell.get("cv_percent"), "{:.1f}%"),
                f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else None,
                f"no ({','.join(numbers)})" if faults else "yes",
            ]
        )
    return rows


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _dict(interval: Any) -> dict[str, Any] | None:
    return None if interval is None else dataclasses.asdict(interval)


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction
