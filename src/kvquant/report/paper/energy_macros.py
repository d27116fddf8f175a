"""The paper's numbers of energy: joules by phase, batch and history, how long steps took, what speaks for the meter."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

from kvquant.report.paper.macro import WORDS, Macro, Where
from kvquant.report.paper.sources import LONG_TOKENS

ENERGY_BATCH = {"prefill": 8, "decode": 32}
"""Sequences at the points that the text gives joules of."""
CACHES = {"Exact": "none", **{f"Nuq{WORDS[bits]}": f"nuq{bits}" for bits in (2, 3, 4)}}
"""Labels of the caches by what macros call them."""


def _energy_point(phase: str, batch: int, **more: int) -> tuple[Any, ...]:
    return ("metrics", "points", Where((("phase", phase), ("batch", batch), *more.items())))


def energy_macros() -> Iterator[Macro]:
    """Yield what the text says of joules, steps, the meter and a fleet."""
    for phase, batch in ENERGY_BATCH.items():
        source, prefix = f"energy{phase}", f"Energy{phase.title()}"
        point = _energy_point(phase, batch)
        for name, label in CACHES.items():
            at = (*point, "variants", label)
            yield Macro(f"{prefix}{name}Mj", source, (*at, "j_per_token_mean"), ".2f", 1e3)
            yield Macro(f"{prefix}{name}Carbon", source, (*at, "gco2e_per_million_tokens"), ".2f")
        yield from _energy_watts(prefix, source, point)
        yield from _energy_ratios(prefix, source, point)
        for name, key, spec in (("Batch", "batch", "d"), ("Tokens", "prompt_tokens", ",d")):
            yield Macro(f"{prefix}{name}", source, (*point, key), spec)
        yield Macro(f"{prefix}Device", source, ("provenance", "device"))
        commit = ("provenance", "git_sha")
        yield Macro(f"{prefix}Code", source, commit, "", 1.0, False, _short, "first ten characters")
        yield Macro(f"{prefix}Layers", source, ("metrics", "model", "num_layers"), "d")
        yield Macro(f"{prefix}Windows", source, ("config", "task", "windows"), "d")
        yield Macro(f"{prefix}WindowSeconds", source, ("config", "task", "window_s"), ".0f")
        yield Macro(f"{prefix}Grid", source, ("metrics", "carbon", "g_per_kwh"), ".0f")
        agreement = ("metrics", "agreement")
        yield Macro(f"{prefix}AgreementSeconds", source, (*agreement, "window_s"), ".0f")
        apart = (*agreement, "disagreement_percent")
        yield Macro(f"{prefix}Disagreement", source, apart, ".2f", 1.0, False, abs, "without its sign")
        yield _largest_cv(prefix, source)
    how = "whether steps were captured"
    yield Macro("EnergyDecodeSteps", "energydecode", ("config", "task"), "d", 1.0, False, _launched, how)
    batch = ENERGY_BATCH["decode"]
    yield from _energy_steps("EnergyDecode", "energydecode", _energy_point("decode", batch))
    # Fewer sequences, the same batch after a longer history, and more prompts at once.
    long = _energy_point("decode", batch, prompt_tokens=LONG_TOKENS)
    for name, source, point in (
        ("One", "energydecode", _energy_point("decode", 1)),
        ("Eight", "energydecode", _energy_point("decode", 8)),
        ("Long", "energydecodelong", long),
    ):
        for numbers in (_energy_ratios, _energy_steps, _energy_watts):
            yield from numbers(f"EnergyDecode{name}", source, point)
    yield Macro("EnergyDecodeLongTokens", "energydecodelong", (*long, "prompt_tokens"), ",d")
    yield _largest_cv("EnergyDecodeLong", "energydecodelong")
    many = _energy_point("prefill", batch)
    yield from _energy_ratios("EnergyPrefillMany", "energyprefill", many)
    yield Macro("EnergyPrefillManyBatch", "energyprefill", (*many, "batch"), "d")
    yield Macro("EnergySystematic", "energydecode", ("metrics", "meter", "systematic_percent"), ".0f")
    yield Macro("EnergyLoadDevice", "energyload", ("provenance", "device"))
    for name, key, spec in (("Intercept", "intercept", ".0f"), ("Slope", "slope", ".3f")):
        yield Macro(f"EnergyLoad{name}", "energyload", ("metrics", "load", key), spec, 1.0, True)
    yield Macro("EnergyLoadResidual", "energyload", ("metrics", "load", "max_residual_percent"), ".1f")
    joules = ("metrics", "load", "above_idle_j")
    yield Macro("EnergyLoadLeast", "energyload", joules, ",.0f", 1.0, False, min, "smallest")
    yield Macro("EnergyLoadMost", "energyload", joules, ",.0f", 1.0, False, max, "largest")
    for pace in ("host", "device"):
        yield Macro(f"MeterCost{pace.title()}", "metercost", (pace, "share"), ".2f", 100, True)
    assumed = ("metrics", "fleet", "assumptions")
    yield Macro("FleetRequests", "energydecode", (*assumed, "requests_per_day"), ",d")
    yield Macro("FleetPromptTokens", "energydecode", (*assumed, "mean_context_tokens"), ",.0f")
    yield Macro("FleetAnswerTokens", "energydecode", (*assumed, "mean_generated_tokens"), ",.0f")
    yield Macro("FleetPue", "energydecode", (*assumed, "pue"), "g")


def _energy_ratios(prefix: str, source: str, point: tuple[Any, ...]) -> Iterator[Macro]:
    """Joules of each width as a share of the exact cache's: in all, where nothing is against it, and above idle."""
    for bits in (2, 3, 4):
        name, label = f"{prefix}Nuq{WORDS[bits]}", f"nuq{bits}"
        yield Macro(f"{name}Ratio", source, (*point, "headline", label), ".3f", 1.0, True)
        yield Macro(f"{name}AboveIdle", source, (*point, "ratios", label, "above_idle"), ".3f", 1.0, True)


def _energy_steps(prefix: str, source: str, point: tuple[Any, ...]) -> Iterator[Macro]:
    """How long a step of decoding takes with each cache."""
    for name, label in CACHES.items():
        step, how = functools.partial(_step_s, label=label), f"seconds of a step, {label}"
        yield Macro(f"{prefix}{name}Step", source, point, ".2f", 1e3, False, step, how)


def _energy_watts(prefix: str, source: str, point: tuple[Any, ...]) -> Iterator[Macro]:
    for name, label in CACHES.items():
        yield Macro(f"{prefix}{name}Watts", source, (*point, "variants", label, "power_w"), ".0f")


def _largest_cv(prefix: str, source: str) -> Macro:
    points, how = ("metrics", "points"), "largest coefficient of variation"
    return Macro(f"{prefix}LargestCv", source, points, ".1f", 1.0, False, _cv_of, how)


def _cv_of(points: list[dict[str, Any]]) -> float | None:
    return max(
        (c["cv_percent"] for p in points for c in p["variants"].values() if "cv_percent" in c), default=None
    )


def _step_s(point: dict[str, Any], label: str) -> float | None:
    """How long a decoding step of all sequences takes."""
    took = point["variants"].get(label, {}).get("s_per_token")
    return float(point["batch"] * statistics.mean(took)) if took else None


def _short(sha: str) -> str:
    return sha[:10]


def _launched(task: dict[str, Any]) -> str:
    # Runs from before the setting launched them.
    return "replayed as a CUDA graph" if task.get("cuda_graph") else "launched one by one from Python"
