"""The figure of ``task=serve_trace``: sequences held over time, and how long requests waited for their first token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kvquant.report.style import COLOURS, figure
from kvquant.serving.replay import Replay


def serve_curves(result: Replay) -> dict[str, np.ndarray]:
    """What the figure shows of a replay: ``end_s`` and ``held`` by step, ``ttft_s`` of every request."""
    return {
        "end_s": np.array([step.end_s for step in result.steps]),
        "held": np.array([step.held for step in result.steps]),
        "ttft_s": np.array([outcome.ttft_s for outcome in result.outcomes]),
    }


def draw_serve_figure(curves: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> Path:
    """Draw one line per cache.

    Args:
        curves: `serve_curves` by name, ``exact`` and ``quantized``.
        path: where to save.
    """
    with figure(path, 7.0, 2.8, columns=2) as axes:
        for name, curve in curves.items():
            axes[0].step(
                curve["end_s"], curve["held"], where="pre", color=COLOURS[name], label=f"{name} cache"
            )
            ttft_s = np.sort(curve["ttft_s"])
            share = np.arange(1, len(ttft_s) + 1) / len(ttft_s)
            axes[1].step(ttft_s, share, where="post", color=COLOURS[name])
        axes[0].set_xlabel("s of work")
        axes[0].set_ylabel("sequences held at once")
        axes[0].set_ylim(bottom=0)
        axes[0].legend(fontsize=8, frameon=False)
        axes[1].set_xlabel("time to first token, s")
        axes[1].set_ylabel("share of requests")
    return path
