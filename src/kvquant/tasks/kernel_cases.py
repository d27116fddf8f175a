"""The cases of ``task=kernels``, one history after the other, and what they share: rivals, data, quantizers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import psutil
import torch

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.bench.full_precision import FullPrecision
from kvquant.bench.model_layer import ModelLayer
from kvquant.bench.operations import Row, measure_attention, measure_dequantize, measure_writes
from kvquant.bench.shapes import SHAPES
from kvquant.bench.steps import Steps
from kvquant.bench.stored import MadeUpKV, StoredHistory, kept_exactly, layout_of, quantizers_of
from kvquant.bench.timing import Clock, Timing, copies_past_cache
from kvquant.bench.warm_up import compile_ahead
from kvquant.data.prompts import prompt_lengths
from kvquant.models.backend_check import check_backend
from kvquant.results import one_line
from kvquant.spec import QuantSpec

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
# Times of the full-precision ways, call by call, and of the fastest ones in a CUDA graph where that is measured.
Rivals = tuple[dict[str, Timing | str], dict[str, Timing | str] | None]


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

    def __str__(self) -> str:
        return f"{self.shape} {self.label} at {self.bits} bits"

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


class Bench:
    """The settings of a run, what it has measured, and what cases share.

    Attributes:
        rows: one measurement each, plain numbers and text.
        rivals: every full-precision way's time, or why it did not run.
        skipped: what does not fit the memory.
        failed: what raised, or gave a wrong result.
        stored: what each history keeps exactly, see :func:`kept_exactly`.
        steps: what took how long.
    """

    def __init__(self, cfg: Any, context: Any) -> None:
        self.cfg, self.task, self.context, self.device = cfg, cfg.task, context, context.device
        self.clock = Clock(self.device, seconds=cfg.task.seconds)
        self.slow_clock = Clock(self.device, seconds=cfg.task.seconds / 3, most_repeats=5)
        self.dtype: torch.dtype = getattr(torch, cfg.task.dtype)
        self.rows: list[Row] = []
        self.rivals: list[Row] = []
        self.skipped: list[Row] = []
        self.failed: list[Row] = []
        self.stored: list[Row] = []
        self.steps = Steps(self.clock.wait)

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
        """All operations on one history; what does not fit the memory, and what fails, is noted and left out."""
        for steps in (self._layer_steps(case), self._history_steps(case)):
            try:
                for name, step in steps:
                    self._measure_step(case, name, step)
            except (DoesNotFit, torch.OutOfMemoryError) as error:
                self._note(self.skipped, case, "history", error)
            if self.clock.is_cuda:
                torch.cuda.empty_cache()

    def _measure_step(self, case: Case, name: str, step: Callable[[], list[Row]]) -> None:
        try:
            with self.steps.step(f"{name} of {case}"):
                self.rows += [{**case.as_row(), **row} for row in step()]
        except (DoesNotFit, torch.OutOfMemoryError) as error:
            self._note(self.skipped, case, name, error)
        except (
            Exception
        ) as error:  # one broken kernel must not cost the other measurements; the run fails at its end
            self._note(self.failed, case, name, error)

    @staticmethod
    def _note(notes: list[Row], case: Case, part: str, error: Exception) -> None:
        notes.append({**case.as_row(), "part": part, "reason": one_line(error)[:300]})

    def _history_steps(self, case: Case) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
        """Name and work of each operation over a history, which is stored on the way."""
        wanted = set(self.task.operations)
        if not wanted - {"layer_share"}:
            return
        rivals = {new: self._rivals_that_fit(case, new) for new in self._new(case)}
        with self.steps.step(f"room for {case}"):
            history = self._history(case.shape, case.lengths, case.bits, room=self._chunk(case))
        if wanted & {"write_keys", "write_values"}:
            most = self.task.write_tokens
            yield (
                "writes",
                lambda: [
                    row for row in measure_writes(history, self.clock, most) if row["operation"] in wanted
                ],
            )
        if not wanted & {"dequantize", "decode", "prefill"}:
            return
        with self.steps.step(f"storing {case}"):
            history.fill()
        self.stored.append({**case.as_row(), **kept_exactly(history.pool)})
        if "dequantize" in wanted:
            yield "dequantize", lambda: [measure_dequantize(history, self.clock)]
        for new in rivals:
            yield (
                "decode" if new == 1 else "prefill",
                functools.partial(self._attend, history, new, rivals[new]),
            )

    def _attend(self, history: StoredHistory, new: int, rivals: Rivals) -> list[Row]:
        reads, (found, in_graph) = self.cfg.cache.prefill_reads, rivals
        return [
            measure_attention(
                history, self.clock, new, reads, found, in_graph=in_graph, slow_clock=self.slow_clock
            )
        ]

    def _is_in_graph(self, new: int) -> bool:
        return self.task.graph and self.clock.is_cuda and new == 1

    def _new(self, case: Case) -> list[int]:
        """New tokens of each sequence in the attention calls to measure."""
        chunk = [self._chunk(case)] if "prefill" in self.task.operations and not case.is_trace else []
        return ([1] if "decode" in self.task.operations else []) + chunk

    def _chunk(self, case: Case) -> int:
        return max(16, self.setting("step_tokens") // len(case.lengths))

    def _rivals_that_fit(self, case: Case, new: int) -> Rivals:
        """What the full-precision ways take; nothing where only the quantized history fits the memory."""
        try:
            return self._rivals(case.shape, case.lengths, new, case.label)
        except (DoesNotFit, torch.OutOfMemoryError) as error:
            self._note(self.skipped, case, "full precision", error)
            return {}, {} if self._is_in_graph(new) else None

    @functools.lru_cache(maxsize=4)  # noqa: B019  (the bench lives as long as its run)
    def _rivals(self, name: str, lengths: tuple[int, ...], new: int, label: str) -> Rivals:
        shape = SHAPES[name]
        seen = [n + (new if new > 1 else 0) for n in lengths]
        once = FullPrecision.nbytes(shape, seen, 1, self.dtype)
        copies = copies_past_cache(once, self.device, self.setting("most_copies"))
        # Ways that want another layout make a copy.
        self._require(2 * copies * once)
        with self.steps.step(f"full precision of {name} {label}, {new} new"):
            kinds = list(self.task.baselines)
            ways = FullPrecision(shape, seen, new, copies, self.dtype, self.device)
            found, in_graph = ways.measure(self.clock, kinds, self.steps.step), None
            if self._is_in_graph(new):
                in_graph = ways.measure_graph(self.clock, kinds, found, self.steps.step)
            del ways
        entry = {"operation": "decode" if new == 1 else "prefill", "shape": name, "label": label, "new": new}
        for way, timing in found.items():
            row: Row = {**entry, "way": way}
            row |= {"refused": timing} if isinstance(timing, str) else {"us": 1e6 * timing.median_s}
            graph = (in_graph or {}).get(way)
            row |= {"graph_us": 1e6 * graph.median_s} if isinstance(graph, Timing) else {}
            self.rivals.append(row)
        if self.clock.is_cuda:
            torch.cuda.empty_cache()
        return found, in_graph

    def _history(self, name: str, lengths: tuple[int, ...], bits: int, *, room: int) -> StoredHistory:
        shape, cache = SHAPES[name], self.cfg.cache
        quantizer = self._quantizers(name)[bits]
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
        return self._stored(name, quantizer, lengths, copies=copies, room=room)

    def _stored(
        self, name: str, quantizer: BatchedKVQuantizer, lengths: Sequence[int], *, copies: int, room: int
    ) -> StoredHistory:
        return StoredHistory(
            quantizer,
            SHAPES[name],
            lengths,
            copies=copies,
            room=room,
            data=self._data(name),
            backend=self.cfg.kernel.backend,
            block_size=self.cfg.cache.block_size,
            spill_headroom=self.cfg.cache.spill_headroom,
        )

    def _compile_ahead(self, name: str, quantizers: Iterable[BatchedKVQuantizer]) -> None:
        """Compile what a shape's cases run, all widths at once, where that takes long."""
        new = [self._new(case) for case in self.cases() if case.shape == name]
        calls = sorted(set(itertools.chain.from_iterable(new)))
        lengths = [2 * self.cfg.cache.block_size + 1]
        if not calls or not self.clock.is_cuda:
            return
        tiny = [self._stored(name, q, lengths, copies=2, room=max(calls)) for q in quantizers]
        if getattr(tiny[0].kernels, "TAKES_RUNS", False):  # the ones that Triton compiles
            with self.steps.step(f"compiling kernels for {name}"):
                compile_ahead(tiny, calls, self.cfg.cache.prefill_reads)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _data(self, name: str) -> MadeUpKV:
        most = max(sum(case.lengths) for case in self.cases() if case.shape == name)
        chunk = max(self._chunk(case) * len(case.lengths) for case in self.cases())
        tokens = max(min(most, self.task.write_tokens), chunk) + SPARE_TOKENS
        self._require(2 * tokens * SHAPES[name].channels * self.dtype.itemsize)
        with self.steps.step(f"drawing {tokens} tokens of {name}"):
            return MadeUpKV(SHAPES[name], tokens, self.dtype, self.device, self.cfg.seed)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _quantizers(self, name: str) -> dict[int, BatchedKVQuantizer]:
        """One for each width, calibrated as a model's would be: on as many tokens, and not on those that are stored."""
        shape, count = SHAPES[name], self.cfg.calibration.tokens
        with self.steps.step(f"calibrating {name} on {count} tokens"):
            found = quantizers_of(
                QuantSpec(**dict(self.cfg.quant)), self.task.bits, self._data(name).sample(count)
            )
        check_backend(
            self.cfg.kernel.backend,
            list(found.values()),
            [self.device] * len(found),
            block_size=self.cfg.cache.block_size,
            query_heads=shape.query_heads,
            rotated=shape.head_dim,
        )
        placed = {bits: quantizer.to(self.device) for bits, quantizer in found.items()}
        self._compile_ahead(name, placed.values())
        return placed

    def _layer_steps(self, case: Case) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
        """Quantizing one prompt's keys and values, as a share of its layer's prefill."""
        if "layer_share" in self.task.operations and not case.is_trace and self._is_first_batch(case):
            for tokens in self.setting("layer_tokens") or [max(case.lengths)]:
                yield "layer_share", functools.partial(self._layer_share, case, tokens)

    def _layer_share(self, case: Case, tokens: int) -> list[Row]:
        way, layer = self._layer(case.shape, tokens)
        history = self._history(case.shape, (tokens,), case.bits, room=0)
        writes = measure_writes(history, self.clock, self.task.write_tokens)
        us = sum(tokens / row["tokens_of_call"] * row["us"] for row in writes)
        return [
            {
                "operation": "layer_share",
                "batch": 1,
                "tokens": tokens,
                "label": f"1x{tokens}",
                "us": us,
                "layer_us": 1e6 * layer.median_s,
                "layer_attention": way,
                "percent_of_layer": 1e-4 * us / layer.median_s,
            }
        ]

    def _is_first_batch(self, case: Case) -> bool:
        """Whether no smaller batch of the same length stands for it already."""
        return len(case.lengths) == min(self.setting("batches"))

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _layer(self, name: str, tokens: int) -> tuple[str, Timing]:
        self._require(ModelLayer.nbytes(SHAPES[name], tokens, self.dtype))
        with self.steps.step(f"prefill of one {name} layer, {tokens} tokens"):
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
