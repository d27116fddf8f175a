"""``task=allocation``: what appending one token costs, in preallocated blocks and by concatenation.

Storage alone: no model, no attention. Lengths take turns, so that drift of the machine hits all of them alike; only
ratios inside one run mean much.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.blocked_sparse import BlockedCSCMatrix
from kvquant.measure import Stopwatch
from kvquant.report.style import COLOURS, figure
from kvquant.spec import QuantSpec
from kvquant.tasks.setup import progress

OUTLIER_FRACTION = 0.01
# What each way does, in the table's and the figure's words.
WAYS = {
    "blocks_exact": "blocks: reserve and store fp16 K and V",
    "blocks_quantized": "blocks: reserve, quantize (nuq3-1%) and store",
    "blocked_csc": "blocked CSC: append one token's outliers",
    "cat_fp16": "torch.cat of fp16 K and V",
    "cat_csc": "torch.cat of a compact CSC of outliers",
}


def run(cfg: Any, context: Any) -> None:
    """Measure every way at every length.

    Args:
        cfg: the composed configuration; the settings are those of ``AllocationTask``.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    task = cfg.task
    lengths = sorted(task.lengths)
    backend = cfg.kernel.backend
    appends = {n: _ways(n, task.channels, task.head_dim, context.device, backend) for n in lengths}
    seconds: dict[str, dict[int, list[float]]] = {way: {n: [] for n in lengths} for way in WAYS}
    order = random.Random(cfg.seed)
    for _ in progress(context.console)(range(task.repeats), "appending", task.repeats):
        for way in WAYS:
            for n in order.sample(lengths, len(lengths)):
                # Once before the clock starts: the way before this one has emptied the caches of this one's code.
                appends[n][way]()
                with (watch := Stopwatch(context.device)):
                    appends[n][way]()
                seconds[way][n].append(watch.total_s)
    medians = {
        way: {n: statistics.median(s) for n, s in by_length.items()} for way, by_length in seconds.items()
    }
    shortest, longest = lengths[0], lengths[-1]
    metrics = context.record.metrics
    metrics["append_s"] = {way: {str(n): s for n, s in by.items()} for way, by in medians.items()}
    metrics["flatness"] = {way: by[longest] / by[shortest] for way, by in medians.items()}
    metrics["cat_fp16_over_blocks_exact"] = _ratios(medians, "cat_fp16", "blocks_exact")
    metrics["cat_fp16_over_blocks_quantized"] = _ratios(medians, "cat_fp16", "blocks_quantized")
    metrics["cat_csc_over_blocked_csc"] = _ratios(medians, "cat_csc", "blocked_csc")
    rows = [
        [text, *(f"{1e6 * medians[way][n]:.0f}" for n in lengths), f"{metrics['flatness'][way]:.2f}x"]
        for way, text in WAYS.items()
    ]
    context.record.set_table(
        f"appending one token of {task.channels} channels, median us by tokens already stored",
        ["", *map(str, lengths), f"{longest} / {shortest}"],
        rows,
    )
    context.record.add_figure(_draw(medians, lengths, context.run_dir / "append.png"))


def _ratios(medians: dict[str, dict[int, float]], slow: str, fast: str) -> dict[str, float]:
    return {str(n): medians[slow][n] / medians[fast][n] for n in medians[slow]}


def _ways(
    tokens: int, channels: int, head_dim: int, device: torch.device, backend: str
) -> dict[str, Callable[[], object]]:
    """One append per way, over a history of ``tokens`` tokens."""
    heads = channels // head_dim
    generator = torch.Generator().manual_seed(tokens)
    token = torch.randn(1, heads, head_dim, generator=generator, dtype=torch.float32).to(device)
    sample = torch.randn(1024, heads, head_dim, generator=generator).to(device)
    exact = BatchedKVQuantizer.exact(heads, head_dim)
    nuq = BatchedKVQuantizer.calibrate(
        QuantSpec(bits=3, outlier_fraction=OUTLIER_FRACTION), sample, sample
    ).to(device)
    history = torch.zeros(tokens, channels, dtype=torch.float16, device=device)
    row = token.view(1, channels).half()

    kept = max(1, round(OUTLIER_FRACTION * channels))
    index = torch.arange(kept, dtype=torch.int32, device=device)
    values = torch.ones(kept, dtype=torch.float16, device=device)
    csc_index, csc_values = index.to(torch.int16).repeat(tokens), values.repeat(tokens)
    csc_offsets = torch.arange(tokens + 1, dtype=torch.int64, device=device) * kept
    blocked = BlockedCSCMatrix(channels, device=device)
    blocked.append_tokens(index.repeat(tokens), values.repeat(tokens), csc_offsets)
    return {
        "blocks_exact": _block_append(exact, tokens, token.half(), device, backend),
        "blocks_quantized": _block_append(nuq, tokens, token.half(), device, backend),
        "blocked_csc": lambda: blocked.append_token(index, values),
        "cat_fp16": lambda: (torch.cat([history, row]), torch.cat([history, row])),
        "cat_csc": lambda: (
            torch.cat([csc_index, index.to(torch.int16)]),
            torch.cat([csc_values, values]),
            torch.cat([csc_offsets, csc_offsets[-1:] + kept]),
        ),
    }


def _block_append(
    quantizer: BatchedKVQuantizer, tokens: int, token: torch.Tensor, device: torch.device, backend: str
) -> Callable[[], None]:
    """A pool that holds ``tokens`` tokens of one sequence, and the append of one more."""
    layout = BlockLayout(quantizer.spec, 1, quantizer.num_kv_heads, quantizer.head_dim, token.dtype)
    # Room to grow: appended tokens stay.
    pool = BlockPool(layout, layout.blocks_for(tokens) + 64, max_sequences=1, device=device)
    row = pool.add_sequence()
    pool.reserve([row], [tokens])
    pool.commit()

    def append() -> None:
        step = pool.reserve([row], [1])
        quantizer.write(token, token, pool.layers[0], step, backend=backend)
        pool.commit()

    return append


def _draw(medians: dict[str, dict[int, float]], lengths: list[int], path: Path) -> Path:
    styles = {
        "blocks_exact": (COLOURS["quantized"], "o-"),
        "blocks_quantized": (COLOURS["good"], "s-"),
        "blocked_csc": (COLOURS["ranges"], "^-"),
        "cat_fp16": (COLOURS["outliers"], "o--"),
        "cat_csc": (COLOURS["exact"], "s--"),
    }
    with figure(path, 6.0, 3.6) as (axis,):
        for way, (colour, style) in styles.items():
            axis.plot(lengths, [1e6 * medians[way][n] for n in lengths], style, color=colour, label=WAYS[way])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens already stored")
        axis.set_ylabel("us per appended token")
        axis.legend(fontsize=7, frameon=False)
    return path
