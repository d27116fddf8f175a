"""``task=prefill``, the main job: what quantizing the KV cache during the prefill of a real batch costs and saves.

Its items are the comparison of predictions and each repeat of the timing. A repeat measures both caches one after the
other, so that the ratio of a pair never spans two processes; a job that is queued again measures the missing repeats
after a warm-up of its own, and finished ones keep their numbers.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from kvquant.block_layout import BlockLayout
from kvquant.calibration import Calibration, exact_calibration
from kvquant.data.prompts import cut_prompts, prompt_lengths
from kvquant.energy.validity import MIN_WINDOWS, window_faults
from kvquant.errors import DataError
from kvquant.measure import LogitComparison, Stopwatch, compare_logits
from kvquant.models import QuantizedCache, quantized_kv_cache
from kvquant.report.prefill_figures import draw_prefill_figures
from kvquant.statistics import mean_interval
from kvquant.tasks.prefill_table import prefill_table
from kvquant.tasks.setup import Workbench, open_workbench, progress

EXACT, QUANTIZED = "exact", "quantized"


@dataclasses.dataclass
class _Timing:
    """One repeat of one variant; energies are windows of the meter, as metrics."""

    ttft_s: float
    store_s: float
    decode_s: float
    append_s: float
    prefill_energy: dict[str, Any]
    decode_energy: dict[str, Any]


def run(cfg: Any, context: Any) -> None:
    """Prefill one ragged batch with a quantized and with an exact cache, decode from both, and compare.

    Args:
        cfg: the composed configuration.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    bench = open_workbench(cfg, context)
    lengths = prompt_lengths(cfg.batch, bench.context, cfg.seed)
    prompts = cut_prompts(bench.heldout(sum(lengths)), lengths)
    variants = {EXACT: exact_calibration(bench.shape), QUANTIZED: bench.calibration()}

    metrics = context.record.metrics
    metrics["batch"] = {"prompts": len(lengths), "tokens": sum(lengths), "lengths": lengths}
    with context.console.status("comparing next-token distributions"):
        comparison, metrics["memory"] = _compared(bench, context, variants, prompts)
    if cfg.cache.prefill_reads == "exact":
        # The prompt's own tokens were read exactly: nothing was compared.
        metrics["quality"] = {"skipped": "cache.prefill_reads=exact"}
    else:
        metrics["quality"] = {**comparison.metrics(), **_intervals(comparison, lengths)}
    metrics["capacity"] = _capacity(bench, variants, lengths)
    metrics.update(_measure_times(bench, context, variants, prompts))

    title, columns, rows = prefill_table(metrics, cfg)
    context.record.set_table(title, columns, rows)
    if cfg.task.figures:
        for path in draw_prefill_figures(metrics, comparison, lengths, context.run_dir):
            context.record.add_figure(path)


def new_cache(bench: Workbench, kv: Any, prompts: list[Tensor]) -> QuantizedCache:
    """A cache for a batch of prompts and what is decoded after them, sized to it unless the configuration says so."""
    settings = bench.cache_settings()
    if settings["num_blocks"] is None and settings["memory_budget_gib"] is None:
        size, extra = settings["block_size"], bench.cfg.batch.decode_tokens
        settings["num_blocks"] = sum(-(-(len(p) + extra) // size) for p in prompts)
    cache: QuantizedCache = kv.new_cache(max_sequences=len(prompts), **settings)
    return cache


def _compared(
    bench: Workbench, context: Any, variants: dict[str, Calibration], prompts: list[Tensor]
) -> tuple[LogitComparison, dict[str, Any]]:
    """`_compare` as an item."""
    item = context.items.get("comparison")
    if item is None:
        comparison, memory = _compare(bench, variants, prompts)
        arrays = {name: tensor.numpy() for name, tensor in vars(comparison).items()}
        item = context.items.commit("comparison", memory, arrays)
    return LogitComparison(**{name: torch.from_numpy(a) for name, a in item.arrays.items()}), item.values


def _intervals(comparison: LogitComparison, lengths: list[int]) -> dict[str, Any]:
    """95% intervals over prompts (tokens of one prompt are not independent) of what `metrics` gives as means."""
    predicted = [n - 1 for n in lengths if n > 1]
    out: dict[str, Any] = {"prompts_compared": len(predicted)}
    if len(predicted) < 2:
        return out
    delta = comparison.quantized_nll.double() - comparison.exact_nll.double()
    for name, per_token, shown in (
        ("perplexity_excess_percent", delta, lambda x: 100 * math.expm1(x)),
        ("kl_mean", comparison.kl.double(), float),
        ("top1_agreement", comparison.agrees.double(), float),
    ):
        interval = mean_interval([float(part.sum()) for part in per_token.split(predicted)], predicted)
        out[f"{name}_low"], out[f"{name}_high"] = shown(interval.low), shown(interval.high)
    return out


def _compare(
    bench: Workbench, variants: dict[str, Calibration], prompts: list[Tensor]
) -> tuple[LogitComparison, dict[str, Any]]:
    """Next-token distributions at every prompt position, and the bytes each cache holds for them."""
    logits: dict[str, Tensor] = {}
    memory: dict[str, Any] = {}
    tokens = sum(len(p) for p in prompts)
    elements = 2 * tokens * bench.shape.num_layers * bench.shape.num_kv_heads * bench.shape.head_dim
    for name, calibration in variants.items():
        with quantized_kv_cache(bench.model, calibration) as kv:
            cache = new_cache(bench, kv, prompts)
            logits[name] = cache.append(prompts, logits="all")
            memory[name] = {
                "held_bytes": cache.bytes_held,
                "pool_free_bytes": cache.bytes_free,
                "effective_bits": cache.effective_bits,
                "key_outlier_fraction": cache.key_outlier_fraction,
                "parts_bytes": _parts(cache),
            }
    memory["fp16_bytes"] = 2 * elements
    memory["compression"] = 2 * elements / memory[QUANTIZED]["held_bytes"]
    # The last position of a prompt has no next token to be right about.
    has_next = torch.ones(tokens, dtype=torch.bool)
    has_next[torch.tensor([len(p) for p in prompts]).cumsum(0) - 1] = False
    if not bool(has_next.any()):
        raise DataError(
            "prompts must hold at least 2 tokens to compare predictions, got 1 each; raise their length"
        )
    device = logits[EXACT].device
    rows = has_next.nonzero().flatten().to(device)
    targets = torch.cat(prompts).to(device)[rows + 1]
    return compare_logits(logits[EXACT][rows], logits[QUANTIZED][rows], targets), memory


def _parts(cache: QuantizedCache) -> dict[str, int]:
    """Bytes in use by kind: blocks by what they hold, then spill chunks, and tables with counters and sinks."""
    parts: dict[str, int] = {}
    for pool in cache.pools:
        layout, used = pool.layout, pool.blocks_in_use
        for name, (shape, dtype) in layout.block_shapes().items():
            kind = _kind(name)
            parts[kind] = (
                parts.get(kind, 0) + used * layout.num_layers * torch.Size(shape).numel() * dtype.itemsize
            )
    parts["tables and spill chunks"] = cache.bytes_held - sum(parts.values())
    return parts


def _kind(name: str) -> str:
    if "outlier" in name or "spill" in name:
        return "outliers"
    return (
        "ranges" if name in ("value_zero", "value_scale") else "codes" if name.endswith("codes") else "exact"
    )


def _capacity(bench: Workbench, variants: dict[str, Calibration], lengths: list[int]) -> dict[str, Any]:
    """How many sequences of this batch's mean size a pool of the given memory takes, spill headroom included."""
    budget_bytes = int(bench.cfg.task.memory_budget_gib * 2**30)
    size = bench.cfg.cache.block_size
    blocks_per_sequence = sum(-(-n // size) for n in lengths) / len(lengths)
    out: dict[str, Any] = {"budget_bytes": budget_bytes, "mean_tokens": sum(lengths) / len(lengths)}
    for name, calibration in variants.items():
        layout = BlockLayout(
            calibration.spec,
            bench.shape.num_layers,
            bench.shape.num_kv_heads,
            bench.shape.head_dim,
            bench.model.dtype,
            size,
            bench.cfg.cache.spill_headroom,
        )
        out[f"sequences_{name}"] = int(budget_bytes // layout.provisioned_block_bytes / blocks_per_sequence)
    out["sequences_ratio"] = out[f"sequences_{QUANTIZED}"] / max(1, out[f"sequences_{EXACT}"])
    return out


def _measure_times(
    bench: Workbench, context: Any, variants: dict[str, Calibration], prompts: list[Tensor]
) -> dict[str, Any]:
    """Time to first token and decode speed, variants taking turns so that drift hits both alike."""
    meter = context.meter  # opened before the clock starts
    warm = False

    def measure(repeat: int) -> dict[str, Any]:
        nonlocal warm
        names = list(variants) if repeat % 2 == 0 else list(reversed(variants))
        for name in [] if warm else names:
            _one_pass(bench, variants[name], prompts, meter)
        warm = True
        return {name: dataclasses.asdict(_one_pass(bench, variants[name], prompts, meter)) for name in names}

    repeats = progress(context.console)(
        range(bench.cfg.task.repeats), "prefill and decode", bench.cfg.task.repeats
    )
    items = [item.values for item in context.items.run(repeats, measure)]
    timings = {name: [_Timing(**item[name]) for item in items] for name in variants}
    decoded = bench.cfg.batch.decode_tokens * len(prompts)
    tokens = sum(len(p) for p in prompts)
    out: dict[str, Any] = {"prefill": {}, "decode": {}, "energy": {}}
    for name, runs in timings.items():
        out["prefill"][f"ttft_s_{name}"] = statistics.median(t.ttft_s for t in runs)
        out["prefill"][f"store_s_{name}"] = statistics.median(t.store_s for t in runs)
        out["prefill"][f"tokens_per_s_{name}"] = tokens / out["prefill"][f"ttft_s_{name}"]
        if decoded:
            out["decode"][f"tokens_per_s_{name}"] = decoded / statistics.median(t.decode_s for t in runs)
            out["decode"][f"append_s_per_token_{name}"] = (
                statistics.median(t.append_s for t in runs) / decoded
            )
        out["energy"][name] = _energy(
            [t.prefill_energy for t in runs], [t.decode_energy for t in runs], tokens, decoded
        )
    pairs = zip(timings[QUANTIZED], timings[EXACT], strict=True)
    overheads = [100 * (q.ttft_s / e.ttft_s - 1) for q, e in pairs]
    out["prefill"]["ttft_overhead_percent"] = statistics.median(overheads)
    # A machine that others use moves single pairs by more than the median is worth: the spread stands beside it.
    out["prefill"]["ttft_overhead_lowest_percent"] = min(overheads)
    out["prefill"]["ttft_overhead_highest_percent"] = max(overheads)
    store = out["prefill"][f"store_s_{QUANTIZED}"]
    out["prefill"]["store_percent_of_exact_ttft"] = 100 * store / out["prefill"][f"ttft_s_{EXACT}"]
    return out


def _one_pass(bench: Workbench, calibration: Calibration, prompts: list[Tensor], meter: Any) -> _Timing:
    device = next(bench.model.parameters()).device
    store, ttft, decode, append = (Stopwatch(device) for _ in range(4))
    with quantized_kv_cache(bench.model, calibration) as kv:
        cache = new_cache(bench, kv, prompts)
        cache.stopwatch = store
        with meter.window("prefill") as prefill_window, ttft:
            tokens = cache.append(prompts).argmax(-1)
        cache.stopwatch = append
        with meter.window("decode") as decode_window, decode:
            for _ in range(bench.cfg.batch.decode_tokens):
                # The ids stay on the device: [B] tokens as one packed row of B sequences.
                tokens = cache.append(list(tokens[:, None])).argmax(-1)
    return _Timing(
        ttft.total_s,
        store.total_s,
        decode.total_s,
        append.total_s,
        {**prefill_window.as_metrics(), "faults": window_faults(prefill_window)},
        {**decode_window.as_metrics(), "faults": window_faults(decode_window)},
    )


def _energy(
    prefill: list[dict[str, Any]], decode: list[dict[str, Any]], tokens: int, decoded: int
) -> dict[str, Any]:
    """Medians over repeats, with the meter's name and kind, and what is against publishing them (task=energy can)."""
    out = {
        k: prefill[0][k]
        for k in ("energy_kind", "energy_source", "carbon_intensity_g_per_kwh", "carbon_source")
    }
    for phase, windows, count in (("prefill", prefill, tokens), ("decode", decode, decoded)):
        out[f"{phase}_faults"] = list(dict.fromkeys(f for w in windows for f in w["faults"]))
        if len(windows) < MIN_WINDOWS:
            out[f"{phase}_faults"].append(f"fewer than {MIN_WINDOWS} windows")
        joules = [w["energy_j"] for w in windows]
        if count and all(j is not None for j in joules):
            out[f"{phase}_energy_j"] = statistics.median(joules)
            out[f"{phase}_energy_j_per_token"] = statistics.median(joules) / count
            out[f"{phase}_carbon_gco2e"] = statistics.median(w["carbon_gco2e"] for w in windows)
    return out
