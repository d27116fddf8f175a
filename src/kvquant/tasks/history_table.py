"""The table of ``task=history``: one row per cache and quantity, one column per length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NAMES = {"quantized": "quantized blocks", "exact": "exact blocks", "stock": "transformers' cache"}


def history_table(metrics: dict[str, Any], cfg: Any) -> tuple[str, list[str], list[list[str]]]:
    """Return title, columns and rows.

    Args:
        metrics: what :func:`kvquant.tasks.history.run` measured.
        cfg: the composed configuration.
    """
    title = (
        f"{cfg.model.name} ({metrics['model']['dtype']}), one chunk of {cfg.task.chunk_tokens} tokens by tokens of history; "
        f"quant={cfg.quant.method}"
    )
    lengths = list(metrics["dequantized_layer_bytes"])

    def row(text: str, by_length: dict[str, Any], form: Callable[[Any], str]) -> list[str]:
        return [text, *(form(by_length[n]) if n in by_length else "-" for n in lengths)]

    rows = []
    measured = {name: text for name, text in NAMES.items() if name in metrics}
    for name, text in measured.items():
        rows.append(row(f"peak extra memory, {text}", metrics[name]["extra_bytes"], _mib))
    rows.append(
        row("one layer's history dequantized (fp32), for scale", metrics["dequantized_layer_bytes"], _mib)
    )
    for name, text in measured.items():
        rows.append(row(f"held, {text}", metrics[name]["held_bytes"], _mib))
    for name, text in measured.items():
        rows.append(row(f"time of the chunk, {text}", metrics[name]["chunk_s"], lambda s: f"{s:.2f} s"))
    return title, ["", *lengths], rows


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
