"""The figure of ``task=history``: peak extra memory and time of a chunk against the length of the history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvquant.report.style import COLOURS, figure

_LABELS = {"quantized": "quantized blocks", "exact": "exact blocks", "stock": "transformers' cache"}
_STYLES = {"quantized": "o-", "exact": "s-", "stock": "^-"}
_COLOURS = {
    "quantized": COLOURS["quantized"],
    "exact": COLOURS["exact"],
    "stock": COLOURS["outliers"],
}


def draw_history_figure(metrics: dict[str, Any], names: Sequence[str], path: Path) -> Path:
    """Draw memory on the left, time on the right, one line per cache.

    Args:
        metrics: what ``task=history`` measured.
        names: the caches to draw.
        path: where to save.
    """
    layer = {int(n): b for n, b in metrics["dequantized_layer_bytes"].items()}
    with figure(path, 7.5, 3.0, columns=2) as axes:
        for name in names:
            style = {"color": _COLOURS[name], "label": _LABELS[name], "markersize": 4}
            for axis, key, factor in ((axes[0], "extra_bytes", 2**-20), (axes[1], "chunk_s", 1.0)):
                lengths = [int(n) for n in metrics[name][key]]
                axis.plot(lengths, [factor * x for x in metrics[name][key].values()], _STYLES[name], **style)
        axes[0].plot(
            list(layer),
            [b * 2**-20 for b in layer.values()],
            ":",
            color=COLOURS["ranges"],
            label="one layer dequantized (fp32), for scale",
        )
        axes[0].set_ylabel("peak extra memory of a chunk, MiB")
        axes[1].set_ylabel("s per chunk")
        for axis in axes:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel("tokens of history")
        axes[0].legend(fontsize=6, frameon=False)
    return path
