"""The figure of ``task=compare``: divergence from the exact cache against bytes, with its intervals."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

from kvquant.report.style import figure

# Okabe and Ito 2008, then their darker shades.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F3C00"]


def draw_quality(variants: dict[str, dict[str, Any]], path: Path) -> Path:
    """Draw KL against effective bits, one line for each method and its settings; returns the path.

    Args:
        variants: of the run's metrics, by label; rows without any divergence (the exact cache) are left out.
        path: where to save.
    """
    families: dict[str, list[tuple[float, dict[str, float]]]] = collections.defaultdict(list)
    for label, entry in variants.items():
        if entry["kl"]["estimate"] > 0:
            # nuq2-1% and nuq3-1% are points of one curve, nuq-1%.
            family = re.sub(r"^([a-z_]+?)(\d|k\dv\d)(?=$|[- ])", r"\1", label)
            families[family].append((entry["effective_bits"], entry["kl"]))
    with figure(path, 7.0, 4.2) as (axis,):
        for index, (family, points) in enumerate(families.items()):
            points.sort(key=lambda p: p[0])
            bits, kl = [b for b, _ in points], [k["estimate"] for _, k in points]
            ends = [
                [max(0.0, k["estimate"] - k["low"]) for _, k in points],
                [k["high"] - k["estimate"] for _, k in points],
            ]
            axis.errorbar(
                bits,
                kl,
                yerr=ends if all(abs(e) < float("inf") for side in ends for e in side) else None,
                marker="osD^vPX*"[(index + index // len(_COLOURS)) % 8],
                markersize=4,
                capsize=2,
                linewidth=1,
                color=_COLOURS[index % len(_COLOURS)],
                linestyle="--" if family.endswith("%") else "-",
                label=family,
            )
        axis.set_yscale("log")
        axis.set_xlabel("effective bits per number, everything counted")
        axis.set_ylabel("KL from the exact cache, nats per token")
        axis.legend(fontsize=7, frameon=False, ncols=2)
    return path
