"""Decode attention over exact blocks (``quant=none``): the full-precision twin of the kernel that reads packed codes.

It is what quantized decoding is compared with, so it has the same shape: a program takes a run of blocks of one
(sequence, KV head), serves all its query heads, and rotates keys by their place in the block while the queries are
turned back by the block's base. Two multiply-adds an element leave it bound by memory. Keys are rotated in fp32 and
rounded once, to the type they are stored in, as a model rounds what its rotary embedding returns.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvquant.kernels import ExactStore, Rope, StoredLayer
from kvquant.kernels.triton_kernels import decode, merge
from kvquant.kernels.triton_kernels.shares import places_of, programs_for, share_blocks

# Programs of a round for each multiprocessor: it holds four at once, twice over.
_RESIDENT = 8
_FEWEST_BLOCKS = 32  # of a program: exact ones take equally long; other numbers were not measured
# For 8192 numbers of a block and head; what is prefetched must leave room in shared memory.
_WARPS, _STAGES, _PREFETCH_BYTES = 4, 3, 64 << 10


@triton.jit
def _load_channels(at, inside, EVEN: tl.constexpr):
    """A tile [tokens, channels], masked where its channels had to be padded."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside[None, :], other=0.0)


@triton.jit
def _exact_decode_kernel(
    query, block_table, kv_lengths, shares, keys, values, offset_cos, offset_sin, base_cos, base_sin,
    # Partial results [programs, H, GP (, D)]
    part_best, part_total, part_out,
    softmax_scale, softcap, window, table_stride, H, bpt,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr,
    HALF: tl.constexpr, HALF_P: tl.constexpr, REST_P: tl.constexpr, STAGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``HALF`` pairs of channels are rotated, 0 for none; ``REST_P`` is the padded number of channels that are not."""
    h = tl.program_id(0)
    program = tl.program_id(1)
    b = tl.load(shares + program * 4)
    begin = tl.load(shares + program * 4 + 1)
    end = tl.load(shares + program * 4 + 2)
    length = tl.load(kv_lengths + b)
    first_visible = length - length  # a scalar of the length's type, whatever type the constant 0 has
    if HAS_WINDOW:
        first_visible = tl.maximum(first_visible, length - window)

    g, slot, d = tl.arange(0, GP), tl.arange(0, BS), tl.arange(0, DP)
    kind = keys.dtype.element_ty
    q_row = query + ((b * H + h) * G + g[:, None]) * D  # [GP, 1]
    a_row = slot[:, None] * D  # [BS, 1]
    if HALF > 0:
        j = tl.arange(0, HALF_P)
        jm = j < HALF
        qm = (g[:, None] < G) & jm[None, :]
        qa = tl.load(q_row + j[None, :], mask=qm, other=0.0).to(tl.float32)
        qb = tl.load(q_row + HALF + j[None, :], mask=qm, other=0.0).to(tl.float32)
        at = slot[:, None] * HALF + j[None, :]
        c = tl.load(offset_cos + at, mask=jm[None, :], other=0.0)  # [BS, HALF_P]
        s = tl.load(offset_sin + at, mask=jm[None, :], other=0.0)
    if REST_P > 0:
        r = 2 * HALF + tl.arange(0, REST_P)
        rm = r < D
        qr = tl.load(q_row + r[None, :], mask=(g[:, None] < G) & rm[None, :], other=0.0).to(kind)

    best = tl.full((GP,), -float("inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, DP), tl.float32)
    # A block's number is read one step ahead: loads that hang on one of the same step would not be prefetched.
    ids = block_table + b * table_stride
    block = tl.load(ids + begin, mask=begin < end, other=0)
    for column in tl.range(begin, end, num_stages=STAGES):
        origin = (block.to(tl.int64) * H + h) * (BS * D)
        block = tl.load(ids + column + 1, mask=column + 1 < end, other=0)
        position = column * BS + slot
        visible = (position < length) & (position >= first_visible)
        scores = tl.zeros((GP, BS), tl.float32)
        if HALF > 0:
            tile, turn = (column // bpt) * HALF + j, (column % bpt) * (BS * HALF) + j
            cb = tl.load(base_cos + tile, mask=jm, other=1.0)
            sb = tl.load(base_sin + tile, mask=jm, other=0.0)
            co = tl.load(offset_cos + turn, mask=jm, other=1.0)
            so = tl.load(offset_sin + turn, mask=jm, other=0.0)
            scaling = tl.rsqrt(co * co + so * so)  # the offset table carries the model's attention scaling
            cc, ss = ((cb * co - sb * so) * scaling)[None, :], ((sb * co + cb * so) * scaling)[None, :]
            first = _load_channels(keys + origin + a_row + j[None, :], jm, HALF == HALF_P).to(tl.float32)
            second = _load_channels(keys + origin + HALF + a_row + j[None, :], jm, HALF == HALF_P).to(
                tl.float32
            )
            ka = (first * c - second * s).to(kind)
            kb = (second * c + first * s).to(kind)
            scores = tl.dot((qa * cc + qb * ss).to(kind), tl.trans(ka), scores, input_precision=PRECISION)
            scores = tl.dot((qb * cc - qa * ss).to(kind), tl.trans(kb), scores, input_precision=PRECISION)
        if REST_P > 0:
            kr = _load_channels(keys + origin + a_row + r[None, :], rm, D - 2 * HALF == REST_P)
            scores = tl.dot(qr, tl.trans(kr), scores, input_precision=PRECISION)
        scores = scores * softmax_scale
        if HAS_SOFTCAP:
            # tanh through exp, which keeps its sign at both ends
            decay = tl.exp2(tl.abs(scores / softcap) * (-2.0 * decode.LOG2E))
            scores = tl.where(scores < 0, -1.0, 1.0) * softcap * (1.0 - decay) / (1.0 + decay)
        scores = tl.where(visible[None, :], scores * decode.LOG2E, -float("inf"))

        new = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp2(scores - shift[:, None])  # [GP, BS]
        fade = tl.exp2(best - shift)
        best = new
        total = total * fade + tl.sum(weights, 1)
        # A weight of zero does not silence a NaN that a slot never committed, or given back, may hold.
        there = visible[:, None]
        if D < DP:
            there = there & (d < D)[None, :]
        held = tl.load(values + origin + a_row + d[None, :], mask=there, other=0.0)
        acc = tl.dot(weights.to(kind), held, acc * fade[:, None], input_precision=PRECISION)

    out = (program * H + h) * GP + g
    tl.store(part_best + out, best)
    tl.store(part_total + out, total)
    tl.store(part_out + out[:, None] * D + d[None, :], acc, mask=(g[:, None] < G) & (d < D)[None, :])


def exact_refusal(query: Tensor, layer: object, rope: Rope | None, block_size: int) -> str | None:
    """Say why the exact decode kernel is not for this layer; None: it is."""
    if not (isinstance(layer, StoredLayer) and isinstance(layer.keys, ExactStore)):
        return "it reads exact blocks"
    D = query.shape[-1]
    rotated = 0 if rope is None else rope.offset_cos.shape[-1] * 2
    if D % 16 or not 16 <= D <= 256 or rotated % 16:
        return f"head_dim and what of it is rotated must be multiples of 16 up to 256, got {D} and {rotated}"
    if block_size not in (16, 32, 64, 128):
        return f"cache.block_size must be 16, 32, 64 or 128, got {block_size}"
    return None


def attend_exact_decode(
    query: Tensor,
    block_table: Tensor,
    kv_lengths: Tensor,
    layer: StoredLayer,
    rope: Rope | None,
    sinks: tuple[Tensor, Tensor] | None,
    *,
    block_size: int,
    blocks_per_tile: int,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    programs: int | None = None,
) -> Tensor:
    """Attention of one new token of each sequence over its exact history; waits for nothing on the device.

    Args:
        query: rotated at their positions, [B, Hq, D].
        block_table: int32 [B, M].
        kv_lengths: stored tokens of each sequence, its own included, int32 [B].
        layer: what the pool stores of the layer.
        sinks: None: exact blocks hold the first tokens like any others.
        rope, block_size, blocks_per_tile, softmax_scale, window, softcap: as of ``attend_tiled``.
        programs: among how many the batch's blocks are shared, for each KV head; None: as many as keep the device busy.

    Returns:
        [B, Hq, D] in the query's dtype.
    """
    B, Hq, D = query.shape
    assert isinstance(layer.keys, ExactStore) and isinstance(layer.values, ExactStore) and sinks is None
    keys, values = layer.keys.data, layer.values.data
    H, M = keys.shape[1], block_table.shape[1]
    G = Hq // H
    GP = max(2, triton.next_power_of_2(G))
    places = places_of(_RESIDENT, query.device)
    programs = max(B, programs or programs_for(B, H, M, places, _FEWEST_BLOCKS))
    shares, parts = share_blocks(
        kv_lengths, programs, block_size,
        at_once=max(1, places // H), fewest_blocks=_FEWEST_BLOCKS, window=window,
    )  # fmt: skip
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    query = query.contiguous()
    device, fp32 = query.device, torch.float32
    best, total = (torch.empty(programs, H, GP, dtype=fp32, device=device) for _ in range(2))
    out = torch.empty(programs, H, GP, D, dtype=fp32, device=device)
    half = 0 if rope is None else rope.offset_cos.shape[-1]
    rest = D - 2 * half
    tables = (best, best, best, best) if rope is None else tuple(t.contiguous() for t in rope)
    _exact_decode_kernel[(H, programs)](
        query, table, kv_lengths, shares, keys, values, *tables, best, total, out,
        float(softmax_scale), float(softcap or 1.0), window or 0, table.stride(0), H, blocks_per_tile,
        G=G, GP=GP, D=D, DP=triton.next_power_of_2(D), BS=block_size,
        HALF=half, HALF_P=triton.next_power_of_2(max(16, half)),
        REST_P=triton.next_power_of_2(max(16, rest)) if rest else 0,
        STAGES=max(1, min(_STAGES, 1 + _PREFETCH_BYTES // (2 * keys[0, 0].nbytes))),
        HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
        PRECISION="ieee" if keys.dtype == fp32 else "tf32", num_warps=_WARPS if block_size * D <= 8192 else 8,
    )  # fmt: skip
    merged = torch.empty_like(query)
    merge._merge_kernel[(B * Hq,)](
        best, total, out, parts, merged, programs, H, SINKS=0,
        G=G, GP=GP, D=D, DP=triton.next_power_of_2(D), STEP=32, EARLY=False, num_warps=1,
    )  # fmt: skip
    return merged
