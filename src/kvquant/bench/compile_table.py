"""What the GPU's kernels compile to, without one: ``python -m kvquant.bench.compile_table [--json F] [--markdown F]``.

The backend's own launchers run on CPU tensors while launches are compiled for a GPU of choice instead of started, so
that types, constants and alignment are what a launch really has. Registers and stack come from the cubin's resource
usage, the rest is counted in its machine code. The exit code is 1 if a kernel that decodes or quantizes spills, or the
CUDA kernel, which NVRTC compiles where it is installed, keeps more in local memory than was measured to be no loss.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.bench.compiled_cuda import MOST_STACK_BYTES, SHARED_BYTES, configuration_of, inspect_cuda_decode
from kvquant.bench.machine_code import inspect_cubin
from kvquant.bench.shapes import SHAPES, LayerShape
from kvquant.bench.stored import rope_tables
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.kernels import ERROR_KEY_NOT_FINITE, StoredLayer
from kvquant.kernels.cuda_decode.nvrtc import nvrtc_refusal
from kvquant.prefill_quant import blocks_per_tile
from kvquant.ragged import RaggedStep
from kvquant.spec import QuantSpec

ARCHITECTURES = (80, 90)  # A100; H100 and H200
BLOCK_SIZE = 64
# A history long enough for decode to be split as it is in use; only its shape is looked at.
HISTORY, BATCH = 32768, 8
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to call an operation."""

    operation: str
    shape: str
    bits: int
    fraction: float = 0.01
    method: str = "nuq"
    value_groups: int = 1

    @property
    def label(self) -> str:
        """As the table names it."""
        stored = "exact" if self.method == "none" else f"{self.bits} bits, {self.fraction:.0%}"
        groups = f", {self.value_groups} groups" if self.value_groups > 1 else ""
        return f"{self.shape}, {stored}{groups}"


def cases() -> list[Case]:
    """Every case of the table, the slowest to compile first."""
    widths = (4, 3, 2)
    grouped = [Case("decode", "llama31_8b", bits) for bits in widths]
    single = [Case("decode", "llama2_7b", bits) for bits in widths]
    plain = [Case("decode", "llama31_8b", bits, fraction=0.0) for bits in widths]
    rest = [
        Case(operation, "llama31_8b", bits)
        for operation in ("write_keys", "write_values", "close_values", "dequantize", "prefill")
        for bits in widths
    ]
    # What the kernels of pairs of channels are not for.
    wide = [Case(operation, "llama31_8b", 8) for operation in ("write_keys", "write_values")]
    odd = [Case(operation, "phi3_mini", 3) for operation in ("write_keys", "write_values")]
    split = [Case("write_values", "llama31_8b", 3, value_groups=16)]  # of half a head each
    exact = [
        Case(operation, "llama31_8b", 16, method="none")
        for operation in ("decode", "write_exact", "prefill", "rotate")
    ]
    cuda = [Case("cuda_decode", "llama31_8b", bits) for bits in widths]
    return [*grouped, *single, *plain, *rest, *wide, *odd, *split, *exact, *cuda]


class _NoGpu:
    """Stands in for Triton's driver: names a target and has nothing to launch on.

    Each architecture is a device of its own, because Triton keeps what it compiled by device, not by target.
    """

    def __init__(self, architecture: int) -> None:
        self._architecture, self._target = architecture, GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return self._architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextlib.contextmanager
def launches_compiled(architecture: int) -> Iterator[list[Any]]:
    """Compile what is launched inside the block for an architecture, without a GPU; yields what was compiled."""
    compiled: list[Any] = []
    jit = triton.runtime.jit.JITFunction
    run = jit.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_NoGpu(architecture))
    jit.run = compile_only
    try:
        yield compiled
    finally:
        jit.run = run
        driver._active = before


class Layer:
    """A layer's blocks on the CPU, and calls of the Triton backend's operations on them."""

    def __init__(self, case: Case) -> None:
        self.kernels = importlib.import_module("kvquant.kernels.triton_kernels")
        self.shape: LayerShape = SHAPES[case.shape]
        H, D = self.shape.kv_heads, self.shape.head_dim
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randn(256, H, D, generator=generator)
        if case.method == "none":
            self.quantizer = BatchedKVQuantizer.exact(H, D)
        else:
            # The codebook's values do not matter, and evenly spaced ones need no fitting.
            spec = QuantSpec(
                case.bits, method="uniform", outlier_fraction=case.fraction, value_groups=case.value_groups
            )
            method = importlib.import_module("kvquant.methods.uniform").Method
            self.quantizer = method.calibrate(spec, self.tokens, self.tokens)
        layout = BlockLayout(self.quantizer.spec, 1, H, D, torch.bfloat16, BLOCK_SIZE)
        self.pool = BlockPool(layout, 8, max_sequences=1, device="cpu")
        self.row = self.pool.add_sequence()
        self.store = self.pool.layers[0]
        self.bits = {} if case.method == "none" else {"bits": case.bits}
        spec = self.quantizer.spec
        self.reader = StoredLayer(
            self.kernels,
            self.store.keys,
            self.store.values,
            self.quantizer.constants,
            spec.key_bits or 16,
            spec.value_bits or 16,
            D,
        )
        self.rope = rope_tables(self.shape, BLOCK_SIZE, HISTORY, torch.device("cpu"))

    def _write(self, write: Callable[..., None], store: object) -> None:
        step = self.pool.reserve([self.row], [200])
        x = self.tokens[:200].bfloat16()
        constants = (self.quantizer.constants,) if self.bits else ()
        after = (None if self.bits else ERROR_KEY_NOT_FINITE, self.store.error)
        runs = {"runs": step.runs} if self.bits else {}
        write(x, store, *constants, step.slot_block, step.slot_offset, *after, **self.bits, **runs)

    def write_keys(self) -> None:
        """Launch what writes keys."""
        self._write(self.kernels.write_keys, self.store.keys)

    def write_values(self) -> None:
        """Launch what writes values."""
        self._write(self.kernels.write_values, self.store.values)

    def write_exact(self) -> None:
        """Launch what stores keys as they are."""
        self._write(self.kernels.write_exact, self.store.keys)

    def close_values(self) -> None:
        """Launch what puts full blocks in order."""
        t = self.pool.tensors
        self.kernels.close_values(
            t["value_outlier_index"],
            t["value_outlier_value"],
            t["value_outlier_end"],
            torch.arange(3),
            head_dim=self.shape.head_dim,
        )

    def dequantize(self) -> None:
        """Launch what reads whole blocks."""
        self.reader(torch.arange(3)[None])

    def decode(self) -> None:
        """Launch attention of one token of each sequence."""
        table = torch.zeros(BATCH, HISTORY // BLOCK_SIZE, dtype=torch.int32)
        step = RaggedStep.build([HISTORY - 1] * BATCH, [1] * BATCH, torch.arange(BATCH), table, BLOCK_SIZE)
        self._attend(step, None)

    def prefill(self) -> None:
        """Launch attention of a chunk over a history and over itself, stored and exact; the library's products apart."""
        prefill = importlib.import_module("kvquant.kernels.triton_kernels.prefill")
        table = torch.arange(6, dtype=torch.int32)[None]
        step = RaggedStep.build([200], [130], torch.arange(1), table, BLOCK_SIZE)
        own = self.tokens[:130].bfloat16()
        query = torch.zeros(130, self.shape.query_heads, self.shape.head_dim, dtype=torch.bfloat16)
        for exact in (None, (own, own)):
            prefill.attend_prefill(
                query,
                step,
                self.reader,
                self.rope,
                exact,
                None,
                block_size=BLOCK_SIZE,
                softmax_scale=1.0,
                workspace_tokens=256,
                attend_segment=lambda q, *_: (q, q.new_zeros(q.shape[1], len(q), dtype=torch.float32)),
            )

    def rotate(self) -> None:
        """Launch what turns queries, for FlashAttention and for what multiplies in fp32."""
        D = self.shape.head_dim
        query = torch.zeros(130, self.shape.query_heads, D, dtype=torch.bfloat16)
        for dtype in (torch.bfloat16, torch.float32):
            self.kernels.rotate_tokens(query, torch.zeros(130, D), torch.zeros(130, D), dtype)

    def _attend(self, step: RaggedStep, exact: tuple[Tensor, Tensor] | None) -> None:
        T, D = sum(step.lengths), self.shape.head_dim
        self.kernels.attend(
            torch.zeros(T, self.shape.query_heads, D, dtype=torch.bfloat16),
            step,
            self.reader,
            self.rope,
            exact,
            None,
            block_size=BLOCK_SIZE,
            blocks_per_tile=blocks_per_tile(BLOCK_SIZE),
            softmax_scale=D**-0.5,
        )


def compile_case(case: Case, architecture: int) -> list[Row]:
    """Compile everything that a case launches; one row a kernel."""
    named = {"operation": case.operation, "case": case.label, "sm": architecture}
    if case.operation == "cuda_decode":
        if architecture not in SHARED_BYTES:
            return []
        spec = QuantSpec(case.bits, outlier_fraction=case.fraction)
        configuration = configuration_of(spec, SHAPES[case.shape], architecture)
        return [{**named, **inspect_cuda_decode(configuration, architecture)}]
    layer = Layer(case)
    with launches_compiled(architecture) as compiled, torch.no_grad():
        getattr(layer, case.operation)()
    return [
        {**named, "kernel": name.strip("_"), **inspect_kernel(kernel), "source": kernel.hash}
        for name, kernel in compiled
    ]


def inspect_kernel(kernel: Any) -> Row:
    """Count what matters in a compiled kernel's machine code."""
    return {
        "warps": kernel.metadata.num_warps,
        **inspect_cubin(kernel.asm["cubin"]),
        "shared_bytes": kernel.metadata.shared + _declared(kernel.asm["ptx"]),
    }


def _declared(ptx: str) -> int:
    """Bytes of shared memory that a kernel's own assembly declares, beside those that Triton asks for."""
    return sum(int(size) for size in re.findall(r"\.shared [^;\n]*\[(\d+)\];", ptx))


def compile_table(
    chosen: list[Case], architectures: tuple[int, ...], on_row: Callable[[], None] = lambda: None
) -> list[Row]:
    """Compile cases on all processors; a kernel that several cases share has one row.

    Args:
        chosen: the cases.
        architectures: compute capabilities, times ten.
        on_row: told whenever a case is done.
    """
    jobs = [(case, architecture) for case in chosen for architecture in architectures]
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    rows: dict[str, Row] = {}
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(compile_case, *job) for job in jobs]
        for future in pending:
            for row in future.result():
                # The same source, constants, types and target: one kernel.
                rows.setdefault(row.pop("source"), row)
            on_row()
    return sorted(rows.values(), key=lambda row: (row["operation"], row["kernel"], row["case"], row["sm"]))


def markdown(rows: list[Row]) -> str:
    """The table as Markdown."""
    columns = {
        "operation": "operation",
        "kernel": "kernel",
        "case": "first used by",
        "sm": "sm",
        "warps": "warps",
        "registers": "registers",
        "spills": "spills",
        "shared_bytes": "shared [B]",
        "loads_128_bit": "128-bit loads",
        "loads": "of loads",
        "hmma": "HMMA",
        "wgmma": "wgmma",
        "instructions": "instructions",
    }
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns 1 if a kernel spills more than it may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--sm", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--operation", nargs="+", help="only these operations")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET must be unset, got 1: the interpreter compiles nothing")
    chosen = [case for case in cases() if not given.operation or case.operation in given.operation]
    reason = nvrtc_refusal()
    if reason is not None:
        print(f"the table has no row of the CUDA kernel: {reason}", file=sys.stderr)
        chosen = [case for case in chosen if case.operation != "cuda_decode"]
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("compiling", total=len(chosen) * len(given.sm))
        rows = compile_table(chosen, tuple(given.sm), lambda: bar.advance(task))
    text = markdown(rows)
    print(text)
    if given.markdown:
        _write(given.markdown, text)
    if given.json:
        body = {"triton": triton.__version__, "block_size": BLOCK_SIZE, "rows": rows}
        _write(given.json, json.dumps(body, indent=1) + "\n")
    spilling = [row for row in rows if row["spills"] and row["kernel"] != "cuda_decode"]
    for row in spilling:
        print(
            f"{row['kernel']} ({row['case']}, sm_{row['sm']}) must not spill, got {row['spills']} loads and stores of "
            "local memory; try fewer tokens at a time or more warps",
            file=sys.stderr,
        )
    large = [row for row in rows if row["kernel"] == "cuda_decode" and row["stack_bytes"] > MOST_STACK_BYTES]
    for row in large:
        print(
            f"{row['kernel']} ({row['case']}, sm_{row['sm']}) must keep up to {MOST_STACK_BYTES} bytes of a thread in "
            f"local memory, got {row['stack_bytes']}; try fewer warps",
            file=sys.stderr,
        )
    return 1 if spilling or large else 0


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
