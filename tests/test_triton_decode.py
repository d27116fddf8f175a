"""Decode attention of the triton backend against fp64 over the same blocks, dequantized.

Its error may be twice that of the same computation in the input's dtype, no more. Triton's interpreter must be chosen
before triton is imported, so that the cases run in a process of their own (this file as a script); on a GPU the same
cases run compiled, and larger ones.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dense_attention import dense_decode
from interpreter import interpret

SRC = Path(__file__).resolve().parent.parent / "src"


@dataclasses.dataclass(frozen=True)
class Case:
    """One token of each sequence over ``lengths`` stored ones, its own included."""

    lengths: tuple[int, ...]
    bits: int = 3
    value_bits: int | None = None
    head_dim: int = 64
    heads: int = 2
    groups: int = 1
    fraction: float = 0.01
    sinks: int = 0
    window: int | None = None
    softcap: float | None = None
    rotated: bool = True
    scaling: float = 1.0
    value_groups: int = 1
    block_size: int = 64
    dtype: torch.dtype = torch.float16
    spilled: bool = False
    theta: float = 10_000.0  # base of the rotary frequencies
    quiet_heads: int = 0  # first KV heads that are so small that no outlier of a token's values is theirs


# Enough query heads in each that the ratio of two errors is not one of two accidents.
SMALL = {
    "ragged, groups": Case((1, 70, 130), bits=4, groups=2),
    "2 bits": Case((63, 130), bits=2, fraction=0.02, groups=5),
    "3 bits, many outliers": Case((5, 200), fraction=0.05, groups=4, spilled=True),
    "keys and values apart": Case((65,), bits=4, value_bits=2, heads=1, groups=12),
    "sinks": Case((2, 65), head_dim=128, heads=1, groups=7, sinks=3),
    "window and cap": Case((200, 9), bits=4, heads=1, groups=8, window=50, softcap=5.0),
    "no rotation, value groups": Case((100,), bits=4, head_dim=80, rotated=False, value_groups=2, groups=4),
    "no outliers": Case((100,), bits=2, head_dim=96, heads=1, groups=6, fraction=0.0),
    "scaled rotation": Case((100,), head_dim=80, heads=1, groups=8, scaling=1.3),
    "small blocks": Case((31, 32, 33), bits=4, heads=2, groups=4, block_size=32),
    "large blocks": Case((5, 140), bits=4, heads=1, groups=4, block_size=128),
    "no room for a matrix of outliers": Case((140,), fraction=0.02, heads=1, groups=17, block_size=128),
}
LARGE = {
    "one token": Case((1,), bits=4, head_dim=128, heads=8, groups=4, dtype=torch.bfloat16),
    "full length": Case((32768, 1, 8191), bits=3, head_dim=128, heads=8, groups=4, dtype=torch.bfloat16),
    **{
        f"head_dim {D}, {bits} bits": Case(
            (63, 64, 65, 300), bits=bits, head_dim=D, heads=4, groups=2, dtype=dtype
        )
        for D in (64, 80, 96, 128, 256)
        for bits, dtype in ((4, torch.bfloat16), (3, torch.float16), (2, torch.bfloat16))
    },
    "llama 3 shape": Case((1, 500, 2100), bits=4, head_dim=128, heads=8, groups=4, dtype=torch.bfloat16),
    "llama 2 shape": Case((63, 64, 65), bits=3, head_dim=128, heads=32, dtype=torch.bfloat16),
    "wide heads": Case((130, 1000), bits=2, head_dim=256, heads=4, groups=2),
}


def error_of(case: Case, device: str, programs: int) -> float:
    """The kernel's relative RMS error, in units of that of the same computation in the input's dtype."""
    ours, truth, in_dtype = (x.double() for x in results(case, device, programs))
    return float((ours - truth).norm() / (in_dtype - truth).norm())


def results(case: Case, device: str, programs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel's output, the truth, and the input's dtype's way to compute it, [B, Hq, D] each."""
    call = decode_call(case, device)
    return call.ours(programs), call.dense(torch.float64), call.dense(case.dtype)


@dataclasses.dataclass
class Call:
    """A decode call over stored blocks."""

    query: torch.Tensor
    step: Any
    layer: Any
    rope: Any
    sinks: tuple[torch.Tensor, torch.Tensor] | None
    settings: dict[str, Any]
    pool: Any
    rows: list[int]
    write: Any

    def ours(self, programs: int | None = None) -> torch.Tensor:
        """The kernel's output."""
        from kvquant.kernels.triton_kernels.attention import attend_decode

        table, lengths = self.step.block_table, self.step.kv_lengths_tensor
        arguments = (self.query, table, lengths, self.layer, self.rope, self.sinks)
        return attend_decode(*arguments, programs=programs, **self.settings)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The same from dense tensors."""
        table, lengths = self.step.block_table, self.step.kv_lengths
        arguments = (self.query, table, lengths, self.layer, self.rope, self.sinks)
        return dense_decode(*arguments, dtype=dtype, **self.settings)


def decode_call(case: Case, device: str) -> Call:
    """Store a case's tokens and make its query."""
    from kvquant.batched_quant import BatchedKVQuantizer
    from kvquant.block_layout import BlockLayout
    from kvquant.block_pool import BlockPool
    from kvquant.kernels import Rope
    from kvquant.kernels.triton_kernels.attention import decode_refusal
    from kvquant.spec import QuantSpec

    H, D, BS = case.heads, case.head_dim, case.block_size
    spec = QuantSpec(
        case.bits,
        value_bits=case.value_bits,
        outlier_fraction=case.fraction,
        sink_tokens=case.sinks,
        value_groups=case.value_groups,
    )
    generator = torch.Generator().manual_seed(0)
    scale, centre = (torch.randn(H, D, generator=generator) for _ in range(2))
    scale[: case.quiet_heads] -= 8
    centre[: case.quiet_heads] /= 64

    def numbers(tokens: int) -> torch.Tensor:
        x = torch.randn(tokens, H, D, generator=generator)
        tail = torch.rand(tokens, H, D, generator=generator).clamp(min=0.05).sqrt()
        return (x / tail * scale.exp() + centre).to(case.dtype).to(device)

    quantizer = BatchedKVQuantizer.calibrate(spec, numbers(256).cpu(), numbers(256).cpu()).to(device)
    layout = BlockLayout(spec, 1, H, D, case.dtype, BS, 4.0)
    blocks = sum(layout.blocks_for(n + 3) for n in case.lengths)  # three more tokens are refused later
    pool = BlockPool(layout, blocks, max_sequences=len(case.lengths), device=device)
    rows = [pool.add_sequence() for _ in case.lengths]
    store = pool.layers[0]
    for new in ([n - 1 for n in case.lengths], [1] * len(rows)):
        some = [(row, n) for row, n in zip(rows, new, strict=True) if n]
        if some:
            step = pool.reserve(*(list(x) for x in zip(*some, strict=True)))
            tokens = sum(n for _, n in some)
            quantizer.write(numbers(tokens), numbers(tokens), store, step, backend="pytorch_fused")
            pool.commit()
    if case.spilled:
        assert int(pool.spill_top) < pool.num_chunks
    rope = None
    if case.rotated:
        tiles = -(-max(case.lengths) // (2 * BS))
        frequency = 1 / case.theta ** (torch.arange(0, D, 2) / D)
        offset, base = (torch.arange(n)[:, None] * f * frequency for n, f in ((2 * BS, 1), (tiles, 2 * BS)))
        tables = (offset.cos() * case.scaling, offset.sin() * case.scaling, base.cos(), base.sin())
        rope = Rope(*(table.to(device) for table in tables))
    # Half of a normal query: logits of these wide keys then spread over a few nats, as a trained model's do.
    query = torch.randn(len(rows), H * case.groups, D, generator=generator).mul(0.5).to(device, case.dtype)
    sinks = (store.sink_keys[step.rows], store.sink_values[step.rows]) if case.sinks else None
    layer = quantizer.reader(store, backend="pytorch_fused")
    settings = {
        "block_size": BS,
        "blocks_per_tile": 2,
        "softmax_scale": D**-0.5,
        "window": case.window,
        "softcap": case.softcap,
    }
    assert decode_refusal(query, layer, rope, BS) is None

    def write(x: torch.Tensor, new: Any) -> None:
        quantizer.write(x, x, store, new, backend="pytorch_fused")

    return Call(query, step, layer, rope, sinks, settings, pool, rows, write)


def not_finite_beside(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's output before and after a call that brought NaN and infinity to every sequence and was refused."""
    from kvquant.errors import NonFiniteActivations

    call = decode_call(case, device)
    before = call.ours()
    step = call.pool.reserve(call.rows, [3] * len(call.rows))
    bad = torch.full(
        (3 * len(call.rows), case.heads, case.head_dim), float("nan"), dtype=case.dtype, device=device
    )
    bad[1::3] = float("inf")
    call.write(bad, step)
    try:
        call.pool.commit()
    except NonFiniteActivations:
        return before, call.ours()
    raise AssertionError("NaN was stored")


def test_decode_in_the_interpreter_is_as_good_as_the_dtype() -> None:
    interpret(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 7])
@pytest.mark.parametrize("case", [*SMALL.values(), *LARGE.values()], ids=[*SMALL, *LARGE])
def test_decode_on_a_gpu_is_as_good_as_the_dtype(case: Case, programs: int) -> None:
    assert error_of(case, "cuda", programs) <= 2


@pytest.mark.gpu
def test_decode_gives_the_same_bits_every_time() -> None:
    call = decode_call(LARGE["llama 3 shape"], "cuda")
    first, *others = (call.ours(3) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SMALL.values(), *LARGE.values()], ids=[*SMALL, *LARGE])
def test_a_cuda_graph_replays_what_the_eager_call_gives(case: Case) -> None:
    call = decode_call(case, "cuda")
    eager = call.ours()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.ours()
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, eager)
    # Fixed addresses: a new query, and one token less in each sequence, are seen by the same graph.
    call.query.copy_(call.query.flip(0))
    call.step.kv_lengths_tensor.copy_((call.step.kv_lengths_tensor - 1).clamp(min=1))
    graph.replay()
    assert torch.equal(captured, call.ours())


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SMALL.values(), *LARGE.values()], ids=[*SMALL, *LARGE])
def test_not_finite_tokens_leave_their_neighbours_as_they_were_on_a_gpu(case: Case) -> None:
    before, after = not_finite_beside(case, "cuda")
    assert bool(before.isfinite().all()) and torch.equal(before, after)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 5}, "decodes 2, 3, 4 bits"),
        ({"block_size": 8}, "block_size must be 32"),
        ({"head_dim": 32}, "from 48 to 256"),
    ],
    ids=["5 bits", "tiny blocks", "narrow heads"],
)
def test_what_the_decode_kernel_is_not_for_is_said(changes: dict[str, int], reason: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    arguments = [f"{key}={value}" for key, value in changes.items()]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0 and reason in done.stderr


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("columns", [8, 16, 32])
def test_what_a_kernel_declares_and_what_triton_needs_fit_together(block_size: int, columns: int) -> None:
    from kvquant.kernels.triton_kernels.scratch import TABLES, matrix_bytes

    weights = 2 * block_size * columns * 2  # of a block, as operands of two products
    declared = TABLES + matrix_bytes(128, block_size, 4, columns)
    assert declared + weights <= 48 * 1024
    assert (declared > TABLES) is not (block_size == 128 and columns == 32)


if __name__ == "__main__":
    cases = SMALL
    if len(sys.argv) > 1:
        # Refusals: print what decode_refusal says of one changed case.
        key, value = sys.argv[1].split("=")
        from kvquant.batched_quant import BatchedKVQuantizer
        from kvquant.kernels.triton_kernels.attention import decode_refusal
        from kvquant.spec import QuantSpec

        bits, size, D = ({"bits": 3, "block_size": 64, "head_dim": 64} | {key: int(value)}).values()
        x = torch.randn(64, 2, D)
        quantizer = BatchedKVQuantizer.calibrate(QuantSpec(bits), x, x)
        packed = quantizer.quantize(x, x, torch.tensor([0, 64]), block_size=size)
        layer = quantizer.reader(packed.pool.layers[0])
        sys.exit(decode_refusal(torch.zeros(1, 2, D), layer, None, size))
    worst = {
        name: max(error_of(case, "cpu", programs) for programs in (1, 7)) for name, case in cases.items()
    }
    print(worst)
    assert all(error <= 2 for error in worst.values())
    for name in ("ragged, groups", "sinks"):
        before, after = not_finite_beside(cases[name], "cpu")
        assert bool(before.isfinite().all()) and torch.equal(before, after), name
