"""The paper's figures, as wide as a column, drawn from result.json alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvquant.energy.fleet import PREFILL
from kvquant.report.collect import Run
from kvquant.report.kernels_figure import draw_decode
from kvquant.report.paper.sources import block_size_runs, energy_runs
from kvquant.report.quantities import variants_of
from kvquant.report.style import COLOURS, CYCLE, figure

COLUMN_IN = 3.25
MARKERS = "osD^vP*X"


def draw_figures(
    chosen: Mapping[str, Run],
    runs: Sequence[Run],
    measured: Sequence[tuple[dict[str, Any], Run]],
    folder: Path,
) -> Iterator[tuple[str, list[Run]]]:
    """Draw what there are runs for; yields each figure's name and the runs it shows (none: it was not drawn).

    Args:
        chosen: the run behind each source, by name.
        runs: all that ended well, for figures that need several of a kind.
        measured: rows of ``task=kernels`` on a GPU, each with its run.
        folder: where the PDF files go.
    """
    for name, source, draw in (
        ("pareto", "pareto" if "pareto" in chosen else "main", _pareto),
        ("bytes", "prefill", _bytes),
        ("append", "allocation", _append),
        ("history", "history", _history),
    ):
        if source in chosen:
            draw(chosen[source], folder / f"figure-{name}.pdf")
        yield f"figure-{name}", [chosen[source]] if source in chosen else []
    metered = energy_runs(chosen)
    drawn = bool(metered) and _energy(metered, folder / "figure-energy.pdf")
    yield "figure-energy", metered if drawn else []
    sizes = block_size_runs(runs)
    # One size is a point, not a comparison.
    if len(sizes) > 1:
        _blocks(sizes, folder / "figure-blocks.pdf")
    yield "figure-blocks", sizes if len(sizes) > 1 else []
    decode = {run.file: run for row, run in measured if row["operation"] == "decode"}
    if decode:
        draw_decode([row for row, _ in measured], folder / "figure-decode.pdf", COLUMN_IN)
    yield "figure-decode", list(decode.values())


def _family(label: str) -> str:
    """The curve that a row is a point of: its method, with its settings but without its widths."""
    return re.sub(r"^([a-z_]+?)(\d|k\dv\d)(?=$|[- ])", r"\1", label)


def _pareto(run: Run, path: Path) -> None:
    families: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for label, entry in variants_of(run).items():
        if entry["kl"]["estimate"] > 0:
            families.setdefault(_family(label), []).append((entry["effective_bits"], entry["kl"]))
    with figure(path, COLUMN_IN, 2.9) as (axis,):
        for index, (family, points) in enumerate(families.items()):
            points.sort(key=lambda point: point[0])
            axis.plot(
                [bits for bits, _ in points],
                [kl["estimate"] for _, kl in points],
                marker=MARKERS[(index + index // len(CYCLE)) % len(MARKERS)],
                markersize=3.5,
                linewidth=0.9,
                linestyle=("-", "--", ":")[index // len(CYCLE) % 3],
                color=CYCLE[index % len(CYCLE)],
                label=family.replace(" recent_tokens=", ", R="),
            )
        axis.set_yscale("log")
        axis.set_xlabel("effective bits, all in", fontsize=8)
        axis.set_ylabel("KL from the exact cache, nats", fontsize=8)
        _finish(axis)
        # Curves fall from the upper left: this corner is free.
        axis.legend(fontsize=5.5, frameon=False, loc="upper right")


def _bytes(run: Run, path: Path) -> None:
    metrics = run.result["metrics"]
    memory, tokens = metrics["memory"], metrics["batch"]["tokens"]
    with figure(path, COLUMN_IN, 1.7) as (axis,):
        exact = memory["exact"]["held_bytes"] / tokens
        axis.barh(0, exact, color=COLOURS["exact"], label="exact K and V")
        left = 0.0
        for kind, num_bytes in memory["quantized"]["parts_bytes"].items():
            axis.barh(1, num_bytes / tokens, left=left, color=COLOURS.get(kind, COLOURS["good"]), label=kind)
            left += num_bytes / tokens
        for row, (name, end) in enumerate((("exact", exact), ("quantized", left))):
            axis.text(end, row, f" {memory[name]['effective_bits']:.2f} bits", va="center", fontsize=7)
        axis.set_yticks([0, 1], ["exact", "quantized"])
        axis.set_xlim(0, exact * 1.25)
        axis.set_xlabel("bytes held per token, block slack included", fontsize=8)
        _finish(axis)
        axis.set_ylim(2.3, -0.5)
        axis.legend(loc="lower right", fontsize=6, frameon=False, ncols=2)


def _append(run: Run, path: Path) -> None:
    names = {
        "cat_fp16": "concatenation",
        "blocks_quantized": "blocks, quantized",
        "blocks_exact": "blocks, exact",
        "cat_csc": "outliers, concatenated",
        "blocked_csc": "outliers, blocked",
    }
    by_way = run.result["metrics"]["append_s"]
    with figure(path, COLUMN_IN, 2.3) as (axis,):
        for index, (way, text) in enumerate(names.items()):
            points = sorted((int(n), 1e6 * s) for n, s in by_way.get(way, {}).items() if s is not None)
            axis.plot(
                [n for n, _ in points],
                [us for _, us in points],
                marker=MARKERS[index],
                markersize=3.5,
                linewidth=1,
                linestyle="--" if "cat" in way else "-",
                color=CYCLE[index],
                label=text,
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens already stored", fontsize=8)
        axis.set_ylabel("us per appended token", fontsize=8)
        _finish(axis)
        axis.legend(fontsize=6, frameon=False)


def _energy(runs: Sequence[Run], path: Path) -> bool:
    """Joules as a share of the exact cache's, by phase and batch; returns False, drawing nothing, without a ratio."""
    points = [point for run in runs for point in run.result["metrics"]["points"] if point.get("headline")]
    points.sort(key=lambda point: (point["phase"] == PREFILL, point["batch"], point["prompt_tokens"]))
    if not points:
        return False
    labels = list(dict.fromkeys(label for point in points for label in point["headline"]))
    with figure(path, COLUMN_IN, 2.0) as (axis,):
        axis.axhline(1, color=COLOURS["exact"], linewidth=0.8)
        for index, label in enumerate(labels):
            shown = [(at, p["headline"][label]) for at, p in enumerate(points) if label in p["headline"]]
            middle = [ratio["value"] for _, ratio in shown]
            ends = [
                [ratio["value"] - ratio["low"] for _, ratio in shown],
                [ratio["high"] - ratio["value"] for _, ratio in shown],
            ]
            axis.errorbar(
                [at + 0.18 * (index - (len(labels) - 1) / 2) for at, _ in shown],
                middle,
                yerr=ends,
                linestyle="none",
                marker=MARKERS[index],
                markersize=3.5,
                capsize=2,
                linewidth=0.8,
                color=CYCLE[index % len(CYCLE)],
                label=label,
            )
        axis.set_xticks(
            range(len(points)), [f"{p['phase']}\n{p['batch']} x\n{p['prompt_tokens']:,}" for p in points]
        )
        axis.set_xlim(-0.5, len(points) - 0.5)
        axis.set_ylabel("joules, times exact", fontsize=8)
        _finish(axis)
        axis.legend(fontsize=6, frameon=False)
    return True


def _blocks(runs: list[Run], path: Path) -> None:
    sizes = [int(run.config("cache.block_size")) for run in runs]
    with figure(path, COLUMN_IN, 1.8, columns=2) as axes:
        for axis, key, text in zip(
            axes,
            ("memory.quantized.effective_bits", "prefill.ttft_overhead_percent"),
            ("effective bits", "first token later, % of exact"),
            strict=True,
        ):
            axis.plot(
                sizes, [run.metric(key) for run in runs], "o-", markersize=3.5, color=COLOURS["quantized"]
            )
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
            axis.set_xlabel("tokens per block", fontsize=7)
            axis.set_title(text, fontsize=7)
            _finish(axis)


def _history(run: Run, path: Path) -> None:
    metrics = run.result["metrics"]
    names = {"quantized": "quantized blocks", "exact": "exact blocks", "stock": "transformers' cache"}
    with figure(path, COLUMN_IN, 2.0) as (axis,):
        dense = metrics["dequantized_layer_bytes"]
        lines = [(text, metrics[key]["extra_bytes"]) for key, text in names.items() if key in metrics]
        for index, (text, by_length) in enumerate([*lines, ("one layer, dequantized", dense)]):
            points = sorted((int(n), value / 2**20) for n, value in by_length.items() if value is not None)
            axis.plot(
                [n for n, _ in points],
                [mib for _, mib in points],
                "--" if by_length is dense else MARKERS[index] + "-",
                markersize=2.5 + 2 * index,
                linewidth=1,
                color=COLOURS["exact"] if by_length is dense else CYCLE[index],
                # Blocks of either kind may lie on one line: the quantized ones on top, in smaller marks.
                zorder=10 - index,
                label=text,
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel("tokens of history", fontsize=8)
        axis.set_ylabel("extra MiB of one chunk", fontsize=8)
        _finish(axis)
        axis.legend(fontsize=6, frameon=False)


def _finish(axis: Any) -> None:
    axis.tick_params(labelsize=7)
