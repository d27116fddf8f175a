"""The triton backend's prefill: dequantizing kernels against the reference, merged segments against tiled attention.

As in test_triton_decode.py the cases run in the interpreter in a process of their own (this file as a script), with a
plain attention in place of the library's, and compiled, with the library's and larger ones, on a GPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from interpreter import interpret
from kvquant.kernels.prefill_plan import plan_prefill


@dataclasses.dataclass(frozen=True)
class Case:
    """Calls of new tokens per sequence; the last one's attention is compared."""

    calls: tuple[tuple[int, ...], ...]
    bits: int | None = 3  # None: exact
    value_bits: int | None = None
    head_dim: int = 64
    heads: int = 2
    groups: int = 1
    fraction: float = 0.02
    sinks: int = 0
    window: int | None = None
    rotated: bool = True
    scaling: float = 1.0
    value_groups: int = 1
    block_size: int = 16
    room: int = 32  # keys of a segment
    own_exact: bool = False
    dtype: torch.dtype = torch.float32
    spread: float = 1.0


SMALL = {
    "one segment": Case(((30, 5),), room=100),
    "long and short histories": Case(((90, 7, 40), (20, 9, 1)), groups=2),
    "exact chunk": Case(((50, 3), (20, 9)), bits=4, own_exact=True),
    "exact chunk beside a decoding sequence": Case(((40, 70), (10, 1)), bits=2, own_exact=True, spread=3.0),
    "sinks": Case(((40, 2), (9, 9)), bits=4, value_bits=2, sinks=3, groups=2),
    "sinks beside an exact chunk": Case(((20,), (9,)), sinks=3, own_exact=True),
    "window": Case(((70, 5), (20, 30)), window=24, heads=1, groups=3),
    "window and an exact chunk": Case(((70, 5), (20, 30)), window=24, heads=1, own_exact=True),
    "unquantized": Case(((40, 7), (20, 1)), bits=None, head_dim=80, groups=2),
    "no rotation, value groups": Case(((70,), (9,)), bits=8, head_dim=80, rotated=False, value_groups=2),
    "no outliers, scaled rotation": Case(((40,), (9,)), head_dim=96, fraction=0.0, scaling=1.3),
}
LARGE = {
    "llama 3 shape": Case(
        ((3000, 65, 1), (500, 63, 100)),
        4,
        None,
        128,
        8,
        4,
        0.01,
        block_size=64,
        room=1024,
        dtype=torch.bfloat16,
    ),
    "llama 2 shape": Case(
        ((900, 200), (65, 300)),
        2,
        None,
        128,
        32,
        1,
        0.01,
        block_size=64,
        room=512,
        own_exact=True,
        dtype=torch.float16,
    ),
    "long window": Case(
        ((2000, 100), (300, 200)),
        3,
        None,
        96,
        4,
        2,
        block_size=64,
        window=700,
        room=512,
        dtype=torch.bfloat16,
    ),
    "unquantized, wide heads": Case(
        ((1500,), (300,)), None, None, 256, 4, 2, block_size=64, room=512, dtype=torch.bfloat16
    ),
}


def plain_attention(
    query: Any, keys: Any, values: Any, segment: Any, softmax_scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the library computes: sequence by sequence, aligned at the end; without keys 0 and an infinite sum."""
    G = query.shape[1] // keys.shape[1]
    out, lse = torch.zeros_like(query), torch.full((query.shape[1], len(query)), torch.inf)
    bounds = (segment.cu_queries.tolist(), segment.cu_keys.tolist())
    for q0, q1, k0, k1 in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
        if k1 > k0:
            k, v = (x[k0:k1].float().repeat_interleave(G, 1).transpose(0, 1) for x in (keys, values))
            scores = query[q0:q1].float().transpose(0, 1) @ k.transpose(1, 2) * softmax_scale
            at, key = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0), torch.arange(k1 - k0)
            hidden = (key > at) & segment.is_last
            if window is not None:
                hidden |= key <= at - window
            scores = scores.masked_fill(hidden, -torch.inf)
            out[q0:q1] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
            lse[:, q0:q1] = scores.logsumexp(-1)
    return out, lse


def stored(case: Case, device: str) -> tuple[Any, Any, Any, tuple[torch.Tensor, torch.Tensor]]:
    """A pool that holds the calls, its quantizer, the last call's step, and its keys and values."""
    from kvquant.batched_quant import BatchedKVQuantizer
    from kvquant.block_layout import BlockLayout
    from kvquant.block_pool import BlockPool
    from kvquant.spec import QuantSpec

    H, D = case.heads, case.head_dim
    generator = torch.Generator().manual_seed(0)
    scale, centre = (torch.randn(H, D, generator=generator) for _ in range(2))

    def numbers(tokens: int, spread: float) -> torch.Tensor:
        x = torch.randn(tokens, H, D, generator=generator)
        tail = torch.rand(tokens, H, D, generator=generator).clamp(min=0.05).sqrt()
        return (x / tail * (0.5 * scale).exp() * spread + centre).to(case.dtype).to(device)

    if case.bits is None:
        spec = QuantSpec(method="none")
        quantizer = BatchedKVQuantizer(spec, H, D, None)
    else:
        spec = QuantSpec(
            case.bits,
            value_bits=case.value_bits,
            outlier_fraction=case.fraction,
            sink_tokens=case.sinks,
            value_groups=case.value_groups,
        )
        drawn = (numbers(256, 1.0).cpu() for _ in range(2))
        quantizer = BatchedKVQuantizer.calibrate(spec, *drawn).to(device)
    layout = BlockLayout(spec, 1, H, D, case.dtype, case.block_size, 20.0)
    blocks = sum(layout.blocks_for(sum(n)) for n in zip(*case.calls, strict=True))
    pool = BlockPool(layout, blocks, max_sequences=len(case.calls[0]), device=device)
    rows = [pool.add_sequence() for _ in case.calls[0]]
    for lengths in case.calls:
        step = pool.reserve(rows, lengths)
        new = numbers(sum(lengths), case.spread), numbers(sum(lengths), case.spread)
        quantizer.write(*new, pool.layers[0], step, backend="pytorch_fused")
        pool.commit()
    return pool, quantizer, step, new


def results(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The segments' output and the tiled attention's, [T, Hq, D] fp32."""
    from kvquant.kernels import Rope
    from kvquant.kernels.tiled_attention import attend_tiled
    from kvquant.kernels.triton_kernels import prefill

    pool, quantizer, step, new = stored(case, device)
    store, BS, D = pool.layers[0], case.block_size, case.head_dim
    rope = None
    if case.rotated:
        frequency = 1 / 10000 ** (torch.arange(0, D, 2) / D)
        offset, base = (torch.arange(n)[:, None] * f * frequency for n, f in ((2 * BS, 1), (200, 2 * BS)))
        tables = (offset.cos() * case.scaling, offset.sin() * case.scaling, base.cos(), base.sin())
        rope = Rope(*(table.to(device) for table in tables))
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(sum(step.lengths), case.heads * case.groups, D, generator=generator)
    query = query.to(case.dtype).to(device)
    sinks = (store.sink_keys[step.rows], store.sink_values[step.rows]) if case.sinks else None
    layer = quantizer.reader(store, backend="pytorch_fused")
    settings: dict[str, Any] = {"block_size": BS, "softmax_scale": D**-0.5, "window": case.window}
    exact = new if case.own_exact else None
    truth = attend_tiled(query.float(), step, layer, rope, exact, sinks, blocks_per_tile=2, **settings)
    if device == "cpu":
        settings["attend_segment"] = plain_attention
    else:
        assert prefill.prefill_refusal(query, layer, None) is None
    ours = prefill.attend_prefill(
        query, step, layer, rope, exact, sinks, workspace_tokens=case.room, **settings
    )
    return ours.float(), truth


def check_attention(case: Case, device: str, tolerance: float) -> None:
    ours, truth = results(case, device)
    error = float((ours - truth).norm() / truth.norm())
    assert error < tolerance, f"{case}: {error:.1e}"


def check_dequantized(case: Case, device: str) -> None:
    """Tiles of all blocks, read in two rows (the last one twice where they are odd); slots never written do not count."""
    from kvquant.kernels import reference
    from kvquant.kernels.triton_kernels import dequantize

    pool, quantizer, _, _ = stored(case, device)
    store, spec = pool.layers[0], quantizer.spec
    if case.spread > 1:
        assert int(pool.spill_top) < pool.num_chunks, "the draw must spill"
    N = pool.num_blocks
    ids = torch.arange(N + N % 2, device=device).clamp(max=N - 1).flip(0).view(2, -1)
    written = torch.zeros(pool.num_blocks, case.block_size, dtype=torch.bool)
    for row in pool.sequences:
        held = torch.arange(pool.layout.blocks_for(pool.length(row)) * case.block_size) < pool.length(row)
        written[pool.blocks_of(row)] = held.view(-1, case.block_size)
    counts = written[ids.cpu()].view(2, 1, -1, 1)
    for ours, theirs, side, bits in (
        (dequantize.read_keys, reference.read_keys, store.keys, spec.key_bits),
        (dequantize.read_values, reference.read_values, store.values, spec.value_bits),
    ):
        found = ours(side, quantizer.constants, ids, bits=bits, head_dim=case.head_dim).cpu()
        on_cpu = [type(x)(*(t.cpu() for t in x)) for x in (side, quantizer.constants)]
        truth = theirs(*on_cpu, ids.cpu(), bits=bits, head_dim=case.head_dim)
        # Outliers are the same to the bit; the rest may have been rounded once instead of twice.
        torch.testing.assert_close(found * counts, truth * counts, rtol=1e-6, atol=1e-6)


def dequantized_cases() -> list[Case]:
    shapes = {"bits": (2, 3, 4, 8, 5), "head_dim": (64, 80, 96, 128, 72), "value_groups": (1, 2, 1, 4, 1)}
    cases = [
        Case(((40, 1), (3, 30)), *shape[:1], None, shape[1], value_groups=shape[2])
        for shape in zip(*shapes.values(), strict=True)
    ]
    return [
        *cases,
        Case(((40,),), 3, spread=4.0, fraction=0.05, head_dim=80),
        Case(((17,),), 2, fraction=0.0),
    ]


def test_prefill_in_the_interpreter_agrees_with_tiled_attention() -> None:
    interpret(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SMALL.values(), *LARGE.values()], ids=[*SMALL, *LARGE])
def test_prefill_on_a_gpu_agrees_with_tiled_attention(case: Case) -> None:
    dtype = torch.float16 if case.dtype == torch.float32 else case.dtype
    # Keys are rounded as stored and as rotated, queries, weights and outputs of segments once each.
    check_attention(dataclasses.replace(case, dtype=dtype), "cuda", 5e-3 if dtype == torch.float16 else 3e-2)


@pytest.mark.gpu
def test_many_queries_over_segments_give_the_same_bits_every_time() -> None:
    """Warps that update what others still read gave a few queries in a thousand a wrong share of a segment."""
    case = Case(((6000,), (4096,)), 4, None, 128, 8, 4, 0.01, block_size=64, room=1024, dtype=torch.bfloat16)
    first, truth = results(case, "cuda")
    assert float((first - truth).norm() / truth.norm()) < 1e-2
    assert all(torch.equal(results(case, "cuda")[0], first) for _ in range(3))


@pytest.mark.gpu
@pytest.mark.parametrize("case", dequantized_cases(), ids=str)
def test_a_gpu_dequantizes_what_the_reference_does(case: Case) -> None:
    check_dequantized(dataclasses.replace(case, dtype=torch.float16), "cuda")
    check_dequantized(dataclasses.replace(case, dtype=torch.bfloat16, block_size=64), "cuda")


def plan(past: tuple[int, ...], lengths: tuple[int, ...], **changes: Any) -> tuple[Any, ...]:
    settings = {
        "block_size": 16,
        "workspace_tokens": 128,
        "own_exact": False,
        "window": None,
        "sink_tokens": 0,
    }
    return plan_prefill(past, lengths, device=torch.device("cpu"), **settings | changes)


def test_a_short_history_takes_one_product() -> None:
    (segment,) = plan((50, 0), (20, 30))
    assert segment.is_last and segment.cu_keys.tolist() == [0, 70, 100]
    assert segment.blocks[:, 1].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert segment.blocks[:, 3].tolist() == [16, 16, 16, 16, 6, 16, 14]


@pytest.mark.parametrize("past", [(1000,), (1000, 3, 500), (128, 128), (5000, 1, 1, 5000)])
@pytest.mark.parametrize("own_exact", [False, True])
def test_every_key_is_read_once_and_no_segment_outgrows_the_workspace(
    past: tuple[int, ...], own_exact: bool
) -> None:
    lengths = tuple(1 + 7 * s for s in range(len(past)))
    read = [torch.zeros(p + n, dtype=torch.int64) for p, n in zip(past, lengths, strict=True)]
    for segment in plan(past, lengths, own_exact=own_exact):
        assert segment.num_keys <= 128 + 15 * len(past)
        rows = torch.zeros(segment.num_keys, dtype=torch.int64)
        for s, column, row, slots in segment.blocks.tolist():
            read[s][column * 16 : column * 16 + slots] += 1
            rows[row : row + slots] += 1
        rows[segment.own[:, 1].long()] += 1
        starts = torch.tensor([0, *lengths]).cumsum(0)
        for token, _, position in segment.own.tolist():
            s = int(torch.searchsorted(starts, token, right=True)) - 1
            assert position == past[s] + token - int(starts[s])
            read[s][position] += 1
        assert rows.eq(1).all()
    assert all(counts.eq(1).all() for counts in read)


if __name__ == "__main__":
    for small in SMALL.values():
        check_attention(small, "cpu", 2e-6)
    for stores in dequantized_cases():
        check_dequantized(stores, "cpu")
        check_dequantized(dataclasses.replace(stores, block_size=64), "cpu")
