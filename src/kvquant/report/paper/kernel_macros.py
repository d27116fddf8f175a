"""Macros of the bench on a GPU: what kernels take beside full precision, and how many prompts fit."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from kvquant.report.kernel_cases import SPEEDUP, cases_of, us_per_1k_tokens, values
from kvquant.report.paper.macro import WORDS, Macro, Where

WIDTHS = (2, 3, 4)
SHAPE = ("shape", "llama31_8b")
# What the text gives figures of: word, and what tells the case from others.
DECODE = {
    "": (("label", "8x32768"),),
    "Many": (("label", "64x32768"),),
    "One": (("label", "1x32768"),),
    "Long": (("label", "1x131072"),),
    "Ragged": (("is_trace", True),),
}
PREFILL = {"": (("label", "8x32768"),), "Long": (("label", "1x131072"),)}
PROMPTS = {"OneK": 1024, "EightK": 8192, "ThirtyTwoK": 32768, "HundredK": 131072}
# Ranges over all widths and the histories of a part of the bench.
RANGES = {
    "DecodeOne": ("decode", {"batch": 1}),
    "DecodeShort": ("decode", {"tokens": 1024}),
    "PrefillOne": ("prefill", {"batch": 1}),
    "PrefillFew": ("prefill", {"batch": 8}),
    "PrefillMany": ("prefill", {"batch": 64}),
}


def _row(*conditions: tuple[str, Any]) -> tuple[Any, ...]:
    return ("metrics", "rows", Where(conditions))


def kernel_macros() -> Iterator[Macro]:
    """Yield what the text says of ``task=kernels`` on a GPU."""
    yield Macro("KernelDevice", "kernels", ("provenance", "device"))
    yield Macro(
        "KernelCode", "kernels", ("provenance", "git_sha"), "", 1.0, False, _short, "first ten characters"
    )
    yield Macro("KernelCopy", "kernels", ("metrics", "copy_gb_per_s"), ",.0f")
    for operation, cases in (("decode", DECODE), ("prefill", PREFILL)):
        for word, conditions in cases.items():
            for bits in WIDTHS:
                row = _row(("operation", operation), SHAPE, ("bits", bits), *conditions)
                prefix = f"Kernel{operation.title()}{word}{WORDS[bits]}"
                yield Macro(f"{prefix}Speedup", "kernels", (*row, SPEEDUP))
                yield Macro(
                    f"{prefix}OverDense", "kernels", (*row, "speedup_over_dequantize_then_attend"), ".1f"
                )
                yield Macro(f"{prefix}Copy", "kernels", (*row, "copy_fraction"), ".0f", 100)
                yield Macro(f"{prefix}Us", "kernels", (*row, "us"), ",.0f")
            rival = _row(("operation", operation), SHAPE, *conditions)
            yield Macro(
                f"Kernel{operation.title()}{word}Full", "kernels", (*rival, "full_precision_us"), ",.0f"
            )
    ragged = _row(("operation", "decode"), SHAPE, *DECODE["Ragged"])
    yield Macro("KernelRaggedSequences", "kernels", (*ragged, "batch"), "d")
    yield Macro("KernelRaggedMean", "kernels", (*ragged, "mean_tokens"), ",.0f")
    yield Macro("KernelRaggedLongest", "kernels", (*ragged, "tokens"), ",d")
    for name, (operation, only) in RANGES.items():
        for end, pick in (("Least", min), ("Most", max)):
            compute = functools.partial(_extreme, pick=pick, operation=operation, only=only)
            how = f"{'smallest' if pick is min else 'largest'} {SPEEDUP} of {operation}, {only}, uneven ones left out"
            yield Macro(f"Kernel{name}{end}", "kernels", ("metrics", "rows"), ".2f", 1.0, False, compute, how)
    for bits in WIDTHS:
        for word, tokens in PROMPTS.items():
            row = _row(("operation", "layer_share"), SHAPE, ("bits", bits), ("tokens", tokens))
            yield Macro(f"KernelShare{word}{WORDS[bits]}", "kernels", (*row, "percent_of_layer"))
            took, how = us_per_1k_tokens, "us for 1,024 of its tokens"
            yield Macro(f"KernelWrite{word}{WORDS[bits]}", "kernels", row, ".1f", 1.0, False, took, how)
        wide = _row(("operation", "layer_share"), ("shape", "llama2_7b"), ("bits", bits), ("tokens", 32768))
        yield Macro(f"KernelShareWide{WORDS[bits]}", "kernels", (*wide, "percent_of_layer"))


def _extreme(
    rows: Sequence[dict[str, Any]], *, pick: Any, operation: str, only: dict[str, Any]
) -> float | None:
    fitting = [
        row
        for row in rows
        if row["shape"] == SHAPE[1] and not row["is_trace"] and all(row[key] == v for key, v in only.items())
    ]
    found = values(cases_of(fitting, operation), SPEEDUP, even=True)
    return float(pick(found)) if found else None


def _short(sha: str) -> str:
    return sha[:10]


def largest_macros() -> Iterator[Macro]:
    """Yield what the text says of ``task=largest_batch`` on a GPU."""
    yield Macro("LargestDevice", "largest", ("provenance", "device"))
    yield Macro("LargestTokens", "largest", ("config", "task", "prompt_tokens"), ",d")
    yield Macro("LargestExact", "largest", ("metrics", "exact_sequences"), "d")
    for bits in WIDTHS:
        yield Macro(f"LargestNuq{WORDS[bits]}", "largest", ("metrics", f"nuq{bits}_sequences"), "d")
        yield Macro(f"LargestNuq{WORDS[bits]}Times", "largest", ("metrics", f"nuq{bits}_times_exact"), ".1f")
