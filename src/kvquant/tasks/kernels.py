"""``task=kernels``: every operation's time, bytes and rivals, by shape, length, batch and bits; no model, no text.

Times are medians over inputs that no cache holds. Bandwidth is a fraction of what a copy reaches in the same run. The
rival is the fastest attention over a full-precision cache that this machine has, and dequantizing everything first.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.bench.full_precision import FullPrecision
from kvquant.bench.model_layer import ModelLayer
from kvquant.bench.operations import (
    Row,
    measure_attention,
    measure_dequantize,
    measure_writes,
)
from kvquant.bench.shapes import SHAPES
from kvquant.bench.stored import MadeUpKV, StoredHistory, layout_of
from kvquant.bench.timing import Clock, Timing, copies_past_cache
from kvquant.config.cost_tasks import KERNEL_OPERATIONS
from kvquant.data.prompts import prompt_lengths
from kvquant.spec import QuantSpec
from kvquant.tasks.setup import progress

CALIBRATION_TOKENS = 1024
# Tokens drawn beyond those of one call, so that copies and pieces hold different ones.
SPARE_TOKENS = 8192
# Of the memory that is free, what a case may plan to take; the rest is for temporaries.
MEMORY_SHARE = 0.85
# What `[]` and null mean, by device.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "shapes": ["llama31_8b"],
        "tokens": [1024],
        "batches": [2],
        "step_tokens": 128,
        "ragged_context": 0,
        "layer_tokens": [256],
        "most_copies": 2,
    },
    "cuda": {
        "shapes": ["llama2_7b", "llama31_8b", "qwen3_8b"],
        "tokens": [1024, 8192, 32768, 131072],
        "batches": [1, 8, 64],
        "step_tokens": 4096,
        "ragged_context": 8192,
        "layer_tokens": [],
        "most_copies": 64,
    },
}
QUANTITIES = (
    "us",
    "low_us",
    "high_us",
    "bytes",
    "gb_per_s",
    "copy_fraction",
    "full_precision_us",
    "speedup_over_full_precision",
    "dequantize_then_attend_us",
    "speedup_over_dequantize_then_attend",
    "graph_us",
    "eager_us",
    "difference",
    "us_per_1k_tokens",
    "tflop_per_s",
    "percent_of_layer",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One history to measure on."""

    shape: str
    lengths: tuple[int, ...]
    bits: int
    is_trace: bool = False

    @property
    def label(self) -> str:
        """Batch and length as metrics name them: 8x32768, or trace8."""
        return f"trace{len(self.lengths)}" if self.is_trace else f"{len(self.lengths)}x{self.lengths[0]}"

    def as_row(self) -> Row:
        """What a row says of its case."""
        return {
            "shape": self.shape,
            "batch": len(self.lengths),
            "tokens": max(self.lengths),
            "mean_tokens": sum(self.lengths) / len(self.lengths),
            "is_trace": self.is_trace,
            "bits": self.bits,
            "label": self.label,
        }


class DoesNotFit(Exception):
    """A case needs more memory than there is."""


def run(cfg: Any, context: Any) -> None:
    """Measure everything that the task's settings name.

    Args:
        cfg: the composed configuration; the settings are those of ``KernelsTask``.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    bench = Bench(cfg, context)
    metrics = context.record.metrics
    cases = bench.cases()
    if bench.clock.is_cuda:
        context.console.print(f"{len(cases)} histories on {torch.cuda.get_device_name(context.device)}")
    copies_s = [bench.clock.copy_bytes_per_s()]
    with torch.no_grad():
        for case in progress(context.console)(cases, "kernels", len(cases)):
            bench.measure(case)
    copies_s.append(bench.clock.copy_bytes_per_s())
    copy = statistics.mean(copies_s)
    for row in bench.rows:
        if "bytes" in row:
            row["gb_per_s"] = row["bytes"] / row["us"] / 1e3
            row["copy_fraction"] = 1e9 * row["gb_per_s"] / copy
    metrics["copy_gb_per_s"] = copy / 1e9
    metrics["copy_gb_per_s_before_and_after"] = [c / 1e9 for c in copies_s]
    metrics.update(flat(bench.rows))
    metrics["rows"] = bench.rows
    metrics["full_precision"] = bench.rivals
    metrics["skipped"] = bench.skipped
    context.record.set_table(
        f"{len(bench.rows)} measurements, {cfg.task.dtype}; a copy reaches {copy / 1e9:.0f} GB/s",
        *table(bench.rows),
    )
    for skip in bench.skipped:
        context.console.print(
            f"left out: {skip['part']} of {skip['shape']} {skip['label']} at {skip['bits']} bits: {skip['reason']}",
            highlight=False,
        )
    if cfg.task.figures and bench.rows:
        _draw(context)


def _draw(context: Any) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        context.console.print(
            "no matplotlib here, so no figure; elsewhere: python -m kvquant.report.kernels_figure result.json kernels.png"
        )
        return
    from kvquant.report.kernels_figure import draw_kernels

    context.record.add_figure(draw_kernels(context.record.metrics["rows"], context.run_dir / "kernels.png"))


class Bench:
    """The settings of a run, what it has measured, and what cases share.

    Attributes:
        rows: one measurement each, plain numbers and text.
        rivals: every full-precision way's time, or why it did not run.
        skipped: cases that do not fit the memory.
    """

    def __init__(self, cfg: Any, context: Any) -> None:
        self.cfg, self.task, self.context, self.device = cfg, cfg.task, context, context.device
        self.clock = Clock(self.device, seconds=cfg.task.seconds)
        self.slow_clock = Clock(self.device, seconds=cfg.task.seconds / 3, most_repeats=5)
        self.dtype: torch.dtype = getattr(torch, cfg.task.dtype)
        self.rows: list[Row] = []
        self.rivals: list[Row] = []
        self.skipped: list[Row] = []

    def setting(self, name: str) -> Any:
        """A setting, or what suits the device where it says nothing."""
        given = self.task.get(name)
        empty = given is None or (not isinstance(given, int) and len(given) == 0)
        return DEFAULTS[self.device.type][name] if empty else given

    def cases(self) -> list[Case]:
        """Everything to measure: bits innermost, so that they share their rivals."""
        found = []
        context = self.setting("ragged_context")
        for shape in self.setting("shapes"):
            batches = [(n,) * B for n in self.setting("tokens") for B in self.setting("batches")]
            cases = [(lengths, False) for lengths in batches]
            if context:
                cases.append((tuple(prompt_lengths(self.cfg.batch, context, self.cfg.seed)), True))
            found += [
                Case(shape, lengths, bits, is_trace) for lengths, is_trace in cases for bits in self.task.bits
            ]
        return found

    def measure(self, case: Case) -> None:
        """All operations on one history; a case that does not fit is noted."""
        for part in (self._layer_share, self._over_history):
            try:
                self.rows += [{**case.as_row(), **row} for row in part(case)]
            except (DoesNotFit, torch.OutOfMemoryError) as error:
                self._skip(case, part.__name__.strip("_").replace("_", " "), error)
            if self.clock.is_cuda:
                torch.cuda.empty_cache()

    def _skip(self, case: Case, part: str, error: Exception) -> None:
        self.skipped.append({**case.as_row(), "part": part, "reason": " ".join(str(error).split())[:200]})

    def _over_history(self, case: Case) -> Iterator[Row]:
        wanted = set(self.task.operations)
        if not wanted & {"write_keys", "write_values", "dequantize", "decode", "prefill"}:
            return
        rival = {new: self._rivals_that_fit(case, new) for new in self._new(case)}
        history = self._history(case.shape, case.lengths, case.bits, room=self._chunk(case))
        settings = {"slow_clock": self.slow_clock, "prefill_reads": self.cfg.cache.prefill_reads}
        yield from (
            row
            for row in measure_writes(history, self.clock, self.task.write_tokens)
            if row["operation"] in wanted
        )
        if not wanted & {"dequantize", "decode", "prefill"}:
            return
        history.fill()
        if "dequantize" in wanted:
            yield measure_dequantize(history, self.clock)
        for new, found in rival.items():
            graph = self.task.graph and self.clock.is_cuda and new == 1
            yield measure_attention(
                history, self.clock, new, full_precision=found, with_graph=graph, **settings
            )

    def _new(self, case: Case) -> list[int]:
        """New tokens of each sequence in the attention calls to measure."""
        chunk = [self._chunk(case)] if "prefill" in self.task.operations and not case.is_trace else []
        return ([1] if "decode" in self.task.operations else []) + chunk

    def _chunk(self, case: Case) -> int:
        return max(16, self.setting("step_tokens") // len(case.lengths))

    def _rivals_that_fit(self, case: Case, new: int) -> dict[str, Timing | str]:
        """What the full-precision ways take; nothing where only the quantized history fits the memory."""
        try:
            return self._rivals(case.shape, case.lengths, new, case.label)
        except (DoesNotFit, torch.OutOfMemoryError) as error:
            self._skip(case, "full precision", error)
            return {}

    @functools.lru_cache(maxsize=4)  # noqa: B019  (the bench lives as long as its run)
    def _rivals(self, name: str, lengths: tuple[int, ...], new: int, label: str) -> dict[str, Timing | str]:
        shape = SHAPES[name]
        seen = [n + (new if new > 1 else 0) for n in lengths]
        once = FullPrecision.nbytes(shape, seen, 1, self.dtype)
        copies = copies_past_cache(once, self.device, self.setting("most_copies"))
        # Ways that want another layout make a copy.
        self._require(2 * copies * once)
        found = FullPrecision(shape, seen, new, copies, self.dtype, self.device).measure(
            self.clock, list(self.task.baselines)
        )
        entry = {"operation": "decode" if new == 1 else "prefill", "shape": name, "label": label, "new": new}
        for way, timing in found.items():
            said = {"refused": timing} if isinstance(timing, str) else {"us": 1e6 * timing.median_s}
            self.rivals.append({**entry, "way": way, **said})
        if self.clock.is_cuda:
            torch.cuda.empty_cache()
        return found

    def _history(self, name: str, lengths: tuple[int, ...], bits: int, *, room: int) -> StoredHistory:
        shape, cache = SHAPES[name], self.cfg.cache
        quantizer = self._quantizer(name, bits)
        layout = layout_of(
            quantizer,
            shape,
            copies=1,
            dtype=self.dtype,
            block_size=cache.block_size,
            headroom=cache.spill_headroom,
        )
        per_sequence = [layout.blocks_for(n + room) for n in lengths]
        once = layout.pool_bytes(sum(per_sequence), len(lengths), max(per_sequence))
        copies = copies_past_cache(once, self.device, self.setting("most_copies"))
        dense = min(1 << 28, max(lengths) * shape.channels) * 4
        self._require(copies * once + 6 * dense)
        return StoredHistory(
            quantizer,
            shape,
            lengths,
            copies=copies,
            room=room,
            data=self._data(name),
            backend=self.cfg.kernel.backend,
            block_size=cache.block_size,
            spill_headroom=cache.spill_headroom,
        )

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _data(self, name: str) -> MadeUpKV:
        most = max(sum(case.lengths) for case in self.cases() if case.shape == name)
        chunk = max(self._chunk(case) * len(case.lengths) for case in self.cases())
        tokens = max(min(most, self.task.write_tokens), chunk, CALIBRATION_TOKENS) + SPARE_TOKENS
        self._require(2 * tokens * SHAPES[name].channels * self.dtype.itemsize)
        return MadeUpKV(SHAPES[name], tokens, self.dtype, self.device, self.cfg.seed)

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def _quantizer(self, name: str, bits: int) -> BatchedKVQuantizer:
        spec = QuantSpec(**{**dict(self.cfg.quant), "bits": bits, "key_bits": None, "value_bits": None})
        keys, values = (x.cpu() for x in self._data(name).take(CALIBRATION_TOKENS))
        return BatchedKVQuantizer.calibrate(spec, keys, values).to(self.device)

    def _layer_share(self, case: Case) -> Iterator[Row]:
        """Quantizing one prompt's keys and values, as a share of its layer's prefill."""
        if "layer_share" not in self.task.operations or case.is_trace or not self._is_first_batch(case):
            return
        for tokens in self.setting("layer_tokens") or [max(case.lengths)]:
            way, layer = self._layer(case.shape, tokens)
            history = self._history(case.shape, (tokens,), case.bits, room=0)
            writes = measure_writes(history, self.clock, self.task.write_tokens)
            us = sum(tokens / row["tokens_of_call"] * row["us"] for row in writes)
            yield {
                "operation": "layer_share",
                "batch": 1,
                "tokens": tokens,
                "label": f"1x{tokens}",
                "us": us,
                "layer_us": 1e6 * layer.median_s,
                "layer_attention": way,
                "percent_of_layer": 1e-4 * us / layer.median_s,
            }

    def _is_first_batch(self, case: Case) -> bool:
        """Whether no smaller batch of the same length stands for it already."""
        return len(case.lengths) == min(self.setting("batches"))

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _layer(self, name: str, tokens: int) -> tuple[str, Timing]:
        self._require(ModelLayer.nbytes(SHAPES[name], tokens, self.dtype))
        return ModelLayer(SHAPES[name], tokens, self.dtype, self.device).measure(self.clock)

    def _require(self, num_bytes: int) -> None:
        """Raise unless so much memory is free."""
        if self.clock.is_cuda:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = psutil.virtual_memory().available
        if num_bytes > MEMORY_SHARE * free:
            raise DoesNotFit(
                f"needs {num_bytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free, of which it may take "
                f"{MEMORY_SHARE:.0%}"
            )


def flat(rows: list[Row]) -> dict[str, float]:
    """Every number by a name that says what it is: ``decode_llama31_8b_8x32768_4bit_us``."""
    named: dict[str, float] = {}
    for row in rows:
        prefix = f"{row['operation']}_{row['shape']}_{row['label']}_{row['bits']}bit"
        named |= {f"{prefix}_{quantity}": row[quantity] for quantity in QUANTITIES if quantity in row}
    return named


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the printed table, operation by operation."""
    lines = []
    for row in sorted(rows, key=lambda row: KERNEL_OPERATIONS.index(row["operation"])):
        rival = ""
        if "percent_of_layer" in row:
            rival = f"{row['percent_of_layer']:.2f}%"
        elif "speedup_over_full_precision" in row:
            way = row["full_precision_way"].removeprefix("sdpa_")
            rival = f"{row['speedup_over_full_precision']:.2f}x {way}"
        dense = "speedup_over_dequantize_then_attend"
        lines.append(
            [
                f"{row['operation']} {row['shape']} {row['label']} {row['bits']}b",
                f"{row['us']:.0f}",
                f"{row['copy_fraction']:.0%}" if "copy_fraction" in row else "",
                rival,
                f"{row[dense]:.2f}x" if dense in row else "",
                f"{row['graph_us']:.0f}" if "graph_us" in row else "",
            ]
        )
    return ["", "us", "copy", "full precision", "dense", "graph us"], lines
