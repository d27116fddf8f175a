"""The figure of ``task=serve_trace``: sequences held over time, and how long requests waited for their first token."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvquant.report.style import COLOURS, figure
from kvquant.serving.replay import Replay


def draw_serve_figure(replays: dict[str, Replay], path: Path) -> Path:
    """Draw one line per cache.

    Args:
        replays: by name, ``exact`` and ``quantized``.
        path: where to save.
    """
    with figure(path, 7.0, 2.8, columns=2) as axes:
        for name, result in replays.items():
            end_s = [step.end_s for step in result.steps]
            axes[0].step(
                end_s, [s.held for s in result.steps], where="pre", color=COLOURS[name], label=f"{name} cache"
            )
            ttft_s = np.sort([outcome.ttft_s for outcome in result.outcomes])
            share = np.arange(1, len(ttft_s) + 1) / len(ttft_s)
            axes[1].step(ttft_s, share, where="post", color=COLOURS[name])
        axes[0].set_xlabel("s of work")
        axes[0].set_ylabel("sequences held at once")
        axes[0].set_ylim(bottom=0)
        axes[0].legend(fontsize=8, frameon=False)
        axes[1].set_xlabel("time to first token, s")
        axes[1].set_ylabel("share of requests")
    return path
