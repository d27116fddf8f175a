"""Figures of the main job: where the bytes go, and where in a prompt quantization is felt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvquant.measure import LogitComparison
from kvquant.report.style import COLOURS, figure


def draw_prefill_figures(
    metrics: dict[str, Any], comparison: LogitComparison, lengths: list[int], folder: Path
) -> list[Path]:
    """Draw all figures; returns their paths.

    Args:
        metrics: what the task measured.
        comparison: of every prompt position that has a next token.
        lengths: tokens of each prompt.
        folder: where to save.
    """
    drawn = [_draw_bytes(metrics, folder / "bytes.png"), _draw_times(metrics, folder / "times.png")]
    if "skipped" not in metrics["quality"]:
        drawn.append(_draw_divergence(comparison, lengths, folder / "divergence.png"))
    return drawn


def _draw_bytes(metrics: dict[str, Any], path: Path) -> Path:
    memory, tokens = metrics["memory"], metrics["batch"]["tokens"]
    with figure(path, 7.0, 2.6) as (axis,):
        per_token = [memory[name]["held_bytes"] / tokens for name in ("exact", "quantized")]
        axis.barh(0, per_token[0], color=COLOURS["exact"], label="exact K and V")
        left = 0.0
        for kind, num_bytes in memory["quantized"]["parts_bytes"].items():
            width = num_bytes / tokens
            axis.barh(1, width, left=left, color=COLOURS.get(kind, COLOURS["good"]), label=kind)
            left += width
        for row, (name, value) in enumerate(zip(("exact", "quantized"), per_token, strict=True)):
            bits = memory[name]["effective_bits"]
            axis.text(value, row, f"  {bits:.2f} bits", va="center")
        axis.set_yticks([0, 1], ["exact cache", "quantized cache"])
        axis.invert_yaxis()
        axis.set_xlim(0, max(per_token) * 1.15)
        axis.set_xlabel("bytes held per token of the batch, block slack included")
        axis.legend(loc="lower right", fontsize=8, frameon=False)
    return path


def _draw_times(metrics: dict[str, Any], path: Path) -> Path:
    prefill, decode = metrics["prefill"], metrics["decode"]
    with figure(path, 7.0, 2.8, columns=2 if decode else 1) as axes:
        for row, name in enumerate(("exact", "quantized")):
            total, store = prefill[f"ttft_s_{name}"], prefill[f"store_s_{name}"]
            axes[0].bar(row, total - store, color=COLOURS[name])
            axes[0].bar(row, store, bottom=total - store, color=COLOURS["outliers"])
            if decode:
                axes[1].bar(row, decode[f"tokens_per_s_{name}"], color=COLOURS[name])
        axes[0].set_ylabel("s")
        axes[0].set_title("time to first token (orange: storing K and V)", fontsize=9)
        if decode:
            axes[1].set_ylabel("tokens/s")
            axes[1].set_title("decode, whole batch", fontsize=9)
        for axis in axes:
            axis.set_xticks([0, 1], ["exact", "quantized"])
    return path


def _draw_divergence(comparison: LogitComparison, lengths: list[int], path: Path) -> Path:
    position = np.concatenate([np.arange(n - 1) for n in lengths])
    kl = comparison.kl.numpy()
    # Edges double: short contexts change fastest, and every bin holds many tokens.
    edges = np.unique(np.concatenate([[0], 2 ** np.arange(4, 21)]))
    edges = np.append(edges[edges < position.max()], position.max() + 1)
    which = np.digitize(position, edges) - 1
    bins = [b for b in range(len(edges) - 1) if (which == b).any()]
    centre = [(edges[b] + edges[b + 1]) / 2 for b in bins]
    flips = 1 - comparison.agrees.numpy()
    with figure(path, 7.0, 2.8, columns=2) as axes:
        for q, style in ((50, "-"), (95, "--")):
            axes[0].plot(
                centre, [np.percentile(kl[which == b], q) for b in bins], style, label=f"{q}th percentile"
            )
        axes[0].plot(centre, [kl[which == b].mean() for b in bins], color=COLOURS["outliers"], label="mean")
        if kl.max() > 0:
            axes[0].set_yscale("log")
        axes[0].set_ylabel("KL from the exact cache, nats")
        axes[0].legend(fontsize=8, frameon=False)
        axes[1].plot(centre, [100 * flips[which == b].mean() for b in bins], "o-", color=COLOURS["outliers"])
        axes[1].set_ylabel("most likely token differs, %")
        axes[1].set_ylim(bottom=0)
        for axis in axes:
            axis.set_xscale("log", base=2)
            axis.set_xlabel("position in the prompt")
    return path
