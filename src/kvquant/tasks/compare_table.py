"""From the items of every variant to a table: means with intervals, tests, and ratios at equal effective bits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvquant.spec import QuantSpec
from kvquant.statistics import (
    Interval,
    blocks_of,
    difference_test,
    equivalence,
    holm,
    mean_interval,
    ratio_interval,
    share_interval,
    sign_test,
)

Floats = NDArray[np.float64]


@dataclasses.dataclass
class Row:
    """A variant with the items of each calibration draw, in one order for all rows.

    Attributes:
        label: what the table calls it.
        spec: how it stores.
        windows: [draws][windows], as `quality.compare_window` makes them.
        passkeys: [draws][questions], whether the answer was right.
        constants_bytes: codebooks and thresholds of all layers, held once for everything that is cached.
    """

    label: str
    spec: QuantSpec
    windows: list[list[dict[str, Any]]]
    passkeys: list[list[bool]]
    constants_bytes: int = 0

    def sums(self, name: str) -> Floats:
        """A field of every window, averaged over draws of calibration text, [windows]."""
        return np.mean([[item[name] for item in draw] for draw in self.windows], axis=0)

    @property
    def effective_bits(self) -> float:
        """8 * bytes held / numbers held, over all windows."""
        return float(8 * self.sums("held_bytes").sum() / self.sums("elements").sum())

    @property
    def effective_bits_with_constants(self) -> float:
        """The same as if every window were all that is cached and paid for codebooks and thresholds alone."""
        elements = self.sums("elements")
        return self.effective_bits + float(8 * self.constants_bytes * len(elements) / elements.sum())

    @property
    def excess(self) -> Floats:
        """Summed extra loss of every window, nats."""
        return self.sums("quantized_nll_sum") - self.sums("exact_nll_sum")


def at_equal_bits(row: Row, baseline: list[Row], sums: list[Floats]) -> Floats | None:
    """What the baseline's curve gives at a row's effective bits, per window.

    Totals are interpolated linearly in their logarithm between the two baseline points around the row, windows in
    proportion. A row with fewer bits than any point is compared with the lowest, which flatters the baseline. None
    where the row lies above the curve or a total is not positive.

    Args:
        row: whose effective bits.
        baseline: points of the curve.
        sums: of each point, [windows].
    """
    points = sorted(zip((b.effective_bits for b in baseline), sums, strict=True), key=lambda p: p[0])
    if row.effective_bits < points[0][0]:
        return points[0][1] if points[0][1].sum() > 0 else None
    for (low_bits, low), (high_bits, high) in itertools.pairwise(points):
        inside = low_bits <= row.effective_bits <= high_bits
        if not inside or low.sum() <= 0 or high.sum() <= 0:
            continue
        share = (row.effective_bits - low_bits) / (high_bits - low_bits)
        total = math.exp((1 - share) * math.log(low.sum()) + share * math.log(high.sum()))
        return np.asarray(total * ((1 - share) * low / low.sum() + share * high / high.sum()))
    return None


def summarise(
    rows: list[Row], baseline_labels: list[str], block: int, margin_nats: float
) -> tuple[dict[str, Any], list[str], list[list[str]]]:
    """Metrics by label, column names, and one line of text per row.

    Args:
        rows: the exact cache first.
        baseline_labels: rows that make the curve to compare with at equal bits; may be empty.
        block: neighbouring windows that are resampled together.
        margin_nats: loss difference per token that counts as none.
    """
    baseline = [row for row in rows if row.label in baseline_labels]
    n_tokens = blocks_of(rows[0].sums("n_tokens"), block)
    exact_ppl = math.exp(rows[0].sums("exact_nll_sum").sum() / n_tokens.sum())
    metrics: dict[str, Any] = {"perplexity_exact": exact_ppl, "variants": {}}
    retrieval_p, excess_p = [], []
    for row in rows:
        excess, kl = blocks_of(row.excess, block), blocks_of(row.sums("kl_sum"), block)
        entry: dict[str, Any] = {
            **{k: getattr(row.spec, k) for k in ("method", "key_bits", "value_bits", "outlier_fraction")},
            "effective_bits": row.effective_bits,
            "constants_bytes": row.constants_bytes,
            "effective_bits_with_constants": row.effective_bits_with_constants,
            "perplexity": math.exp(
                rows[0].sums("exact_nll_sum").sum() / n_tokens.sum() + row.excess.sum() / n_tokens.sum()
            ),
            "nll_difference": dataclasses.asdict(mean_interval(excess, n_tokens)),
            "perplexity_excess_percent": _percent(mean_interval(excess, n_tokens)),
            "kl": dataclasses.asdict(mean_interval(kl, n_tokens)),
            "flips": dataclasses.asdict(mean_interval(blocks_of(row.sums("flips"), block), n_tokens)),
            "draws": len(row.windows),
        }
        if len(row.windows) > 1:
            per_draw = [
                sum(w["kl_sum"] for w in draw) / sum(w["n_tokens"] for w in draw) for draw in row.windows
            ]
            entry["kl_per_draw"] = per_draw
            entry["kl_deviation_over_draws"] = float(np.std(per_draw, ddof=1))
        same = equivalence(excess, n_tokens, margin_nats)
        entry["equivalence"] = {"margin_nats": margin_nats, "p": same.p, "holds": same.holds}
        if row.passkeys[0]:
            # Of several draws the first: a question is one item, however often it is asked.
            right = row.passkeys[0]
            entry["passkey"] = dataclasses.asdict(share_interval(sum(right), len(right)))
            retrieval_p.append(sign_test(rows[0].passkeys[0], right))
        if baseline and row not in baseline and not row.spec.is_exact:
            for name, mine, theirs in (
                ("kl_ratio", row.sums("kl_sum"), [b.sums("kl_sum") for b in baseline]),
                ("excess_ratio", row.excess, [b.excess for b in baseline]),
            ):
                there = at_equal_bits(row, baseline, theirs)
                if there is not None:
                    ratio = ratio_interval(blocks_of(mine, block), blocks_of(there, block))
                    entry[name] = dataclasses.asdict(ratio)
        excess_p.append(difference_test(excess, n_tokens))
        metrics["variants"][row.label] = entry
    # The exact row differs from itself by definition in nothing: it is no claim.
    for row, p in zip(rows[1:], holm(excess_p[1:]), strict=True):
        metrics["variants"][row.label]["excess_p_holm"] = p
    if retrieval_p:
        for row, p in zip(rows[1:], holm(retrieval_p[1:]), strict=True):
            metrics["variants"][row.label]["passkey_p_holm"] = p
    columns = [
        "",
        "bits",
        "perplexity excess %",
        "KL, 1e-3 nats",
        "flips %",
        f"= exact ±{margin_nats:g}",
        "p (Holm)",
    ]
    if retrieval_p:
        columns += ["pass keys %", "p (Holm)"]
    if baseline:
        columns += ["KL ratio at equal bits", "excess ratio"]
    return (
        metrics,
        columns,
        [_line(row.label, metrics["variants"][row.label], bool(retrieval_p), bool(baseline)) for row in rows],
    )


def _percent(interval: Interval) -> dict[str, Any]:
    """A difference of mean losses as per cent of perplexity: exp is monotone, so ends map to ends."""
    estimate, low, high = (100 * math.expm1(x) for x in (interval.estimate, interval.low, interval.high))
    return dataclasses.asdict(dataclasses.replace(interval, estimate=estimate, low=low, high=high))


def _line(label: str, entry: dict[str, Any], has_passkeys: bool, has_baseline: bool) -> list[str]:
    def text(name: str, factor: float, digits: int) -> str:
        if name not in entry:
            return "-"
        found = entry[name]
        ends = [f"{factor * found[k]:.{digits}f}" for k in ("estimate", "low", "high")]
        return f"{ends[0]} [{ends[1]}, {ends[2]}]"

    line = [
        label,
        f"{entry['effective_bits']:.2f}",
        text("perplexity_excess_percent", 1, 2),
        text("kl", 1e3, 2),
        text("flips", 100, 2),
        "yes" if entry["equivalence"]["holds"] else "no",
        _p(entry.get("excess_p_holm")),
    ]
    if has_passkeys:
        line += [text("passkey", 100, 0), _p(entry.get("passkey_p_holm"))]
    if has_baseline:
        line += [text("kl_ratio", 1, 2), text("excess_ratio", 1, 2)]
    return line


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"
