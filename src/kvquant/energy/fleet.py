"""What a fleet would take per day at the joules per token that were measured: a what-if, with its assumptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvquant.energy.windows import JOULES_PER_KWH, MEASURED, CarbonIntensity

PREFILL, DECODE = "prefill", "decode"
# Levels at which requests are drawn from the trace's quantiles.
_DRAWS = 100


@dataclasses.dataclass(frozen=True)
class FleetLoad:
    """What a fleet is asked for.

    Attributes:
        requests_per_day: how many.
        levels: of the quantiles below, rising.
        context_tokens: tokens of a prompt at each level.
        generated_tokens: tokens of an answer at each level.
    """

    requests_per_day: int
    levels: Sequence[float]
    context_tokens: Sequence[int]
    generated_tokens: Sequence[int]

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and answer tokens of a hundred requests, drawn at the same levels; constant beyond the outermost."""
        middles = (np.arange(_DRAWS) + 0.5) / _DRAWS
        levels = np.asarray(self.levels, dtype=float)
        prompts, answers = (
            np.interp(middles, levels, np.asarray(q, dtype=float))
            for q in (self.context_tokens, self.generated_tokens)
        )
        return prompts, answers


def phase_name(point: dict[str, Any]) -> str:
    """A point's phase as tables call it, with what is special about how it was run."""
    return f"{point['phase']} (CUDA graph)" if point.get("captured") else str(point["phase"])


def is_valid(cell: dict[str, Any]) -> bool:
    """Whether a method's joules at a point may be published: measured, and nothing against them."""
    return cell.get("energy_kind") == MEASURED and not cell.get("faults") and "j_per_token_mean" in cell


def fleet_bill(points: Sequence[dict[str, Any]], load: FleetLoad, grid: CarbonIntensity) -> dict[str, Any]:
    """What the load would take per day, by batch size and method.

    Joules per token are interpolated between the measured lengths and constant beyond them. A method with an
    estimated or invalid figure at a batch size, or with one phase alone, has no row there.

    Args:
        points: as ``task=energy`` leaves them: phase, batch, prompt_tokens, and ``variants`` with ``j_per_token_mean``.
        load: what is asked for.
        grid: whose electricity.

    Returns:
        ``assumptions`` and ``rows``.
    """
    prompts, answers = load.lengths()
    rows = []
    for batch in sorted({p["batch"] for p in points}):
        for name in dict.fromkeys(n for p in points for n in p["variants"]):
            cells = [p["variants"][name] for p in points if p["batch"] == batch and name in p["variants"]]
            curves = {phase: _curve(points, phase, batch, name) for phase in (PREFILL, DECODE)}
            if not all(curves.values()) or not all(map(is_valid, cells)):
                continue
            prompt_j = (prompts * _interpolated(curves[PREFILL], prompts)).mean()
            answer_j = (answers * _interpolated(curves[DECODE], prompts)).mean()
            per_day_j = float(prompt_j + answer_j) * load.requests_per_day
            rows.append(
                {
                    "batch": batch,
                    "variant": name,
                    "j_per_request": float(prompt_j + answer_j),
                    "kwh_per_day": per_day_j / JOULES_PER_KWH * grid.pue,
                    "kgco2e_per_day": grid.grams(per_day_j) / 1000,
                }
            )
    billed = {row["batch"] for row in rows}
    return {
        "assumptions": {
            "requests_per_day": load.requests_per_day,
            "mean_context_tokens": float(prompts.mean()),
            "mean_generated_tokens": float(answers.mean()),
            "energy": "what this meter sees, no other part of the servers, every batch full all day",
            "joules_per_token": _measured_where([p for p in points if p["batch"] in billed] or points),
            **dataclasses.asdict(grid),
        },
        "rows": rows,
    }


def assumptions_text(assumptions: dict[str, Any]) -> str:
    """One line that says what a bill rests on."""
    return (
        f"{assumptions['requests_per_day']:,} requests a day of {assumptions['mean_context_tokens']:.0f} prompt and "
        f"{assumptions['mean_generated_tokens']:.0f} answer tokens on average; {assumptions['joules_per_token']}; {assumptions['energy']}; "
        f"{assumptions['g_per_kwh']:.0f} g/kWh ({assumptions['source']}), PUE {assumptions['pue']:g}"
    )


def _measured_where(points: Sequence[dict[str, Any]]) -> str:
    """At which lengths each phase was measured, by batch where these differ, and how decoding ran."""
    at = []
    for name in sorted({phase_name(point) for point in points}, reverse=True):
        lengths: dict[int, set[int]] = {}
        for point in points:
            if phase_name(point) == name:
                lengths.setdefault(point["batch"], set()).add(point["prompt_tokens"])
        told = {batch: ", ".join(map(str, sorted(found))) for batch, found in sorted(lengths.items())}
        if len(set(told.values())) == 1:
            where = next(iter(told.values()))
        else:
            where = " and ".join(f"{text} (batch {batch})" for batch, text in told.items())
        at.append(f"{name} measured at {where} prompt tokens")
    text = "; ".join(at)
    if any(point.get("captured") for point in points):
        text += " without the host's part of a decoding step"
    return f"{text}, between lengths interpolated and beyond them as at the nearest"


def _curve(points: Sequence[dict[str, Any]], phase: str, batch: int, name: str) -> list[tuple[float, float]]:
    found = [
        (float(p["prompt_tokens"]), p["variants"][name]["j_per_token_mean"])
        for p in points
        if p["phase"] == phase and p["batch"] == batch and "j_per_token_mean" in p["variants"].get(name, {})
    ]
    return sorted(found)


def _interpolated(curve: list[tuple[float, float]], lengths: np.ndarray) -> np.ndarray:
    at, joules = np.asarray(curve).T
    return np.interp(lengths, at, joules)
