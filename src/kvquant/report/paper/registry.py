"""The list of the paper's macros: name, source, place in result.json, format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kvquant.report.paper.energy_macros import energy_macros
from kvquant.report.paper.kernel_macros import kernel_macros, largest_macros
from kvquant.report.paper.macro import WORDS, Macro


def _variant(prefix: str, source: str, label: str, *, passkeys: bool = True) -> Iterator[Macro]:
    """What a table of methods says of one row."""
    at = ("metrics", "variants", label)
    yield Macro(f"{prefix}Bits", source, (*at, "effective_bits"))
    for name, key, spec, factor in (
        ("ExcessPpl", "perplexity_excess_percent", ".2f", 1.0),
        ("Kl", "kl", ".1f", 1e3),
        ("Flips", "flips", ".1f", 100.0),
        *([("Passkey", "passkey", ".0f", 100.0)] if passkeys else []),
    ):
        yield Macro(f"{prefix}{name}", source, (*at, key, "estimate"), spec, factor)
        yield Macro(f"{prefix}{name}Interval", source, (*at, key), spec, factor, True)


def _ratios(prefix: str, source: str, label: str) -> Iterator[Macro]:
    """A row against the baseline's curve at its own effective bits."""
    at = ("metrics", "variants", label)
    yield Macro(f"{prefix}KlRatioInterval", source, (*at, "kl_ratio"), ".2f", 1.0, True)
    yield Macro(f"{prefix}ExcessRatioInterval", source, (*at, "excess_ratio"), ".2f", 1.0, True)


def _quality() -> Iterator[Macro]:
    for source, scale in (("main", ""), ("llama", "Llama")):
        for bits, word in WORDS.items():
            if bits == 8:
                continue
            for family, label in (
                ("Nuq", f"nuq{bits}-1%"),
                ("NuqDense", f"nuq{bits}"),
                ("Uniform", f"uniform{bits}-1%"),
                ("UniformDense", f"uniform{bits}"),
                ("NormalFloat", f"normal_float{bits}-1%"),
                ("Hadamard", f"hadamard{bits}"),
                ("Kivi", f"kivi{bits} recent_tokens=32"),
            ):
                yield from _variant(f"{scale}{family}{word}", source, label)
                if not family.startswith("Nuq"):
                    yield from _ratios(f"{scale}{family}{word}", source, label)
        yield Macro(f"{scale}MainPerplexityExact", source, ("metrics", "perplexity_exact"))
        yield Macro(f"{scale}MainWindows", source, ("metrics", "windows"), "d")
        yield Macro(f"{scale}MainWindowTokens", source, ("metrics", "window_tokens"), ",d")
        yield Macro(f"{scale}MainPasskeys", source, ("metrics", "passkeys"), "d")
        yield Macro(f"{scale}MainPasskeyTokens", source, ("config", "task", "passkey_length"), ",d")
        yield Macro(f"{scale}MainDevice", source, ("provenance", "device"))
    for bits in (2, 3):
        yield from _variant(f"WindowNuq{WORDS[bits]}", "window", f"nuq{bits}-1%")
        yield from _variant(f"Window{WORDS[bits]}", "window", f"nuq_window{bits}")
        yield from _ratios(f"Window{WORDS[bits]}", "window", f"nuq_window{bits}")
        for name, label in (
            ("OptionsNuq", f"nuq{bits}-1%"),
            ("OptionsScaleFisher", f"nuq{bits}-1% fisher_scale2"),
            ("OptionsQnorm", f"nuq{bits}-1% qnorm=True"),
            ("OptionsSinks", f"nuq{bits}-1% sink_tokens=4"),
            ("OptionsTokenNorm", f"nuq_token_norm{bits}-1%"),
            ("OptionsRecent", f"nuq{bits} recent_tokens=32"),
            ("OptionsRecentQnorm", f"nuq{bits} recent_tokens=32 qnorm=True"),
        ):
            yield from _variant(f"{name}{WORDS[bits]}", "options", label, passkeys=False)
    variants = ("metrics", "variants")
    yield Macro(
        "EightBitMethods", "eightbit", variants, "d", 1.0, False, _count_rows, "rows but the exact one"
    )
    yield Macro(
        "EightBitHolds", "eightbit", variants, "d", 1.0, False, _count_equal, "rows that are equivalent"
    )
    yield Macro("EightBitMargin", "eightbit", ("config", "task", "margin_nats"), ".3f")


def _count_rows(variants: dict[str, Any]) -> int:
    return len(variants) - 1


def _count_equal(variants: dict[str, Any]) -> int:
    return sum(entry["equivalence"]["holds"] for label, entry in variants.items() if label != "exact")


def _prefill() -> Iterator[Macro]:
    for source, scale in (("prefill", ""), ("llamaprefill", "Llama")):
        for name, path, spec, factor in (
            ("BatchPrompts", ("batch", "prompts"), "d", 1),
            ("BatchTokens", ("batch", "tokens"), ",d", 1),
            ("ModelMillions", ("model", "parameters"), ",.1f", 1e-6),
            ("ModelLayers", ("model", "num_layers"), "d", 1),
            ("ModelQueryHeads", ("model", "num_query_heads"), "d", 1),
            ("ModelKvHeads", ("model", "num_kv_heads"), "d", 1),
            ("ModelHeadDim", ("model", "head_dim"), "d", 1),
            ("ModelContext", ("model", "max_length"), ",d", 1),
            ("BatchBitsExact", ("memory", "exact", "effective_bits"), ".2f", 1),
            ("BatchBits", ("memory", "quantized", "effective_bits"), ".2f", 1),
            ("BatchCompression", ("memory", "compression"), ".2f", 1),
            ("BatchKeyOutliers", ("memory", "quantized", "key_outlier_fraction"), ".2f", 100),
            ("BatchExcessPpl", ("quality", "perplexity_excess_percent"), ".2f", 1),
            ("CapacityExact", ("capacity", "sequences_exact"), ",d", 1),
            ("CapacityQuantized", ("capacity", "sequences_quantized"), ",d", 1),
            ("CapacityRatio", ("capacity", "sequences_ratio"), ".2f", 1),
            ("CapacityBudgetGib", ("capacity", "budget_bytes"), ".3g", 2**-30),
            ("TtftExact", ("prefill", "ttft_s_exact"), ".3f", 1),
            ("TtftQuantized", ("prefill", "ttft_s_quantized"), ".3f", 1),
            ("TtftOverhead", ("prefill", "ttft_overhead_percent"), ".1f", 1),
            ("StoreShare", ("prefill", "store_percent_of_exact_ttft"), ".1f", 1),
            ("DecodeExact", ("decode", "tokens_per_s_exact"), ".0f", 1),
            ("DecodeQuantized", ("decode", "tokens_per_s_quantized"), ".0f", 1),
        ):
            yield Macro(f"{scale}{name}", source, ("metrics", *path), spec, factor)
        lengths = ("metrics", "batch", "lengths")
        yield Macro(f"{scale}BatchShortest", source, lengths, ",d", 1.0, False, min, "smallest")
        yield Macro(f"{scale}BatchLongest", source, lengths, ",d", 1.0, False, max, "largest")
        yield Macro(f"{scale}BatchDevice", source, ("provenance", "device"))
        yield Macro(f"{scale}BlockSize", source, ("config", "cache", "block_size"), "d")


def _storage() -> Iterator[Macro]:
    at = ("metrics", "flatness")
    lengths = ("config", "task", "lengths")
    yield Macro("AppendFrom", "allocation", lengths, ",d", 1.0, False, min, "smallest")
    yield Macro("AppendTo", "allocation", lengths, ",d", 1.0, False, max, "largest")
    for name, way in (
        ("Blocks", "blocks_exact"),
        ("BlocksQuantized", "blocks_quantized"),
        ("Outliers", "blocked_csc"),
        ("Cat", "cat_fp16"),
        ("CatOutliers", "cat_csc"),
    ):
        yield Macro(f"Append{name}Growth", "allocation", (*at, way))
        yield Macro(f"Append{name}Long", "allocation", ("metrics", "append_s", way, "32768"), ",.0f", 1e6)
    for name, key in (("Blocks", "cat_fp16_over_blocks_exact"), ("Outliers", "cat_csc_over_blocked_csc")):
        yield Macro(f"CatOver{name}", "allocation", ("metrics", key, "32768"), ".1f")
    yield Macro(
        "CatOverBlocksQuantized", "allocation", ("metrics", "cat_fp16_over_blocks_quantized", "32768"), ".1f"
    )
    for name, path, spec in (
        ("QuantizeSpeedup", ("speedup",), ".1f"),
        ("QuantizeKeysOverCopy", ("keys_over_copy",), ".1f"),
        ("QuantizeValuesOverCopy", ("values_over_copy",), ".1f"),
        ("CpuDecodeSpeedup", ("decode", "speedup"), ".2f"),
        ("CpuDecodePeak", ("decode", "peak_percent_of_dense_cache"), ".1f"),
        ("CpuDecodeTokens", ("decode", "tokens"), ",d"),
        ("CpuStoreShare", ("prefill", "store_percent_of_exact_ttft"), ".1f"),
        ("CpuPrefillOverhead", ("prefill", "paired_overhead_percent"), ".1f"),
        ("CpuPrefillTokens", ("prefill", "tokens"), ",d"),
    ):
        yield Macro(name, "quantize", ("metrics", *path), spec)
    yield Macro("QuantizeTokens", "quantize", ("config", "task", "tokens"), ",d")
    yield Macro("QuantizeChannels", "quantize", ("config", "task", "channels"), ",d")
    yield Macro("QuantizeDevice", "quantize", ("provenance", "device"))


def _serving() -> Iterator[Macro]:
    yield Macro("ServeRequests", "serve", ("config", "task", "num_requests"), "d")
    yield Macro("ServeBudgetMib", "serve", ("config", "task", "memory_budget_gib"), ".3g", 1024)
    yield Macro("ServeRatio", "serve", ("metrics", "concurrency_ratio"))
    for cache, word in (("exact", "Exact"), ("quantized", "Quantized")):
        for name, key, spec in (
            ("HeldMax", "held_max", "d"),
            ("HeldMean", "held_mean_memory_bound", ".1f"),
            ("Lost", "lost", "d"),
            ("Preemptions", "preemptions", "d"),
            ("TtftMedian", "ttft_s_p50", ".1f"),
            ("Makespan", "makespan_s", ".1f"),
            ("Rate", "new_tokens_per_s", ".0f"),
        ):
            yield Macro(f"Serve{word}{name}", "serve", ("metrics", cache, key), spec)


def _history() -> Iterator[Macro]:
    lengths = ("config", "task", "lengths")
    yield Macro("HistoryFrom", "history", lengths, ",d", 1.0, False, min, "smallest")
    yield Macro("HistoryTo", "history", lengths, ",d", 1.0, False, max, "largest")
    yield Macro("HistoryChunk", "history", ("config", "task", "chunk_tokens"), ",d")
    for name, cache in (("Quantized", "quantized"), ("Exact", "exact"), ("Stock", "stock")):
        extra = ("metrics", cache, "extra_bytes")
        yield Macro(f"History{name}First", "history", extra, ".1f", 2**-20, False, _first, "shortest history")
        yield Macro(f"History{name}Last", "history", extra, ".1f", 2**-20, False, _last, "longest history")
        share = ("metrics", cache, "share_of_dequantized_layer")
        yield Macro(f"History{name}Share", "history", share, ".1f", 100)


def _first(by_length: dict[str, Any]) -> Any:
    return by_length[min(by_length, key=int)]


def _last(by_length: dict[str, Any]) -> Any:
    return by_length[max(by_length, key=int)]


def _ruler() -> Iterator[Macro]:
    categories = ("metrics", "categories")
    yield Macro("RulerBits", "ruler", ("config", "quant", "bits"), "d")
    yield Macro("RulerTokens", "ruler", ("config", "task", "length"), ",d")
    yield Macro("RulerCount", "ruler", ("config", "task", "count"), "d")
    for name, key in (("Exact", "score_exact"), ("Quantized", "score_quantized")):
        mean = MEANS[key]
        yield Macro(f"Ruler{name}", "ruler", categories, ".1f", 100, False, mean, f"mean of {key}")


def _mean_of(key: str) -> Callable[[dict[str, Any]], float]:
    return lambda categories: sum(entry[key] for entry in categories.values()) / len(categories)


MEANS = {key: _mean_of(key) for key in ("score_exact", "score_quantized")}


MACROS: tuple[Macro, ...] = (
    *_quality(),
    *_prefill(),
    *_storage(),
    *_serving(),
    *largest_macros(),
    *energy_macros(),
    *_history(),
    *_ruler(),
    *kernel_macros(),
)
