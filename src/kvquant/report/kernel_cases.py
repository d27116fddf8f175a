"""Rows of ``task=kernels`` side by side: one case, a shape with its sequences and tokens, at every width."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
WIDTHS = (4, 3, 2)
SPEEDUP = "speedup_over_full_precision"
GRAPH_SPEEDUP = "speedup_in_graphs"  # both captured in CUDA graphs


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation on one shape and batch.

    Attributes:
        shape: whose layer it is.
        batch: sequences.
        tokens: of each sequence; where lengths differ, of the longest.
        is_trace: lengths differ, and are quantiles of a request trace.
        by_bits: the row of each width that was measured.
    """

    shape: str
    batch: int
    tokens: int
    is_trace: bool
    by_bits: Mapping[int, Row]

    @property
    def any(self) -> Row:
        """A row, for what does not depend on the width."""
        return next(iter(self.by_bits.values()))

    @property
    def total_tokens(self) -> int:
        """Tokens of all sequences."""
        return round(self.batch * self.any.get("mean_tokens", self.tokens))

    def words(self, times: str = "x") -> str:
        """Sequences and tokens, as a table says them."""
        if not self.is_trace:
            return f"{self.batch} {times} {self.tokens:,}"
        return f"{self.batch} of {self.any['mean_tokens']:,.0f} on average"


def cases_of(rows: Iterable[Row], operation: str) -> list[Case]:
    """Return the cases of an operation by shape, batch and tokens, a ragged batch behind the uniform ones.

    Args:
        rows: the metric ``rows``, of one run or of several parts of a bench.
        operation: decode, prefill, layer_share and so on.
    """
    found: dict[tuple[str, bool, int, int], dict[int, Row]] = {}
    for row in rows:
        if row["operation"] == operation:
            case = (row["shape"], bool(row["is_trace"]), row["batch"], row["tokens"])
            found.setdefault(case, {})[row["bits"]] = {**row, **_in_graphs(row)}
    return [
        Case(shape, batch, tokens, is_trace, found[shape, is_trace, batch, tokens])
        for shape, is_trace, batch, tokens in sorted(found)
    ]


def _in_graphs(row: Row) -> dict[str, float]:
    """How many times as fast a call in a graph is as full precision, of whose calls alone and in a graph the faster counts:
    a long call may take longer in a graph of many."""
    if "graph_us" not in row or "full_precision_graph_us" not in row:
        return {}
    return {GRAPH_SPEEDUP: min(row["full_precision_us"], row["full_precision_graph_us"]) / row["graph_us"]}


def is_uneven(row: Row) -> bool:
    """Say whether calls differed by more than half of their median: a host that was too slow, most often."""
    return "high_us" in row and row["high_us"] - row["low_us"] > 0.5 * row["us"]


def values(
    cases: Iterable[Case], key: str, bits: Iterable[int] = WIDTHS, *, even: bool = False
) -> list[float]:
    """Return a number of all cases at these widths, where there is one.

    Args:
        cases: of one operation.
        key: of a row.
        bits: widths.
        even: leave out what :func:`is_uneven`.
    """
    rows = (case.by_bits.get(b, {}) for case in cases for b in bits)
    return [row[key] for row in rows if key in row and not (even and is_uneven(row))]


def us_per_1k_tokens(row: Row) -> float | None:
    """Return what a thousand (1,024) tokens of a prompt take of ``layer_share``'s time."""
    return 1024 * row["us"] / row["tokens"] if "us" in row else None


def way_words(row: Row) -> str:
    """Return the name of the full-precision attention that was fastest."""
    return str(row.get("full_precision_way", "")).removeprefix("sdpa_").replace("_", " ")


def us_of_way(full_precision: Sequence[Row], case: Case, operation: str, way: str) -> float | None:
    """Return the microseconds of one way of full-precision attention in a case; None where it was not timed.

    Args:
        full_precision: the metric of that name.
        case: of the same run.
        operation: decode or prefill.
        way: its name.
    """
    wanted = {"operation": operation, "shape": case.shape, "label": case.any["label"], "way": way}
    return next(
        (row.get("us") for row in full_precision if all(row.get(k) == v for k, v in wanted.items())), None
    )
