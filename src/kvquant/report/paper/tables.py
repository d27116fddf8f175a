"""The paper's tables: those of the text are selections, those of the appendix are what the runs printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kvquant.energy.fleet import DECODE, PREFILL
from kvquant.report.collect import Run
from kvquant.report.energy import fleet_tables
from kvquant.report.kernel_cases import cases_of
from kvquant.report.paper import tex
from kvquant.report.paper.kernel_tables import KERNEL_TABLES
from kvquant.report.paper.sources import energy_runs
from kvquant.report.quantities import variants_of
from kvquant.report.tables import ReportTable, latex_escape

# Rows of the main table, grouped by width; what is missing in a run is left out there and stands in the appendix.
MAIN_ROWS = (
    ("exact",),
    ("nuq4-1%", "uniform4-1%", "normal_float4-1%", "hadamard4", "kivi3 recent_tokens=32"),
    ("nuq3", "nuq3-1%", "uniform3-1%", "normal_float3-1%", "hadamard3", "kivi2 recent_tokens=32"),
    ("nuq2", "nuq2-1%", "uniform2-1%", "normal_float2-1%", "hadamard2"),
)
WINDOW_ROWS = (("nuq3-1%", "nuq_window3"), ("nuq2-1%", "nuq_window2"))


def method(label: str) -> str:
    """Return a row's label as LaTeX, its settings shortened."""
    return latex_escape(label.replace(" recent_tokens=", ", R="))


def _quality(run: Run, groups: Sequence[Sequence[str]], *, ratios: bool = False) -> str:
    """Rows of ``task=compare``: bits, what is lost, what is still found."""
    variants = variants_of(run)
    columns = [
        "",
        "bits",
        r"perplexity, \% over exact",
        r"KL, $10^{-3}$ nats",
        r"changed, \%",
        r"pass keys, \%",
    ]
    columns += ["KL ratio", "excess ratio"] if ratios else []
    rows: list[list[str]] = []
    rules: list[int] = []
    for group in groups:
        if rows:
            rules.append(len(rows))
        for label in group:
            if label not in variants:
                continue
            entry = variants[label]
            cells = [
                tex.number(entry["effective_bits"], ".2f"),
                tex.interval(entry["perplexity_excess_percent"], ".2f"),
                tex.interval(entry["kl"], ".1f", 1e3),
                tex.interval(entry["flips"], ".1f", 100),
                tex.interval(entry.get("passkey"), ".0f", 100),
            ]
            if ratios:
                cells += [tex.interval(entry.get(key), ".2f") for key in ("kl_ratio", "excess_ratio")]
            rows.append([method(label), *(_dash(cell) for cell in cells)])
    return tex.tabular(columns, rows, rules_before=rules)


def _dash(cell: str | None) -> str:
    return "--" if cell is None else cell


def _printed(run: Run, drop: Sequence[str] = ()) -> str:
    """The table that a run printed, less some columns."""
    table = run.result["table"]
    keep = [index for index, name in enumerate(table["columns"]) if name not in drop]

    def cells(row: Sequence[Any]) -> list[str]:
        return [tex.plain("" if row[i] is None else str(row[i])) for i in keep]

    return tex.tabular(cells(table["columns"]), [cells(row) for row in table["rows"]])


def _energy(runs: Sequence[Run], phase: str) -> str:
    """A phase's joules per token by batch, history and cache, and whether each row is valid."""
    columns = ["", "cache", "mJ/token", "above idle", "W", r"CV, \%", "ratio", "valid"]
    rows: list[list[str]] = []
    rules: list[int] = []
    for point in (p for run in runs for p in run.result["metrics"]["points"] if p["phase"] == phase):
        if rows:
            rules.append(len(rows))
        for label, entry in point["variants"].items():
            ratio = point["ratios"].get(label, {})
            rows.append(
                [
                    f"{point['phase']}{', graph' if point.get('captured') else ''} "
                    f"{point['batch']} $\\times$ {point['prompt_tokens']}",
                    latex_escape(label),
                    _dash(tex.number(entry["j_per_token_mean"], ".2f", 1e3)),
                    _dash(tex.number(entry["above_idle_j_per_token_mean"], ".2f", 1e3)),
                    _dash(tex.number(entry["power_w"], ".0f")),
                    _dash(tex.number(entry["cv_percent"], ".1f")),
                    _dash(tex.interval(ratio.get("total"), ".3f")),
                    "no" if entry["faults"] or ratio.get("faults") else "yes",
                ]
            )
    return tex.tabular(columns, rows, rules_before=rules)


def _fleet(table: ReportTable) -> str:
    """A day of requests, by batch and cache; the text says what it assumes."""
    rows = [[latex_escape(cell.text) for cell in row] for row in table.rows]
    return tex.tabular([latex_escape(name) for name in table.columns], rows)


def _allocation(run: Run) -> str:
    """Microseconds per appended token, by tokens already stored."""
    by_way = run.result["metrics"]["append_s"]
    lengths = sorted(next(iter(by_way.values())), key=int)
    names = {
        "blocks_exact": "blocks, exact",
        "blocks_quantized": "blocks, quantized",
        "cat_fp16": "concatenation",
        "blocked_csc": "outliers, blocked",
        "cat_csc": "outliers, concatenated",
    }
    rows = [
        [text, *(_dash(tex.number(by_way[way].get(n), ",.0f", 1e6)) for n in lengths)]
        for way, text in names.items()
        if way in by_way
    ]
    return tex.tabular(["", *(format(int(n), ",d") for n in lengths)], rows)


def _serving(run: Run) -> str:
    """The two replays side by side."""
    metrics = run.result["metrics"]
    lines: tuple[tuple[str, str, str, float], ...] = (
        ("requests finished", "finished", "d", 1),
        ("held at once, at most", "held_max", "d", 1),
        ("held on average while memory decides", "held_mean_memory_bound", ".1f", 1),
        ("preemptions", "preemptions", "d", 1),
        ("time to first token, median, s", "ttft_s_p50", ".2f", 1),
        ("time to first token, 99th percentile, s", "ttft_s_p99", ".2f", 1),
        ("between tokens, median, ms", "inter_token_s_p50", ".0f", 1e3),
        ("between tokens, 99th percentile, ms", "inter_token_s_p99", ".0f", 1e3),
        ("until all are served, s", "makespan_s", ".1f", 1),
        ("lost or duplicated", "lost", "d", 1),
    )
    rows = []
    for text, key, spec, factor in lines:
        values = [metrics[cache].get(key) for cache in ("exact", "quantized")]
        if key == "lost":
            values = [metrics[c]["lost"] + metrics[c]["duplicated"] for c in ("exact", "quantized")]
        rows.append([text, *(_dash(tex.number(value, spec, factor)) for value in values)])
    return tex.tabular(["", "exact", "quantized"], rows)


def _history(run: Run) -> str:
    """Extra memory of one more chunk by history, MiB."""
    metrics = run.result["metrics"]
    dense = metrics["dequantized_layer_bytes"]
    lengths = sorted(dense, key=int)
    names = {"quantized": "quantized blocks", "exact": "exact blocks", "stock": "transformers' cache"}
    by_name = {text: metrics[key]["extra_bytes"] for key, text in names.items() if key in metrics}
    by_name["one layer, dequantized"] = dense
    rows = [
        [text, *(_dash(tex.number(by_length.get(n), ".1f", 2**-20)) for n in lengths)]
        for text, by_length in by_name.items()
    ]
    return tex.tabular(["", *(format(int(n), ",d") for n in lengths)], rows)


def compiled(data: dict[str, Any] | None) -> str:
    """What the Triton kernels compile to, from ``python -m kvquant.bench.compile_table --json``: a line for each kernel
    and architecture, with the range over its widths and shapes."""
    if data is None:
        return tex.NOT_MEASURED
    columns = {
        "warps": "warps",
        "registers": "registers",
        "spills": "spills",
        "shared_bytes": "shared, B",
        "loads_128_bit": "wide loads",
        "loads": "of loads",
        "hmma": "HMMA",
        "wgmma": "wgmma",
    }
    variants: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in data["rows"]:
        variants.setdefault((row["kernel"], row["sm"]), []).append(row)
    rows = [
        [tex.plain(kernel), str(sm), str(len(found)), *(_range(key, found) for key in columns)]
        for (kernel, sm), found in variants.items()
    ]
    return tex.tabular(["kernel", "sm", "variants", *columns.values()], rows)


def _range(key: str, rows: Sequence[dict[str, Any]]) -> str:
    numbers = sorted(row[key] for row in rows if key in row)
    if not numbers:
        return _dash(None)
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]}--{numbers[-1]}"


Builder = Callable[[Run], str]
# File name without .tex, source, what makes it.
TABLES: tuple[tuple[str, str, Builder], ...] = (
    ("main", "main", lambda run: _quality(run, MAIN_ROWS)),
    ("llama", "llama", lambda run: _quality(run, MAIN_ROWS)),
    ("window", "window", lambda run: _quality(run, WINDOW_ROWS, ratios=True)),
    ("prefill", "prefill", _printed),
    ("allocation", "allocation", _allocation),
    ("quantize", "quantize", _printed),
    ("serve", "serve", _serving),
    ("fullmain", "main", _printed),
    ("fulloptions", "options", _printed),
    ("fulleightbit", "eightbit", _printed),
    ("fullpareto", "pareto", _printed),
    ("history", "history", _history),
    ("ruler", "ruler", _printed),
    ("kernelscpu", "kernelscpu", _printed),
    ("largest", "largest", _printed),
)


def build_tables(
    chosen: Mapping[str, Run], measured: Sequence[tuple[dict[str, Any], Run]]
) -> Iterator[tuple[str, str, list[Run]]]:
    """Yield name, LaTeX and runs of every table; where there is no run, the mark that says so.

    Args:
        chosen: the run behind each source, by name.
        measured: rows of ``task=kernels`` on a GPU, each with its run.
    """
    for name, source, build in TABLES:
        run = chosen.get(source)
        yield f"table-{name}", tex.NOT_MEASURED if run is None else build(run), [] if run is None else [run]
    for phase in (PREFILL, DECODE):
        parts = energy_runs(chosen, phase)
        yield f"table-energy{phase}", _energy(parts, phase) if parts else tex.NOT_MEASURED, parts
    metered = energy_runs(chosen)
    # A day of requests takes both phases.
    bill = fleet_tables(metered) if {"energyprefill", "energydecode"} <= chosen.keys() else []
    yield "table-fleet", _fleet(bill[0]) if bill else tex.NOT_MEASURED, metered if bill else []
    for name, operation, build_cases in KERNEL_TABLES:
        shown = {run.file: run for row, run in measured if row["operation"] == operation}
        cases = cases_of([row for row, _ in measured], operation)
        yield f"table-{name}", build_cases(cases) if cases else tex.NOT_MEASURED, list(shown.values())
