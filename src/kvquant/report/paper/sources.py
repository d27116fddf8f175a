"""Which runs the paper rests on: each is known by what it measured, so that it counts however it was started."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvquant.report.collect import Run
from kvquant.report.quantities import variants_of

# Its numbers are left by a module, not by a task.
METER_COST, METER_COST_MODULE = "metercost", "kvquant.bench.meter_cost"
TINY, LLAMA = "tiny", "llama2_7b_32k"
# Histories from here on are long: decoding after them is a source of its own.
LONG_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class Source:
    """A run that the paper needs.

    Attributes:
        name: what macros and tables call it.
        what: in words, for the list of what has not been measured.
        command: what measures it.
        matches: whether a run is one.
        beside: a source before this one, whose device and model it must share where that has a run; empty: none.
    """

    name: str
    what: str
    command: str
    matches: Callable[[Run], bool]
    beside: str = ""


def _compares(*labels: str, part: str = "all", model: str = TINY) -> Callable[[Run], bool]:
    """Runs of ``task=compare`` whose table has these rows, over this part of the text."""

    def matches(run: Run) -> bool:
        has_rows = set(labels) <= set(variants_of(run))
        return has_rows and run.config("task.part") == part and run.config("model.name") == model

    return matches


def _task(name: str, /, **settings: Any) -> Callable[[Run], bool]:
    """Runs of a task with these settings; ``a__b`` stands for the key ``a.b``."""

    def matches(run: Run) -> bool:
        wanted = {key.replace("__", "."): value for key, value in settings.items()}
        return run.result["task"] == name and all(run.config(k) == v for k, v in wanted.items())

    return matches


def _measured(phase: str, *, is_long: bool | None = None) -> Callable[[Run], bool]:
    """Energy runs with a counter behind them, of this phase, after a long history or a shorter one: estimates compare nothing."""

    def fits(point: dict[str, Any]) -> bool:
        if point["phase"] != phase:
            return False
        return is_long is None or bool(point["prompt_tokens"] >= LONG_TOKENS) == is_long

    def matches(run: Run) -> bool:
        metrics = run.result["metrics"]
        return (
            run.result["task"] == "energy"
            and metrics.get("meter", {}).get("kind") == "measured"
            and any(map(fits, metrics.get("points", [])))
        )

    return matches


def _metered_load(run: Run) -> bool:
    """Energy runs with a counter behind them that also measured work of known length, with nothing against it."""
    metrics = run.result["metrics"]
    if run.result["task"] != "energy" or metrics.get("meter", {}).get("kind") != "measured":
        return False
    return bool(metrics.get("load")) and not metrics["load"].get("faults")


def _default_prefill(model: str) -> Callable[[Run], bool]:
    main = _task("prefill", quant__method="nuq", quant__bits=3, cache__block_size=64, model__name=model)
    return lambda run: main(run) and run.metric("memory.quantized.effective_bits") is not None


def _on_gpu(name: str) -> Callable[[Run], bool]:
    """Runs of a task on an NVIDIA GPU."""
    return lambda run: run.result["task"] == name and "NVIDIA" in str(run.result["provenance"].get("device"))


def _cpu_kernels(run: Run) -> bool:
    return run.result["task"] == "kernels" and not _on_gpu("kernels")(run)


_MAIN = ("normal_float3-1%", "hadamard3", "kivi3 recent_tokens=32")
SOURCES = (
    Source(
        "main",
        "methods, widths and outliers over the same windows and pass keys",
        "experiment=main_table",
        _compares(*_MAIN),
    ),
    Source(
        "window",
        "the chosen window and Q-Norm on documents nothing was chosen on",
        "experiment=nuq_window",
        _compares("nuq_window3", part="test"),
    ),
    Source(
        "options",
        "every option of nuq alone, on the dev part",
        "experiment=ablation_nuq_options",
        _compares("nuqk2v3", "nuq3 recent_tokens=32", part="dev"),
    ),
    Source(
        "eightbit",
        "every method at eight bits against the exact cache",
        "experiment=equivalence_8bit",
        _compares("nuq8-1%", "kivi8 recent_tokens=32"),
    ),
    Source("pareto", "quality against bytes", "experiment=pareto", _compares("nuq5", "hadamard5")),
    Source("prefill", "the main job", "task=prefill", _default_prefill(TINY)),
    Source(
        "allocation",
        "appending against concatenating",
        "experiment=ablation_allocation",
        _task("allocation"),
    ),
    Source(
        "quantize",
        "quantizing and attending on a CPU, at 7B width",
        "task=quantize quant.bits=4",
        _task("quantize", quant__bits=4),
    ),
    Source(
        "serve",
        "requests of a trace served at one memory budget",
        "task=serve_trace",
        _task("serve_trace", model__name=TINY),
    ),
    Source(
        "history",
        "memory and time of one more chunk by history",
        "task=history",
        _task("history", model__name=TINY),
    ),
    Source("kernelscpu", "every operation on a CPU", "task=kernels device=cpu", _cpu_kernels),
    Source("kernels", "every operation on a GPU", "task=kernels device=cuda", _on_gpu("kernels")),
    Source(
        "largest",
        "prompts of 16K tokens that a GPU's memory holds",
        "task=largest_batch device=cuda",
        _on_gpu("largest_batch"),
    ),
    Source(
        "energyprefill",
        "measured joules of prefill",
        "task=energy energy.meter=nvml task.phases=[prefill]",
        _measured("prefill"),
    ),
    Source(
        "energydecode",
        "measured joules of decode",
        "task=energy energy.meter=nvml task.phases=[decode]",
        _measured("decode", is_long=False),
    ),
    Source(
        "energydecodelong",
        "measured joules of decode after a long history",
        f"task=energy energy.meter=nvml task.phases=[decode] task.prompt_tokens=[{LONG_TOKENS}] task.batch_sizes=[32]",
        _measured("decode", is_long=True),
        beside="energydecode",
    ),
    Source(
        "energyload",
        "measured joules of a matrix product of known length",
        "task=energy energy.meter=nvml task.load_check=true",
        _metered_load,
    ),
    Source(
        METER_COST,
        "what the meter's readings cost the work beside them",
        f"python -m {METER_COST_MODULE} --json paper/data/energy_meter_cost.json",
        # No run: `kvquant.report.paper.build` finds its record.
        lambda run: False,
    ),
    Source(
        "llama",
        "the main table on Llama-2-7B-32K",
        "experiment=paper_a100 hydra/launcher=athena",
        _compares(*_MAIN, model=LLAMA),
    ),
    Source(
        "ruler",
        "RULER on Llama-2-7B-32K",
        "experiment=paper_a100 hydra/launcher=athena",
        _task("ruler", model__name=LLAMA),
    ),
    Source(
        "llamaprefill",
        "the main job on Llama-2-7B-32K",
        "experiment=paper_a100 hydra/launcher=athena",
        _default_prefill(LLAMA),
    ),
)


ENERGY_SOURCES = ("energyprefill", "energydecode", "energydecodelong")


def choose(runs: Sequence[Run]) -> dict[str, Run]:
    """Return the run behind each source: of several the one that started last.

    Args:
        runs: those that ended well.
    """
    chosen: dict[str, Run] = {}
    for source in SOURCES:
        found = latest_first(runs, source.matches)
        if source.beside in chosen:
            found = [run for run in found if _place(run) == _place(chosen[source.beside])]
        if found:
            chosen[source.name] = found[0]
    return chosen


def _place(run: Run) -> tuple[Any, Any]:
    """Device and model."""
    return run.result["provenance"].get("device"), run.result["provenance"].get("model_hash")


def energy_runs(chosen: Mapping[str, Run], phase: str = "") -> list[Run]:
    """Return the chosen runs whose joules are shown: of prefill, of decoding after two lengths of history, or one of all.

    Args:
        chosen: the run behind each source, by name.
        phase: those of this phase alone; empty: of both.
    """
    names = [name for name in ENERGY_SOURCES if name.startswith(f"energy{phase}") and name in chosen]
    return list({chosen[name].file: chosen[name] for name in names}.values())


def latest_first(runs: Sequence[Run], matches: Callable[[Run], bool]) -> list[Run]:
    """Return the runs of a kind, the one that started last first."""
    return sorted(
        filter(matches, runs), key=lambda run: (str(run.result.get("started_at")), run.folder), reverse=True
    )


def kernel_rows(runs: Sequence[Run]) -> list[tuple[dict[str, Any], Run]]:
    """Return what was measured of every operation on the GPU of the latest such run, each case from its latest run.

    One command may not take longer than a cluster's or a loan's limit, so a bench may come in several parts.
    """
    fitting = latest_first(runs, _on_gpu("kernels"))
    rows: dict[tuple[Any, ...], tuple[dict[str, Any], Run]] = {}
    for run in fitting:
        if run.result["provenance"]["device"] != fitting[0].result["provenance"]["device"]:
            continue
        for row in run.result["metrics"].get("rows", []):
            case = tuple(row[key] for key in ("operation", "shape", "label", "bits"))
            rows.setdefault(case, (row, run))
    return [rows[case] for case in sorted(rows, key=str)]


def largest_part_first(measured: Sequence[tuple[dict[str, Any], Run]]) -> list[Run]:
    """Return the runs behind these rows, the one that has most of them first: its number counts where several have it.

    Args:
        measured: as `kernel_rows` returns them.
    """
    rows: dict[Path, list[Run]] = {}
    for _, run in measured:
        rows.setdefault(run.file, []).append(run)
    return [runs[0] for runs in sorted(rows.values(), key=len, reverse=True)]


def block_size_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the main job by block size, one run for each: of several of one size the one that started last."""
    fits = _task("prefill", quant__method="nuq", quant__bits=3, model__name=TINY)
    by_size: dict[int, Run] = {}
    for run in latest_first(runs, fits):
        by_size.setdefault(int(run.config("cache.block_size")), run)
    return [by_size[size] for size in sorted(by_size)]
