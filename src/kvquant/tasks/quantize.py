"""``task=quantize``: quantize, pack and store a prompt's K and V, against the published way to find codes.

The published way (KVQuant's simulated quantizer) normalizes, stacks one copy of |x - c| per centroid and takes argmin;
values get their outlier thresholds from torch.quantile per token. It stores nothing. Both take turns in one run, and
a copy of the same tensor stands beside them: only ratios inside one run mean much.
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
from kvquant.kernels import LayerConstants, get_backend
from kvquant.measure import Stopwatch
from kvquant.spec import QuantSpec
from kvquant.tasks.setup import progress

HEAD_DIM = 128


def run(cfg: Any, context: Any) -> None:
    """Measure keys and values, our way and the published way.

    Args:
        cfg: the composed configuration; the settings are those of ``QuantizeTask`` and the quant group.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    task, spec = cfg.task, QuantSpec(**dict(cfg.quant))
    keys, values = (
        _heavy_tailed(task.tokens, task.channels, cfg.seed + i).to(context.device) for i in range(2)
    )
    with context.console.status("calibrating"):
        quantizer = BatchedKVQuantizer.calibrate(spec, keys, values).to(context.device)
    ways = _ways(quantizer, keys, values, cfg.kernel.backend)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in progress(context.console)(range(task.repeats + 1), "quantizing", task.repeats + 1):
        for name, action in ways.items():
            with (watch := Stopwatch(context.device)):
                action()
            if turn:  # the first turn warms up
                seconds[name].append(watch.total_s)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    both = medians["keys_blocks"] + medians["values_blocks"]
    metrics = {
        **{f"{name}_s": s for name, s in medians.items()},
        "speedup": (medians["keys_published"] + medians["values_published"]) / both,
        "keys_over_copy": medians["keys_blocks"] / medians["copy"],
        "values_over_copy": medians["values_blocks"] / medians["copy"],
    }
    context.record.metrics.update(metrics)
    rows = [
        ["keys", f"{1e3 * medians['keys_blocks']:.1f}", f"{1e3 * medians['keys_published']:.1f}"],
        ["values", f"{1e3 * medians['values_blocks']:.1f}", f"{1e3 * medians['values_published']:.1f}"],
        ["copy of one tensor", f"{1e3 * medians['copy']:.1f}", ""],
        ["keys and values together", "", f"{metrics['speedup']:.1f}x slower"],
    ]
    shape = f"fp32 [{task.tokens}, {task.channels}], {spec.key_bits}/{spec.value_bits} bits, {spec.outlier_fraction:.1%}"
    context.record.set_table(f"{shape}, median ms", ["", "into blocks", "stack and argmin"], rows)


def _heavy_tailed(tokens: int, channels: int, seed: int) -> Tensor:
    """Channels of very different spread with heavy tails, as keys and values have; [T, H, D] fp32."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(channels, generator=generator).mul(3).exp()
    tails = torch.rand(tokens, channels, generator=generator).clamp(min=0.05).rsqrt()
    return (torch.randn(tokens, channels, generator=generator) * spread * tails).view(tokens, -1, HEAD_DIM)


def _ways(
    quantizer: BatchedKVQuantizer, keys: Tensor, values: Tensor, backend: str
) -> dict[str, Callable[[], object]]:
    T, H, D = keys.shape
    spec, constants, kernels = quantizer.spec, quantizer.constants, get_backend(backend, keys.device.type)
    assert constants is not None  # refused by validation: quant=none has nothing to quantize
    pool = BlockPool(BlockLayout(spec, 1, H, D, keys.dtype), -(-T // 64), max_sequences=1, device=keys.device)
    row, store = pool.add_sequence(), pool.layers[0]

    def into_blocks(kind: str) -> None:
        step = pool.reserve([row], [T])  # rolls back what the turn before left pending
        args = (constants, step.slot_block, step.slot_offset, None, store.error)
        if kind == "keys":
            kernels.write_keys(keys, store.keys, *args, bits=spec.key_bits)
        else:
            kernels.write_values(values, store.values, *args, bits=spec.value_bits)

    flat = keys.view(T, -1)
    return {
        "copy": flat.clone,
        "keys_blocks": lambda: into_blocks("keys"),
        "values_blocks": lambda: into_blocks("values"),
        "keys_published": lambda: _published_keys(flat, constants),
        "values_published": lambda: _published_values(values.view(T, -1), constants, spec.outlier_fraction),
    }


def _published_keys(x: Tensor, constants: LayerConstants) -> Tensor:
    lower, upper = constants.key_lower.view(-1), constants.key_upper.view(-1)
    zero, scale = constants.key_zero.view(-1), constants.key_scale.view(-1)
    outlier = (x < lower) | (x > upper)
    nearest = _stack_and_argmin((x - zero) / scale, constants.key_centroids)
    return torch.where(outlier, x, nearest * scale + zero)


def _published_values(x: Tensor, constants: LayerConstants, outlier_fraction: float) -> Tensor:
    tail = outlier_fraction / 2
    lower, upper = torch.quantile(x, torch.tensor([tail, 1 - tail], device=x.device), dim=1)[:, :, None]
    outlier = (x < lower) | (x > upper)
    inliers = torch.where(outlier, torch.nan, x)
    low, high = inliers.nan_to_num(torch.inf).amin(1), inliers.nan_to_num(-torch.inf).amax(1)
    zero, scale = ((high + low) / 2)[:, None], ((high - low) / 2)[:, None]
    nearest = _stack_and_argmin((x - zero) / scale, constants.value_centroids)
    return torch.where(outlier, x, nearest * scale + zero)


def _stack_and_argmin(x_norm: Tensor, centroids: Tensor) -> Tensor:
    distances = torch.stack([(x_norm - c).abs() for c in centroids])
    return centroids[distances.argmin(0)]
