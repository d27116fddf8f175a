"""The GPU's kernels on README's page: decode and quantizing by case and width, a figure, and what they come to in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvquant.report.collect import Run
from kvquant.report.kernel_cases import (
    GRAPH_SPEEDUP,
    SPEEDUP,
    WIDTHS,
    Case,
    cases_of,
    is_uneven,
    us_of_way,
    us_per_1k_tokens,
    values,
    way_words,
)
from kvquant.report.kernels_figure import draw_decode
from kvquant.report.paper.sources import choose, kernel_rows, largest_part_first

Result = dict[str, Any]
AsTable = Callable[[Sequence[str], Sequence[Sequence[Any]]], str]
HEADS = [f"{bits} bits" for bits in WIDTHS]
# Times full precision, for eight or more sequences of 32K tokens; per cent of a layer's prefill.
DECODE_AIM, SHARE_AIM = 1.5, 1.0
MANY = "eight or more sequences of 32K tokens"


def draw_kept_decode(kept: Mapping[str, Result], figures: Path) -> None:
    """Draw how decode compares with full precision over all kept parts of a bench; nothing where there is none.

    Args:
        kept: results by name.
        figures: paper/figures.
    """
    measured = kernel_rows(_runs(kept))
    if any(row["operation"] == "decode" for row, _ in measured):
        draw_decode([row for row, _ in measured], figures / _figure_name(measured[0][1].result), 5.0)


def kernel_parts(kept: Mapping[str, Result], paper: Path, as_table: AsTable) -> list[str]:
    """Return README's paragraphs on kernels; none where none was measured on a GPU.

    Args:
        kept: results by name.
        paper: paper/, with figures.
        as_table: makes Markdown of columns and rows.
    """
    measured = kernel_rows(_runs(kept))
    if not measured:
        return []
    parts = largest_part_first(measured)
    rows = [row for row, _ in measured]
    main, names = parts[0].result, " ".join(f"`{run.file.stem}`" for run in parts)
    code = ", ".join(
        dict.fromkeys((run.result["provenance"].get("git_sha") or "no git")[:10] for run in parts)
    )
    decode, shares = cases_of(rows, "decode"), cases_of(rows, "layer_share")
    graphs = (
        " and then in graphs, of full precision the faster of the two"
        if values(decode, GRAPH_SPEEDUP)
        else ""
    )
    out = []
    if decode:
        out += [
            f"Kernels on an {main['provenance']['device']} (code {code}; {names} in [paper/results.md](paper/results.md)): one "
            "token of each sequence attends to its history. Microseconds of a call in a CUDA graph; in brackets how many times as "
            f"fast as the fastest full-precision attention that PyTorch has there, both launched call by call{graphs} (~, and hollow in the figure: calls differ by more than half of "
            f"their median), and the share of a copy's bandwidth ({main['metrics']['copy_gb_per_s']:,.0f} GB/s).",
            as_table(
                ["layer, sequences x tokens", "full precision, us", *HEADS],
                [
                    [f"{case.shape}, {case.words()}", _rival(case), *map(_decode_cell, _by_width(case))]
                    for case in decode
                ],
            ),
        ]
        figure = f"figures/{_figure_name(main)}"
        if (paper / figure).is_file():
            out.append(f"![Decode against full precision by case and width](paper/{figure})")
    if shares:
        out += [
            "Quantizing and storing a prompt's keys and values: microseconds for 1,024 of its tokens, in brackets the share of that "
            "layer's prefill.",
            as_table(
                ["layer, prompts x tokens", "layer, us", *HEADS],
                [
                    [
                        f"{case.shape}, {case.words()}",
                        f"{case.any['layer_us']:,.0f}",
                        *map(_share_cell, _by_width(case)),
                    ]
                    for case in shares
                ],
            ),
        ]
    said = [
        *_said_of_decode(decode),
        *_said_of_ragged(decode),
        *_said_of_shares(shares),
        *_said_of_chunks(cases_of(rows, "prefill"), parts),
        *_said_of_largest(kept),
    ]
    return [*out, "\n".join(f"- {line}" for line in said)] if said else out


def gpu_name(result: Result) -> str | None:
    """Return the name of the GPU that a result is of, as files have it (h200); None: another device."""
    found = re.search(r"\b([AH]\d{3})\b", str(result["provenance"].get("device")))
    return found.group(1).lower() if found else None


def _figure_name(result: Result) -> str:
    return f"kernels_{gpu_name(result) or 'gpu'}_decode.png"


def _runs(kept: Mapping[str, Result]) -> list[Run]:
    return [Run(Path(f"{name}.json"), result) for name, result in kept.items()]


def _by_width(case: Case) -> list[Mapping[str, Any]]:
    return [case.by_bits.get(bits, {}) for bits in WIDTHS]


def _rival(case: Case) -> str:
    return f"{case.any['full_precision_us']:,.0f} ({way_words(case.any)})" if way_words(case.any) else ""


def _decode_cell(row: Mapping[str, Any]) -> str:
    if SPEEDUP not in row:
        return ""
    took = row.get("graph_us", row["us"])
    uneven = "~" if is_uneven(row) else ""
    both = f", {row[GRAPH_SPEEDUP]:.2f}" if GRAPH_SPEEDUP in row else ""
    return f"{took:,.0f} ({uneven}{row[SPEEDUP]:.2f}{both}; {100 * row['copy_fraction']:.0f}%)"


def _share_cell(row: Mapping[str, Any]) -> str:
    took = us_per_1k_tokens(row)
    return "" if took is None else f"{took:.1f} ({row['percent_of_layer']:.2f}%)"


def _range(numbers: Sequence[float], spec: str = ".2f") -> str:
    ends = [format(number, spec) for number in (min(numbers), max(numbers))]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _said_of_decode(cases: Sequence[Case]) -> list[str]:
    """Sequences of one length: by how many there are and how long."""
    uniform = [case for case in cases if not case.is_trace and values([case], SPEEDUP)]
    groups = {
        MANY: [c for c in uniform if c.batch >= 8 and c.tokens >= 32768],
        "eight or more of fewer": [c for c in uniform if c.batch >= 8 and c.tokens < 32768],
        "one sequence": [c for c in uniform if c.batch == 1],
    }
    ranges = {words: values(found, SPEEDUP, even=True) for words, found in groups.items()}
    told = [f"{_range(found)} for {words}" for words, found in ranges.items() if found]
    if not told:
        return []
    without = ", those left out that are marked ~" if any(map(is_uneven, _rows(uniform))) else ""
    line = f"Decode over equal lengths goes at these multiples of full precision's speed{without}: {', '.join(told)}."
    first = groups[MANY]
    if first:
        line += f" The aim for {MANY}, {DECODE_AIM:g} times, is met {_met(first)}."
        in_graphs = values(first, GRAPH_SPEEDUP, even=True)
        if in_graphs:
            line += f" In graphs it is {_range(in_graphs)} there, and met {_met(first, GRAPH_SPEEDUP)}."
    copy = values(first, "copy_fraction", even=True)
    if copy and max(copy) < 0.5:
        line += (
            f" It moves its bytes at {_range([100 * share for share in copy], '.0f')}% of a copy's bandwidth even there: what "
            "decoding codes and outliers takes in instructions, we think, weighs more than the bytes that they save."
        )
    dense = values(cases, "speedup_over_dequantize_then_attend", even=True)
    line += f" Dequantizing first takes {_range(dense, '.1f')} times as long." if dense else ""
    return [line]


def _rows(cases: Sequence[Case]) -> list[Mapping[str, Any]]:
    return [row for case in cases for row in case.by_bits.values()]


def _met(cases: Sequence[Case], speedup: str = SPEEDUP) -> str:
    """Where decode is as fast as it was meant to be."""
    found = []
    for case in cases:
        reached = {bits: values([case], speedup, [bits], even=True) for bits in WIDTHS}
        widths = [bits for bits, speedups in reached.items() if speedups and speedups[0] >= DECODE_AIM]
        if widths:
            found.append(f"{case.shape}, {case.words()} (at {_listed(widths, 'd')} bits)")
    return f"by {'; '.join(found)}; and by no other of them" if found else "at no width"


def _said_of_ragged(cases: Sequence[Case]) -> list[str]:
    """A ragged batch, and how much of its gain is the padding of the rival."""
    lines = []
    for case in cases:
        speedups = values([case], SPEEDUP)
        if not case.is_trace or len(speedups) < len(WIDTHS):
            continue
        line = (
            f"Over the ragged batch ({case.batch} lengths of a request trace, {case.any['mean_tokens']:,.0f} tokens on average, "
            f"{case.tokens:,} at most) it is {_listed(speedups)} times as fast at {_listed(WIDTHS, 'd')} bits."
        )
        # Of all that has about as many tokens in all what is nearest.
        equal = [c for c in cases if c.shape == case.shape and not c.is_trace and values([c], SPEEDUP)]
        near = min(equal, key=lambda c: abs(c.total_tokens - case.total_tokens), default=None)
        if near is not None and abs(near.total_tokens / case.total_tokens - 1) < 0.1:
            ours, theirs = (
                [c.by_bits[WIDTHS[0]][key] for c in (case, near)] for key in ("us", "full_precision_us")
            )
            line += (
                f" What it gains is the padding that the fastest of those ways reads: for these {case.total_tokens:,} tokens and for {near.total_tokens:,} of equal lengths "
                f"({near.words()}) full precision takes {theirs[0]:,.0f} and {theirs[1]:,.0f} us, ours at {WIDTHS[0]} bits "
                f"{ours[0]:,.0f} and {ours[1]:,.0f}. A full-precision decode over pages, of a serving engine, was not measured."
            )
        lines.append(line)
    return lines


def _said_of_shares(cases: Sequence[Case]) -> list[str]:
    """Where quantizing takes more of a prefill than it was meant to."""
    above = [
        f"{case.shape}, {case.words()} ({_range(found)}%)"
        for case in cases
        if (found := values([case], "percent_of_layer")) and max(found) > SHARE_AIM
    ]
    if not cases:
        return []
    said = f"Quantizing takes at most {SHARE_AIM:g}% of a layer's prefill, which was the aim"
    return [f"{said}, but for {' and '.join(above)}." if above else f"{said}."]


def _said_of_chunks(cases: Sequence[Case], parts: Sequence[Run]) -> list[str]:
    """Chunks of prompts, by how many sequences; a rival that was tried in one part of a bench only is told apart."""
    found = [case for case in cases if values([case], SPEEDUP)]
    told = []
    for batch in sorted({case.batch for case in found}):
        ratios = values([c for c in found if c.batch == batch and way_words(c.any) != "flex"], SPEEDUP)
        told += [f"{_range(ratios)} for {batch}"] if ratios else []
    line = (
        "A chunk of prompts (4,096 new tokens in all) over quantized history goes at these multiples of the fastest "
        f"full-precision attention's speed, by sequences: {', '.join(told)}; many sequences dequantize much for few queries."
    )
    for case in found:
        flash = _times_flash(case, parts)
        if way_words(case.any) == "flex" and flash:
            line += (
                f" For {case.words()} it is {_range(values([case], SPEEDUP))} of flex attention's, which was not tried everywhere, "
                f"and {_range(flash)} of FlashAttention's."
            )
    return [line] if told else []


def _times_flash(case: Case, parts: Sequence[Run]) -> list[float]:
    """How many times as fast as FlashAttention a chunk is, by width."""
    measured = (run.result["metrics"].get("full_precision", []) for run in parts)
    took = [us for rows in measured if (us := us_of_way(rows, case, "prefill", "sdpa_flash"))]
    return [took[0] / us for us in values([case], "us")] if took else []


def _said_of_largest(kept: Mapping[str, Result]) -> list[str]:
    run = choose(_runs(kept)).get("largest")
    if run is None:
        return []
    metrics, task = run.result["metrics"], run.result["config"]["task"]
    widths = [bits for bits in WIDTHS if f"nuq{bits}_sequences" in metrics]
    told = [
        f"{metrics[f'nuq{bits}_sequences']} ({metrics[f'nuq{bits}_times_exact']:.1f} times) at {bits} bits"
        for bits in widths
    ]
    return [
        f"Filled until it refuses a prompt, a GPU's memory beside {metrics['weights_bytes'] / 2**30:.0f} GiB for weights holds "
        f"{metrics['exact_sequences']} prompts of {task['prompt_tokens']:,} tokens exactly (all {metrics['layers']} layers of a "
        f"{task['shape']}), {', '.join(told)}."
    ]


def _listed(numbers: Sequence[float], spec: str = ".2f") -> str:
    texts = [format(number, spec) for number in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
