"""Fill README's results from run directories: ``python -m kvquant.report.readme outputs/... multirun/...``.

Keeps a copy of every result.json it used under paper/data/ and of the figures under paper/figures/, so that each
number in README can be traced. Nothing between the markers is typed by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvquant.results import FILE_NAME, load_result

BEGIN, END = "<!-- generated: results (begin) -->", "<!-- generated: results (end) -->"
# Figures of each task worth a place in README, with what they show.
FIGURES = {
    "prefill": [("bytes.png", "Bytes held per token of the batch, by what they hold")],
    "allocation": [("append.png", "Cost of appending one token, by tokens already stored")],
}
Result = dict[str, Any]


def main(folders: Sequence[str], root: Path) -> None:
    """Rewrite the generated section of ``root``/README.md.

    Args:
        folders: run directories, or folders of them (a sweep).
        root: the checkout.

    Raises:
        ResultError: a result.json is not one of ours.
        ValueError: a run did not end well, or README has no markers.
    """
    found = sorted(path for folder in folders for path in Path(folder).rglob(FILE_NAME))
    results = [(path.parent, load_result(path)) for path in found]
    for folder, result in results:
        if result["status"] != "ok":
            raise ValueError(f"runs must have status ok, {folder} has {result['status']}; run it again")
    parts = []
    for task, render in RENDERERS.items():
        chosen = [(folder, result) for folder, result in results if result["task"] == task]
        if chosen:
            parts.append(render([result for _, result in chosen]))
            parts += _keep(task, chosen, root)
    readme = root / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"{readme} must hold the lines {BEGIN} and {END}; put them where results belong")
    _replace(readme, "\n\n".join([f"{before}{BEGIN}", *parts, f"{END}{after}"]))


def _keep(task: str, chosen: list[tuple[Path, Result]], root: Path) -> list[str]:
    """Copy results and figures; returns the Markdown that shows the figures."""
    data, figures = root / "paper" / "data", root / "paper" / "figures"
    for folder in (data, figures):
        folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for index, (folder, result) in enumerate(chosen):
        name = task if len(chosen) == 1 else f"{task}_{index}"
        _replace(data / f"{name}.json", json.dumps(result, indent=1) + "\n")
        for file, caption in FIGURES.get(task, []):
            if file in result["figures"] and len(chosen) == 1:
                shutil.copyfile(folder / file, figures / f"{task}_{file}")
                shown.append(f"![{caption}](paper/figures/{task}_{file})")
    return shown


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [["" if entry is None else str(entry) for entry in row] for row in [columns, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def _origin(result: Result) -> str:
    provenance = result["provenance"]
    sha = (provenance.get("git_sha") or "no git")[:10]
    return f"({provenance['device']}; code {sha}; model {provenance['model_hash'][:8] if provenance['model_hash'] else '-'})"


def _as_printed(command: str) -> Callable[[list[Result]], str]:
    """The table that the run itself printed, under the command that makes it."""

    def render(results: list[Result]) -> str:
        (result,) = results
        table = result["table"]
        head = f"`{command}`: {table['title']} {_origin(result)}"
        return f"{head}\n\n{_table(table['columns'], table['rows'])}"

    return render


def _perplexity(results: list[Result]) -> str:
    rows = []
    for result in sorted(results, key=lambda r: -r["config"]["quant"]["bits"]):
        m, quant = result["metrics"], result["config"]["quant"]
        rows.append(
            [
                f"{quant['method']}{quant['bits']}-{100 * quant['outlier_fraction']:g}%",
                f"{m['perplexity_exact']:.3f}",
                f"{m['perplexity_quantized']:.3f}",
                f"{m['perplexity_excess_percent']:+.2f}%",
                f"{m['kl_mean']:.2e}",
                f"{100 * m['top1_agreement']:.2f}%",
            ]
        )
    first = results[0]
    head = f"`python src/run.py -m task=perplexity quant.bits=2,3,4,8`: {first['config']['data']['name']}, "
    head += f"{first['metrics']['compared_tokens']} tokens predicted {_origin(first)}"
    columns = ["", "exact cache", "quantized cache", "excess", "KL (nats)", "top-1 agreement"]
    return f"{head}\n\n{_table(columns, rows)}"


def _energy(results: list[Result]) -> str:
    """The tables of every energy run, each under its own command line."""
    return "\n\n".join(
        _as_printed(" ".join(["python src/run.py", *r["provenance"].get("overrides", ["task=energy"])]))([r])
        for r in results
    )


RENDERERS: dict[str, Callable[[list[Result]], str]] = {
    "prefill": _as_printed("python src/run.py"),
    "perplexity": _perplexity,
    "allocation": _as_printed("python src/run.py experiment=ablation_allocation"),
    "quantize": _as_printed("python src/run.py task=quantize quant.bits=4"),
    "energy": _energy,
}


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main(sys.argv[1:], Path.cwd())
