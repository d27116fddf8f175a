"""``task=perplexity``: perplexity of held-out text, every key and value quantized, against the exact cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvquant.calibration import Calibration, exact_calibration
from kvquant.errors import DataError
from kvquant.measure import LogitComparison, compare_logits
from kvquant.models import quantized_kv_cache
from kvquant.tasks.setup import Workbench, open_workbench, progress


def run(cfg: Any, context: Any) -> None:
    """Measure perplexity over windows of the held-out text.

    Without ``task.window`` windows are contiguous and as long as the model's context (KVQuant's protocol); with a
    ``task.stride`` below the window each window predicts only its last ``stride`` tokens.

    Args:
        cfg: the composed configuration.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    bench = open_workbench(cfg, context)
    task = cfg.task
    window = min(task.window or bench.context, bench.context)
    windows = _windows(bench.heldout(task.max_tokens), window, task.stride or window)
    variants = [exact_calibration(bench.shape), bench.calibration()]
    parts: list[LogitComparison] = []
    records = []
    batches = [windows[i : i + task.batch_size] for i in range(0, len(windows), task.batch_size)]
    for batch in progress(context.console)(batches, "perplexity", len(batches)):
        exact, quantized = (
            _logits(bench, calibration, [ids for ids, _ in batch]) for calibration in variants
        )
        start = 0
        for ids, first in batch:
            rows = slice(start + first, start + len(ids) - 1)
            part = compare_logits(exact[rows], quantized[rows], ids[first + 1 :].to(exact.device))
            start += len(ids)
            parts.append(part)
            records.append(
                {
                    "n_tokens": len(part.kl),
                    "exact_nll_sum": float(part.exact_nll.double().sum()),
                    "quantized_nll_sum": float(part.quantized_nll.double().sum()),
                }
            )
    whole = LogitComparison(
        *(
            torch.cat([getattr(p, name) for p in parts])
            for name in ("exact_nll", "quantized_nll", "kl", "agrees")
        )
    )
    metrics = {**whole.metrics(), "window_tokens": window, "windows": len(windows)}
    context.record.metrics.update(metrics)
    _save(context.run_dir / "windows.json", records)
    context.record.set_table(
        f"perplexity of {cfg.data.name}, {cfg.model.name}, quant={cfg.quant.method} {cfg.quant.bits} bits",
        ["", "exact cache", "quantized cache"],
        [
            ["perplexity", f"{metrics['perplexity_exact']:.4f}", f"{metrics['perplexity_quantized']:.4f}"],
            ["excess", "", f"{metrics['perplexity_excess_percent']:+.3f}%"],
            ["KL (mean, nats)", "", f"{metrics['kl_mean']:.3e}"],
            ["top-1 agreement", "", f"{100 * metrics['top1_agreement']:.2f}%"],
            ["tokens predicted", str(metrics["compared_tokens"]), str(metrics["compared_tokens"])],
        ],
    )


def _windows(stream: Tensor, window: int, stride: int) -> list[tuple[Tensor, int]]:
    """Windows of a stream with the index of the last token that only serves as context."""
    if len(stream) < 2:
        raise DataError(
            f"the held-out text must hold at least 2 tokens, got {len(stream)}; choose a longer data.path"
        )
    out = [(stream[:window], 0)]
    end = window
    while end + 1 < len(stream):
        new_end = min(end + stride, len(stream))
        begin = max(0, new_end - window) if stride < window else end
        # Contiguous windows predict all but their first token; overlapping ones what the last did not reach.
        first = end - begin - 1 if stride < window else 0
        if new_end - begin >= 2:
            out.append((stream[begin:new_end], first))
        end = new_end
    return out


def _logits(bench: Workbench, calibration: Calibration, batch: list[Tensor]) -> Tensor:
    settings = bench.cache_settings()
    size = settings["block_size"]
    if settings["num_blocks"] is None and settings["memory_budget_gib"] is None:
        settings["num_blocks"] = sum(-(-len(ids) // size) for ids in batch)
    with quantized_kv_cache(bench.model, calibration) as kv:
        return kv.new_cache(max_sequences=len(batch), **settings).append(batch, logits="all")


def _save(path: Path, records: list[dict[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(records), encoding="utf-8")
    os.replace(temporary, path)
