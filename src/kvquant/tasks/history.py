"""``task=history``: what prefilling one more chunk takes, in memory and time, over a history of growing length.

The history is prefilled for real, in pieces, past the model's context if asked for: positions go on and the pool is the
only limit. A text that long means nothing to a model that was trained on less; what a chunk costs does not depend on it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import resource
import sys
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvquant.calibration import exact_calibration
from kvquant.measure import Stopwatch
from kvquant.models import QuantizedCache, quantized_kv_cache
from kvquant.models.devices import input_device
from kvquant.peak_memory import PeakMemory
from kvquant.report.history_figures import draw_history_figure
from kvquant.tasks.history_table import history_table
from kvquant.tasks.setup import Workbench, open_workbench, progress

QUANTIZED, EXACT, STOCK = "quantized", "exact", "stock"


@dataclasses.dataclass
class _Point:
    """One length: peak bytes of a chunk beyond what was there, its seconds, and what had been stored by then."""

    extra_bytes: int
    chunk_s: float
    held_bytes: int
    prefill_s: float


class _History(Protocol):
    """A growing history over which chunks are tried."""

    def extend(self, ids: Tensor) -> None:
        """Prefill more tokens."""

    def attempt(self, chunk: Tensor, watch: Stopwatch | PeakMemory) -> None:
        """Prefill a chunk, watched, and forget it again."""

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is stored."""


def run(cfg: Any, context: Any) -> None:
    """Measure a chunk at every length, over quantized blocks, exact blocks and transformers' own cache.

    Args:
        cfg: the composed configuration; the settings are those of ``HistoryTask``.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    bench, task = open_workbench(cfg, context), cfg.task
    lengths = sorted(task.lengths)
    text = _text(bench, lengths[-1] + task.chunk_tokens)
    stops = dict.fromkeys((QUANTIZED, EXACT, STOCK), lengths)
    stops[EXACT] = stops[STOCK] = [n for n in lengths if n <= task.compare_up_to]
    calibrations = {QUANTIZED: bench.calibration(), EXACT: exact_calibration(bench.shape)}
    measured: dict[str, dict[int, _Point]] = {}
    with torch.inference_mode():
        for name, calibration in calibrations.items():
            if not stops[name]:
                continue
            with quantized_kv_cache(bench.model, calibration) as kv:
                cache = kv.new_cache(max_sequences=2, **_cache_settings(bench, len(text)))
                measured[name] = _grow(_InBlocks(cache), name, text, stops[name], bench, context)
                del cache
        if stops[STOCK]:
            measured[STOCK] = _grow(_InStockCache(bench.model), STOCK, text, stops[STOCK], bench, context)
    metrics = context.record.metrics
    # One layer's keys and values in fp32: what a path that dequantizes the history first would hold.
    token_bytes = 2 * bench.shape.num_kv_heads * bench.shape.head_dim * torch.float32.itemsize
    metrics["dequantized_layer_bytes"] = {str(n): n * token_bytes for n in lengths}
    for name, points in measured.items():
        metrics[name] = {
            field.name: {str(n): getattr(point, field.name) for n, point in points.items()}
            for field in dataclasses.fields(_Point)
        }
        extra = {n: point.extra_bytes for n, point in points.items()}
        slope = _slope(extra)
        metrics[name]["extra_bytes_per_history_token"] = slope
        metrics[name]["share_of_dequantized_layer"] = None if slope is None else slope / token_bytes
    metrics["process_peak_bytes"] = _process_peak_bytes()
    context.record.set_table(*history_table(metrics, cfg))
    if task.figures:
        path = context.run_dir / "history.png"
        context.record.add_figure(
            draw_history_figure(metrics, [n for n in (QUANTIZED, EXACT, STOCK) if n in measured], path)
        )


def _text(bench: Workbench, tokens: int) -> Tensor:
    """Held-out text, over again where it ends, int64 [tokens]."""
    ids = bench.heldout(tokens)
    return ids.repeat(-(-tokens // len(ids)))[:tokens]


def _cache_settings(bench: Workbench, tokens: int) -> dict[str, Any]:
    chunk = bench.cfg.task.chunk_tokens
    # Blocks for the history, for the chunk beside it, and for the copy of a block that is still open.
    settings = bench.quality_settings([tokens, chunk, bench.cfg.cache.block_size])
    return {**settings, "max_length": tokens}


def _grow(
    history: _History, name: str, text: Tensor, lengths: list[int], bench: Workbench, context: Any
) -> dict[int, _Point]:
    task, points = bench.cfg.task, {}
    filling = Stopwatch(context.device)
    # As long as the pieces, or up to the next length.
    edges = sorted({*range(0, lengths[-1], task.fill_tokens), *lengths, 0})
    pieces = list(itertools.pairwise(edges))
    for start, end in progress(context.console)(pieces, f"prefilling, {name} cache", len(pieces)):
        with filling:
            history.extend(text[start:end])
        if end not in lengths:
            continue
        chunk = text[end : end + task.chunk_tokens]
        watch, peak = Stopwatch(context.device), PeakMemory(context.device)
        history.attempt(chunk, watch)
        history.attempt(chunk, peak)  # slower, so not both at once
        points[end] = _Point(peak.extra_bytes, watch.total_s, history.held_bytes, filling.total_s)
    return points


class _InBlocks:
    """One sequence of a cache of ours; a chunk is tried on a fork of it."""

    def __init__(self, cache: QuantizedCache) -> None:
        self._cache = cache
        (self._row,) = cache.open(1)

    def extend(self, ids: Tensor) -> None:
        self._cache.append([ids], [self._row])

    def attempt(self, chunk: Tensor, watch: Stopwatch | PeakMemory) -> None:
        fork = self._cache.fork(self._row)
        with watch:
            self._cache.append([chunk], [fork])
        self._cache.free(fork)

    @property
    def held_bytes(self) -> int:
        return self._cache.bytes_held


class _InStockCache:
    """The same in transformers' own cache, which grows by concatenation; a chunk is tried on a copy of it."""

    def __init__(self, model: Any) -> None:
        self._model, self._device = model, input_device(model)
        self._cache = DynamicCache(config=model.config)

    def extend(self, ids: Tensor) -> None:
        self._forward(self._cache, ids)

    def attempt(self, chunk: Tensor, watch: Stopwatch | PeakMemory) -> None:
        if isinstance(watch, Stopwatch):
            cache = copy.deepcopy(self._cache)
            with watch:
                self._forward(cache, chunk)
            return
        with watch:
            # Copied inside, so that what concatenation gives back is seen to go.
            cache = copy.deepcopy(self._cache)
            watch.mark()
            self._forward(cache, chunk)

    def _forward(self, cache: DynamicCache, ids: Tensor) -> None:
        self._model(
            input_ids=ids[None].to(self._device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )

    @property
    def held_bytes(self) -> int:
        tensors = [x for layer in self._cache.layers for x in (layer.keys, layer.values)]
        return sum(x.untyped_storage().nbytes() for x in tensors)


def _slope(extra_bytes: dict[int, int]) -> float | None:
    """Least-squares bytes per token of history; None for a single length."""
    if len(extra_bytes) < 2:
        return None
    return float(np.polyfit(list(extra_bytes), list(extra_bytes.values()), 1)[0])


def _process_peak_bytes() -> int:
    """The most memory this process has had resident so far, in bytes."""
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
