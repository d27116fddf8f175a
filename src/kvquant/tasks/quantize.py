"""``task=quantize``: what quantizing, packing, storing and attending over blocks cost without a model's help.

Keys and values of a prompt go into blocks, in turns with the published way to find codes and with a copy of the same
tensor; then, if asked for: the time per token at several lengths, decode attention over the blocks against
dequantizing everything first, and the share of a 7B-wide model's prefill. Only ratios inside one run mean much.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.kernels import get_backend, run_argument
from kvquant.measure import Stopwatch
from kvquant.spec import QuantSpec
from kvquant.tasks.decode_ways import DecodeWays
from kvquant.tasks.prefill_share import measure_prefill_share
from kvquant.tasks.published_way import published_keys, published_values
from kvquant.tasks.setup import progress

HEAD_DIM, BLOCK_SIZE = 128, 64
CALIBRATION_TOKENS = 1024
Ways = dict[str, Callable[[], object]]


def run(cfg: Any, context: Any) -> None:
    """Measure everything that the task's settings name.

    Args:
        cfg: the composed configuration; the settings are those of ``QuantizeTask`` and the quant group.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    task, spec = cfg.task, QuantSpec(**dict(cfg.quant))
    metrics, console = context.record.metrics, context.console
    rows = _quantize_speed(cfg, spec, context, metrics)
    if task.lengths:
        metrics["by_length"] = _by_length(cfg, spec, context)
        per_token = metrics["by_length"]["s_per_token"]
        rows.append(
            [
                "time per token",
                f"{max(per_token) / min(per_token):.2f}x",
                f"{min(task.lengths)} to {max(task.lengths)} tokens",
            ]
        )
    if task.decode_tokens:
        quantizer, keys, values = _calibrated(
            spec, task.decode_tokens, task.channels, cfg.seed, context, torch.bfloat16
        )
        with console.status("decode attention"):
            found = metrics["decode"] = DecodeWays(quantizer, keys, values, cfg.kernel.backend).measure(
                task.repeats
            )
        rows.append(
            [
                "decode attention, one query",
                f"{1e3 * found['over_blocks_s']:.1f}",
                f"{1e3 * found['dequantize_then_attend_s']:.1f} (dequantize, then attend)",
            ]
        )
        if found["peak_percent_of_dense_cache"] is not None:
            rows.append(
                [
                    "its extra memory at most",
                    f"{found['peak_percent_of_dense_cache']:.1f}% of the dense cache",
                    f"{100 * found['dequantize_then_attend_peak_extra_bytes'] / found['dense_cache_bytes']:.0f}%",
                ]
            )
        del quantizer, keys, values
    if task.prefill_lengths:
        with console.status("prefill of a 7B-wide model"):
            found = metrics["prefill"] = measure_prefill_share(
                spec,
                list(task.prefill_lengths),
                layers=task.prefill_layers,
                repeats=task.repeats,
                seed=cfg.seed,
                backend=cfg.kernel.backend,
                device=context.device,
            )
        rows.append(
            [
                "prefill, 7B width: storing",
                f"{1e3 * found['store_s_quantized']:.1f}",
                f"{found['store_percent_of_exact_ttft']:.1f}% of {1e3 * found['ttft_s_exact']:.0f} with quant=none",
            ]
        )
        rows.append(
            ["its time against quant=none", f"{found['paired_overhead_percent']:+.1f}%", "paired median"]
        )
    shape = f"fp32 [{task.tokens}, {task.channels}], {spec.key_bits}/{spec.value_bits} bits, {spec.outlier_fraction:.1%}"
    context.record.set_table(f"{shape}, median ms", ["", "into blocks", "stack and argmin"], rows)


def _quantize_speed(cfg: Any, spec: QuantSpec, context: Any, metrics: dict[str, Any]) -> list[list[str]]:
    """Our way, the published way and a copy in turns; returns the table's rows."""
    task = cfg.task
    quantizer, keys, values = _calibrated(spec, task.tokens, task.channels, cfg.seed, context, torch.float32)
    constants = quantizer.constants
    assert constants is not None  # refused by validation: quant=none has nothing to quantize
    flat, target = keys.view(len(keys), -1), torch.empty_like(keys).view(len(keys), -1)
    ways = {
        "copy": lambda: target.copy_(flat),
        **_into_blocks(quantizer, keys, values, cfg.kernel.backend),
        "keys_published": lambda: published_keys(flat, constants),
        "values_published": lambda: published_values(
            values.view(len(keys), -1), constants, spec.outlier_fraction
        ),
    }
    medians = _medians(ways, task.repeats, context, "quantizing")
    both = medians["keys_blocks"] + medians["values_blocks"]
    metrics.update(
        {
            **{f"{name}_s": s for name, s in medians.items()},
            "speedup": (medians["keys_published"] + medians["values_published"]) / both,
            "keys_over_copy": medians["keys_blocks"] / medians["copy"],
            "values_over_copy": medians["values_blocks"] / medians["copy"],
        }
    )
    return [
        ["keys", f"{1e3 * medians['keys_blocks']:.1f}", f"{1e3 * medians['keys_published']:.1f}"],
        ["values", f"{1e3 * medians['values_blocks']:.1f}", f"{1e3 * medians['values_published']:.1f}"],
        ["copy of one tensor", f"{1e3 * medians['copy']:.1f}", ""],
        ["keys and values together", "", f"{metrics['speedup']:.1f}x slower"],
    ]


def _by_length(cfg: Any, spec: QuantSpec, context: Any) -> dict[str, list[float]]:
    """Seconds per token of quantizing K and V, for prompts of several lengths that take turns."""
    task = cfg.task
    quantizer, keys, values = _calibrated(
        spec, max(task.lengths), task.length_channels, cfg.seed, context, torch.bfloat16
    )
    ways: Ways = {}
    for n in task.lengths:
        for name, way in _into_blocks(quantizer, keys[:n], values[:n], cfg.kernel.backend).items():
            ways[f"{name}_{n}"] = way
    medians = _medians(ways, task.repeats, context, "prompts of several lengths")
    per_token = [(medians[f"keys_blocks_{n}"] + medians[f"values_blocks_{n}"]) / n for n in task.lengths]
    return {"tokens": list(task.lengths), "s_per_token": per_token}


def _calibrated(
    spec: QuantSpec, tokens: int, channels: int, seed: int, context: Any, dtype: torch.dtype
) -> tuple[BatchedKVQuantizer, Tensor, Tensor]:
    """Made-up keys and values [T, H, D] and a quantizer that was calibrated on the start of such a run."""
    # Thresholds of a few tokens would leave out several times as many outliers as they should.
    drawn = max(tokens, CALIBRATION_TOKENS)
    with context.console.status("calibrating"):
        keys, values = (_heavy_tailed(drawn, channels, seed + i).to(context.device, dtype) for i in range(2))
        quantizer = BatchedKVQuantizer.calibrate(spec, keys[:CALIBRATION_TOKENS], values[:CALIBRATION_TOKENS])
    return quantizer.to(context.device), keys[:tokens], values[:tokens]


def _medians(ways: Ways, repeats: int, context: Any, title: str) -> dict[str, float]:
    """Median seconds of each way; they take turns, and the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in progress(context.console)(range(repeats + 1), title, repeats + 1):
        for name, action in ways.items():
            with (watch := Stopwatch(context.device)):
                action()
            if turn:
                seconds[name].append(watch.total_s)
    return {name: statistics.median(s) for name, s in seconds.items()}


def _heavy_tailed(tokens: int, channels: int, seed: int) -> Tensor:
    """Channels of very different spread with heavy tails, as keys and values have; [T, H, D] fp32."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(channels, generator=generator).mul(3).exp()
    tails = torch.rand(tokens, channels, generator=generator).clamp(min=0.05).rsqrt()
    return (torch.randn(tokens, channels, generator=generator) * spread * tails).view(tokens, -1, HEAD_DIM)


def _into_blocks(quantizer: BatchedKVQuantizer, keys: Tensor, values: Tensor, backend: str) -> Ways:
    """Quantize, pack and store all keys, and all values, into a pool of their size."""
    T, H, D = keys.shape
    spec, constants, kernels = quantizer.spec, quantizer.constants, get_backend(backend, keys.device.type)
    layout = BlockLayout(spec, 1, H, D, keys.dtype, BLOCK_SIZE)
    pool = BlockPool(layout, layout.blocks_for(T), max_sequences=1, device=keys.device)
    row, store = pool.add_sequence(), pool.layers[0]

    def write(kind: str) -> None:
        step = pool.reserve([row], [T])  # rolls back what the turn before left pending
        args = (constants, step.slot_block, step.slot_offset, None, store.error)
        if kind == "keys":
            kernels.write_keys(keys, store.keys, *args, bits=spec.key_bits, **run_argument(kernels, step))
        else:
            kernels.write_values(values, store.values, *args, bits=spec.value_bits)
        pool.check()

    return {"keys_blocks": lambda: write("keys"), "values_blocks": lambda: write("values")}
