"""What a report shows: which metric of which task is which quantity, and the figures made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from kvquant.report.collect import Run
from kvquant.report.series import NamedPairs, Pairs, Variant

# A quantity by its names in the metrics of different tasks: the first that a run has.
EFFECTIVE_BITS = ("effective_bits", "memory.quantized.effective_bits")
PERPLEXITY = ("perplexity_quantized", "quality.perplexity_quantized")
PERPLEXITY_EXACT = ("perplexity_exact", "quality.perplexity_exact")
EXCESS = ("perplexity_excess_percent", "quality.perplexity_excess_percent")
KL = ("kl_mean", "quality.kl_mean")
# Of an entry that task=compare makes for each method.
VARIANT_COLUMNS = (
    ("effective bits", ("effective_bits",), ".3f", 1.0),
    ("perplexity", ("perplexity",), ".3f", 1.0),
    ("excess [%]", ("perplexity_excess_percent", "estimate"), "+.2f", 1.0),
    ("KL [nats]", ("kl", "estimate"), ".2e", 1.0),
    ("changed top-1 [%]", ("flips", "estimate"), ".2f", 100.0),
    ("pass keys [%]", ("passkey", "estimate"), ".0f", 100.0),
)


@dataclasses.dataclass(frozen=True)
class Headline:
    """A column of the tables: its title, where to find it, how to print it, and a factor for its unit."""

    title: str
    keys: tuple[str, ...]
    spec: str
    factor: float = 1.0


HEADLINES = (
    Headline("effective bits", EFFECTIVE_BITS, ".3f"),
    Headline("perplexity, exact", PERPLEXITY_EXACT, ".3f"),
    Headline("perplexity", PERPLEXITY, ".3f"),
    Headline("excess [%]", EXCESS, "+.2f"),
    Headline("KL [nats]", KL, ".2e"),
    Headline("top-1 [%]", ("top1_agreement", "quality.top1_agreement"), ".2f", 100),
    Headline("held [MiB]", ("memory.quantized.held_bytes",), ".2f", 2**-20),
    Headline("TTFT [s]", ("prefill.ttft_s_quantized",), ".3f"),
    Headline("TTFT, exact [s]", ("prefill.ttft_s_exact",), ".3f"),
    Headline("decode [tokens/s]", ("decode.tokens_per_s_quantized",), ".1f"),
    Headline("decode, exact [tokens/s]", ("decode.tokens_per_s_exact",), ".1f"),
    Headline("accuracy [%]", ("accuracy_quantized", "accuracy"), ".2f", 100),
)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes: its quantity's name with the unit, and the lines in it."""

    y_label: str
    variants: tuple[Variant, ...]
    log_y: bool = False


@dataclasses.dataclass(frozen=True)
class FigureSpec:
    """A figure: file name, title, the settings that change along its x axis, and its panels.

    Attributes:
        pareto: draw points and the front of those that no other beats in both, instead of lines.
    """

    name: str
    title: str
    x_label: str
    axis: tuple[str, ...]
    panels: tuple[Panel, ...]
    log_x: bool = True
    pareto: bool = False


def _pair(x: Callable[[Run], float | None], *keys: str) -> Callable[[Run], Pairs]:
    def pairs(run: Run) -> Pairs:
        at, y = x(run), run.metric(*keys)
        return [] if at is None or y is None else [(at, y)]

    return pairs


def _against_bits(plain: tuple[str, ...], *in_variant: str) -> Callable[[Run], Pairs]:
    """A quality against effective bits: one point of a run, or one of each variant that ``task=compare`` measured."""
    single = _pair(_metric(*EFFECTIVE_BITS), *plain)

    def pairs(run: Run) -> Pairs:
        entries = variants_of(run).values()
        found = [(entry.get("effective_bits"), _inner(entry, in_variant)) for entry in entries]
        return [(float(x), float(y)) for x, y in found if x is not None and y is not None] or single(run)

    return pairs


def variants_of(run: Run) -> dict[str, dict[str, Any]]:
    """The methods that one run compared, by label; empty where it measured one."""
    variants = run.result["metrics"].get("variants")
    if not isinstance(variants, dict):
        return {}
    return {label: entry for label, entry in variants.items() if isinstance(entry, dict)}


def _inner(entry: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = entry
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _setting(key: str) -> Callable[[Run], float | None]:
    def x(run: Run) -> float | None:
        value = run.config(key)
        return float(value) if isinstance(value, int | float) else None

    return x


def _metric(*keys: str) -> Callable[[Run], float | None]:
    return lambda run: run.metric(*keys)


def _mean_length(run: Run) -> float | None:
    tokens, prompts = run.metric("batch.tokens"), run.metric("batch.prompts")
    return tokens / prompts if tokens and prompts else None


def _both(x: Callable[[Run], float | None], key: str) -> tuple[Variant, Variant]:
    """A metric of the exact and of the quantized cache; the exact one does not depend on how others quantize."""
    return (
        Variant("exact", _pair(x, key.format("exact")), ignores=("quant", "calibration")),
        Variant("quantized", _pair(x, key.format("quantized"))),
    )


def _against_fraction(*in_variant: str) -> Callable[[Run], NamedPairs]:
    """A number of each method that ``task=compare`` measured against its outlier fraction, a line per method and width."""

    def pairs(run: Run) -> NamedPairs:
        found: NamedPairs = {}
        for entry in variants_of(run).values():
            x, y = entry.get("outlier_fraction"), _inner(entry, in_variant)
            if x is not None and y is not None:
                bits = "/".join(map(str, dict.fromkeys((entry["key_bits"], entry["value_bits"]))))
                found.setdefault(f"{entry['method']}, {bits} bits", []).append((float(x), float(y)))
        # One fraction is a point, not a line.
        return {name: points for name, points in found.items() if len({x for x, _ in points}) > 1}

    return pairs


def _append(way: str) -> Callable[[Run], Pairs]:
    def pairs(run: Run) -> Pairs:
        by_way = run.result["metrics"].get("append_s")
        at = by_way.get(way) if isinstance(by_way, dict) else None
        if not isinstance(at, dict):
            return []
        return [(float(n), 1e6 * s) for n, s in at.items() if isinstance(s, int | float)]

    return pairs


def variant_numbers(entry: dict[str, Any]) -> list[str]:
    """The text of `VARIANT_COLUMNS` for one method; empty where it was not measured."""
    values = [(_inner(entry, keys), spec, factor) for _, keys, spec, factor in VARIANT_COLUMNS]
    return ["" if value is None else format(factor * value, spec) for value, spec, factor in values]


LENGTH_SETTINGS = tuple(
    f"batch.{name}"
    for name in (
        "kind",
        "prompt_tokens",
        "quantile_levels",
        "trace_quantiles",
        "trace_path",
        "max_fraction_of_context",
    )
)
_PROMPTS = _metric("batch.prompts")
_BLOCK, _FRACTION = _setting("cache.block_size"), _setting("quant.outlier_fraction")
_WAYS = ("blocks_exact", "blocks_quantized", "blocked_csc", "cat_fp16", "cat_csc")

FIGURES = (
    FigureSpec(
        "quality_bits",
        "Perplexity against effective bits; lines: the Pareto front",
        "effective bits per number held, all in",
        ("quant", "cache"),
        (
            Panel("perplexity", (Variant("", _against_bits(PERPLEXITY, "perplexity")),)),
            Panel(
                "KL from the exact cache [nats]",
                (Variant("", _against_bits(KL, "kl", "estimate")),),
                log_y=True,
            ),
        ),
        log_x=False,
        pareto=True,
    ),
    FigureSpec(
        "speed_batch",
        "Time to first token and throughput against the number of prompts",
        "prompts in the batch",
        ("batch.num_prompts",),
        (
            Panel("time to first token [s]", _both(_PROMPTS, "prefill.ttft_s_{}"), log_y=True),
            Panel("prefill [tokens/s]", _both(_PROMPTS, "prefill.tokens_per_s_{}"), log_y=True),
            Panel("decode [tokens/s]", _both(_PROMPTS, "decode.tokens_per_s_{}"), log_y=True),
        ),
    ),
    FigureSpec(
        "speed_length",
        "Time to first token and throughput against the mean length of a prompt",
        "tokens per prompt (mean)",
        LENGTH_SETTINGS,
        (
            Panel("time to first token [s]", _both(_mean_length, "prefill.ttft_s_{}"), log_y=True),
            Panel("prefill [tokens/s]", _both(_mean_length, "prefill.tokens_per_s_{}"), log_y=True),
            Panel("decode [tokens/s]", _both(_mean_length, "decode.tokens_per_s_{}"), log_y=True),
        ),
    ),
    FigureSpec(
        "memory_tokens",
        "Bytes the cache holds against tokens held",
        "tokens of the batch",
        ("batch",),
        (Panel("held [bytes]", _both(_metric("batch.tokens"), "memory.{}.held_bytes"), log_y=True),),
    ),
    FigureSpec(
        "append_tokens",
        "Cost of appending one token against tokens already stored",
        "tokens already stored",
        ("task.lengths",),
        (Panel("us per appended token", tuple(Variant(way, _append(way)) for way in _WAYS), log_y=True),),
    ),
    FigureSpec(
        "block_size",
        "What the block size costs",
        "tokens per block",
        ("cache.block_size",),
        (
            Panel("effective bits", (Variant("", _pair(_BLOCK, *EFFECTIVE_BITS)),)),
            Panel("time to first token [s]", (Variant("", _pair(_BLOCK, "prefill.ttft_s_quantized")),)),
        ),
    ),
    FigureSpec(
        "outlier_fraction",
        "What exact outliers buy, and what they weigh",
        "outlier fraction",
        ("quant.outlier_fraction",),
        (
            Panel(
                "effective bits",
                (
                    Variant("", _pair(_FRACTION, *EFFECTIVE_BITS)),
                    Variant("", _against_fraction("effective_bits")),
                ),
            ),
            Panel(
                "excess perplexity [%]",
                (
                    Variant("", _pair(_FRACTION, *EXCESS)),
                    Variant("", _against_fraction("perplexity_excess_percent", "estimate")),
                ),
            ),
        ),
        log_x=False,
    ),
)
