"""Fill README's results from run directories: ``python -m kvquant.report.readme outputs/... multirun/...``.

Keeps a copy of every result.json under paper/data/ and of its figures under paper/figures/, then rewrites README's
generated part and paper/results.md from all that is kept there: what is not run again stays. Nothing between the
markers is typed by hand.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvquant.errors import ResultError
from kvquant.report.paper.sources import LONG_TOKENS
from kvquant.report.paper.tables import MAIN_ROWS
from kvquant.report.readme_energy import chosen_of, energy_parts, fleet_of
from kvquant.report.readme_kernels import draw_kept_decode, gpu_name, kernel_parts
from kvquant.results import FILE_NAME, load_result

BEGIN, END = "<!-- generated: results (begin) -->", "<!-- generated: results (end) -->"
# README shows this table and its figure; all others stand in paper/results.md.
MAIN, MAIN_FIGURE = "main_table", "quality.png"
# What the group paper calls presets, so that a run of either replaces the other's.
SAME = {"ablation_allocation": "allocation", "ablation_nuq_options": "nuq_options"}
Result = dict[str, Any]


def main(folders: Sequence[str], root: Path) -> None:
    """Keep runs and rewrite ``root``/README.md and ``root``/paper/results.md.

    Args:
        folders: run directories, or folders of them (a sweep); may be empty.
        root: the checkout.

    Raises:
        ResultError: a result.json is not one of ours.
        ValueError: a run did not end well, or README has no markers.
    """
    found = sorted(path for folder in folders for path in Path(folder).rglob(FILE_NAME))
    runs = [(path.parent, load_result(path)) for path in found]
    for folder, result in runs:
        if result["status"] != "ok":
            raise ValueError(f"runs must have status ok, {folder} has {result['status']}; run it again")
    for folder, result in runs:
        _keep(folder, result, root / "paper")
    kept = _kept(root / "paper" / "data")
    draw_kept_decode(kept, root / "paper" / "figures")
    _replace(root / "paper" / "results.md", _results_page(kept, root / "paper"))
    readme = root / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"{readme} must hold the lines {BEGIN} and {END}; put them where results belong")
    _replace(readme, "\n\n".join([f"{before}{BEGIN}", *_readme_parts(kept, root), f"{END}{after}"]))


def name_of(result: Result) -> str:
    """Return what a run is kept as: its preset, or its task with what tells it from others; a GPU's name behind it.

    A preset that sweeps makes several runs: what a point sets in the groups of quantizer, cache and text is named, too.
    A bench of kernels on a GPU comes in parts: shapes and lengths tell them apart.

    Args:
        result: as loaded.
    """
    overrides = result["provenance"].get("overrides") or []
    preset = next((o.partition("=")[2] for o in overrides if re.match(r"(experiment|paper)=\w+$", o)), None)
    name = SAME.get(preset, preset) if preset else str(result["task"])
    if preset is not None:
        points = (re.fullmatch(r"(?:quant|cache|data)\.\w+=([\w.]+)", o) for o in overrides)
        name = "_".join([name, *(point.group(1) for point in points if point)])
    if preset is None and name == "perplexity":
        name += f"_{result['config']['quant']['bits']}bit"
    if preset is None and name == "energy":
        name += "".join(f"_{phase}" for phase in result["config"]["task"]["phases"])
        shortest = min(result["config"]["task"].get("prompt_tokens") or [0])
        name += f"_{shortest // 1024}k" if shortest >= LONG_TOKENS else ""
    parts = result["config"]["task"]
    if preset is None and name == "kernels" and parts.get("shapes") and parts.get("tokens"):
        lengths = [f"{tokens / 1024:g}k" for tokens in (min(parts["tokens"]), max(parts["tokens"]))]
        name = "_".join([name, *parts["shapes"], *dict.fromkeys(lengths)])
    gpu = gpu_name(result)
    return f"{name}_{gpu}" if gpu else name


def _keep(folder: Path, result: Result, paper: Path) -> None:
    """Copy a result and its figures."""
    data, figures = paper / "data", paper / "figures"
    for target in (data, figures):
        target.mkdir(parents=True, exist_ok=True)
    name = name_of(result)
    _replace(data / f"{name}.json", json.dumps(result, indent=1) + "\n")
    for file in result["figures"]:
        if (folder / file).suffix == ".png" and (folder / file).is_file():
            shutil.copyfile(folder / file, figures / f"{name}_{file}")


def _kept(data: Path) -> dict[str, Result]:
    """All results under paper/data, by name; records of another kind lie there too."""
    kept = {}
    for path in sorted(data.glob("*.json")):
        try:
            kept[path.stem] = load_result(path)
        except ResultError:
            continue
    return kept


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [["" if entry is None else str(entry) for entry in row] for row in [columns, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def _origin(result: Result) -> str:
    provenance = result["provenance"]
    sha = (provenance.get("git_sha") or "no git")[:10] + ("+" if provenance.get("git_dirty") else "")
    model = provenance.get("model_hash")
    return f"({provenance['device']}; code {sha}; model {model[:8] if model else '-'})"


def _command(result: Result) -> str:
    return " ".join(["python src/run.py", *(result["provenance"].get("overrides") or [])])


def _results_page(kept: dict[str, Result], paper: Path) -> str:
    """Every table as its run printed it, under the command that makes it, with its figures."""
    parts = [
        "# Results",
        "Generated by `python -m kvquant.report.readme` from the runs in [data/](data/); README shows a part, the paper "
        "another. A plus sign after a commit: the working tree had changes, which the run's record holds.",
    ]
    for name, result in kept.items():
        table = result["table"]
        if table is None:
            continue
        parts += [f"## {name}", f"`{_command(result)}`", f"{table['title']} {_origin(result)}"]
        parts.append(_table(table["columns"], table["rows"]))
        figures = sorted(
            paper / "figures" / f"{name}_{file}" for file in result["figures"] if file.endswith(".png")
        )
        parts += [f"![{path.stem}](figures/{path.name})" for path in figures if path.is_file()]
    fleet = fleet_of(chosen_of(kept))
    if fleet is not None:
        parts += [
            "## fleet",
            "`python src/run.py task=report 'report.runs=[paper/data/energy_*.json]'`",
            fleet.title,
        ]
        parts.append(_table(fleet.columns, [[cell.text for cell in row] for row in fleet.rows]))
    return "\n\n".join([*parts, ""])


def _readme_parts(kept: dict[str, Result], root: Path) -> list[str]:
    """The main table, cut to what README has room for, its figure, and what it says in words."""
    result = kept.get(MAIN)
    if result is None:
        return [f"Not measured: `python src/run.py experiment={MAIN}`."]
    table, labels = result["table"], {label for group in MAIN_ROWS for label in group}
    shown = ["", "bits", "perplexity excess %", "KL, 1e-3 nats", "flips %", "pass keys %"]
    columns = [table["columns"].index(name) for name in shown if name in table["columns"]]
    rows = [[row[i] for i in columns] for row in table["rows"] if row[0] in labels]
    parts = [
        f"`{_command(result)}`: {table['title']} {_origin(result)}",
        _table([table["columns"][i] for i in columns], rows),
    ]
    if (root / "paper" / "figures" / f"{MAIN}_{MAIN_FIGURE}").is_file():
        parts.append(f"![Divergence from the exact cache against bytes](paper/figures/{MAIN}_{MAIN_FIGURE})")
    said = [*_said_of_main(result), *_said_of_prefill(kept), *_said_of_window(kept)]
    parts += ["\n".join(f"- {line}" for line in said)] if said else []
    parts += kernel_parts(kept, root / "paper", _table)
    return [*parts, *energy_parts(kept, root / "paper", _table)]


def _said_of_main(result: Result) -> list[str]:
    variants = result["metrics"]["variants"]
    if "nuq3-1%" not in variants or "nuq2" not in variants:
        return []
    three, two = variants["nuq3-1%"], variants["nuq2"]
    line = f"The default, `nuq` at 3 bits with 1% of outliers, costs {_interval(three['perplexity_excess_percent'])}% of "
    line += f"perplexity at {three['effective_bits']:.2f} bits per number, everything counted."
    lines = [line]
    if "passkey" in two:
        lines.append(
            f"Perplexity hides what retrieval shows: at 2 bits without outliers it grows by "
            f"{two['perplexity_excess_percent']['estimate']:.1f}%, and {100 * two['passkey']['estimate']:.0f}% of the pass "
            "keys are still found."
        )
    return lines


def _said_of_window(kept: dict[str, Result]) -> list[str]:
    variants = kept["nuq_window"]["metrics"]["variants"] if "nuq_window" in kept else {}
    ratios = [variants.get(f"nuq_window{bits}", {}).get("excess_ratio") for bits in (2, 3)]
    if any(ratio is None for ratio in ratios):
        return []
    return [
        "An exact window of recent tokens with Q-Norm (`quant=nuq_window`) leaves "
        f"{_interval(ratios[0])} of the excess of nuq with outliers at 2 bits and {_interval(ratios[1])} at 3, at equal bytes, "
        "on documents that nothing was chosen on. It helps with what is near; outliers stay the default."
    ]


def _said_of_prefill(kept: dict[str, Result]) -> list[str]:
    if "prefill" not in kept:
        return []
    metrics = kept["prefill"]["metrics"]
    return [
        f"`python src/run.py`, a ragged batch of {metrics['batch']['prompts']} prompts: {metrics['memory']['compression']:.2f} "
        f"times smaller than half precision ({metrics['memory']['quantized']['effective_bits']:.2f} bits), "
        f"{metrics['capacity']['sequences_ratio']:.2f} times as many such sequences in a budget; on a CPU the first token comes "
        f"{_first_token(metrics['prefill'])} later and decoding runs at "
        f"{metrics['decode']['tokens_per_s_quantized']:.0f} instead of {metrics['decode']['tokens_per_s_exact']:.0f} tokens/s."
    ]


def _first_token(prefill: dict[str, float]) -> str:
    """By how much the first token is later, with the spread of pairs where the run kept it."""
    said = f"{prefill['ttft_overhead_percent']:+.1f}%"
    if "ttft_overhead_lowest_percent" not in prefill:
        return said
    low, high = (prefill[f"ttft_overhead_{end}_percent"] for end in ("lowest", "highest"))
    return f"{said} (single pairs {low:+.0f}% to {high:+.0f}%)"


def _interval(entry: dict[str, float]) -> str:
    return f"{entry['estimate']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main(sys.argv[1:], Path.cwd())
