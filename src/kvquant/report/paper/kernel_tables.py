"""The paper's tables of the bench on a GPU: a line for each case, columns of every width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvquant.report.kernel_cases import SPEEDUP, WIDTHS, Case, Row, us_per_1k_tokens, way_words
from kvquant.report.paper import tex
from kvquant.report.tables import latex_escape

TIMES = r"$\times$"
Number = Callable[[Row], Any]
# Head, number, format, factor.
Quantity = tuple[str, Number, str, float]


def _key(name: str) -> Number:
    return lambda row: row.get(name)


def _table(
    cases: Sequence[Case], once: Sequence[tuple[str, Callable[[Row], str]]], quantities: Sequence[Quantity]
) -> str:
    """One line for each case.

    Args:
        cases: of one operation.
        once: head and text of what full precision takes, whatever the width.
        quantities: what does, each in a column for every width.
    """
    rows: list[list[str]] = []
    rules: list[int] = []
    for index, case in enumerate(cases):
        if index and case.shape != cases[index - 1].shape:
            rules.append(index)
        cells = [
            tex.number(number(case.by_bits[bits]), spec, factor) if bits in case.by_bits else None
            for _, number, spec, factor in quantities
            for bits in WIDTHS
        ]
        name = f"{latex_escape(case.shape)} {case.words(TIMES)}"
        rows.append(
            [name, *(text(case.any) for _, text in once), *("--" if cell is None else cell for cell in cells)]
        )
    columns = ["", *(head for head, _ in once), *(f"{bits} bits" for _ in quantities for bits in WIDTHS)]
    spans = [("full precision", len(once)), *((head, len(WIDTHS)) for head, *_ in quantities)]
    return tex.tabular(columns, rows, rules_before=rules, spans=spans)


def _microseconds(name: str) -> Callable[[Row], str]:
    return lambda row: tex.number(row.get(name), ",.0f") or "--"


_RIVAL = (("by", way_words), ("us", _microseconds("full_precision_us")))
_RATIOS: tuple[Quantity, ...] = (
    ("times full precision", _key(SPEEDUP), ".2f", 1.0),
    ("times dequantizing first", _key("speedup_over_dequantize_then_attend"), ".1f", 1.0),
)


def _decode(cases: Sequence[Case]) -> str:
    graph: Quantity = ("us in a CUDA graph", _key("graph_us"), ",.0f", 1.0)
    copy: Quantity = (r"\% of copy", _key("copy_fraction"), ".0f", 100.0)
    return _table(cases, _RIVAL, (graph, *_RATIOS, copy))


def _chunk(cases: Sequence[Case]) -> str:
    return _table(cases, _RIVAL, (("us", _key("us"), ",.0f", 1.0), *_RATIOS))


def _layer_share(cases: Sequence[Case]) -> str:
    quantities: tuple[Quantity, ...] = (
        ("us per 1,024 tokens", us_per_1k_tokens, ".1f", 1.0),
        (r"\% of the layer", _key("percent_of_layer"), ".2f", 1.0),
    )
    return _table(cases, (("layer, us", _microseconds("layer_us")),), quantities)


# File name, operation, what makes it.
KERNEL_TABLES: tuple[tuple[str, str, Callable[[Sequence[Case]], str]], ...] = (
    ("decode", "decode", _decode),
    ("chunk", "prefill", _chunk),
    ("layershare", "layer_share", _layer_share),
)
