"""One look for every figure: colour-blind-safe colours, no clutter, saved by temporary file and rename."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Okabe and Ito 2008: distinguishable with any common colour vision.
COLOURS = {
    "exact": "#555555",
    "quantized": "#0072B2",
    "codes": "#0072B2",
    "outliers": "#D55E00",
    "ranges": "#E69F00",
    "tables and spill chunks": "#CC79A7",
    "good": "#009E73",
}

# The same colours by turns, for lines that have no fixed meaning; yellow is left out, it is too light for paper.
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")


@contextlib.contextmanager
def figure(path: Path, width_in: float, height_in: float, columns: int = 1) -> Iterator[list[Any]]:
    """Yield the axes of a figure that is saved to ``path`` when the block ends.

    Args:
        path: a PNG; PDF and others work by suffix.
        width_in: inches.
        height_in: inches.
        columns: axes side by side.
    """
    # A figure object of its own: no global state of pyplot, no display needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width_in, height_in), layout="constrained", dpi=150)
    FigureCanvasAgg(fig)
    axes = fig.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    yield list(axes)
    temporary = path.with_name(f".{path.name}")
    # Without a date the same numbers give the same file.
    dateless = {"CreationDate": None} if path.suffix == ".pdf" else None
    fig.savefig(temporary, format=path.suffix.lstrip("."), metadata=dateless)
    os.replace(temporary, path)
