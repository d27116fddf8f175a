"""Stored blocks back to numbers on the GPU: packed codes, outliers and, where asked for, the rotation of keys.

One program takes one head of one block. It writes what codes decode to, then the outliers over it, and for rotated
keys reads its own rows back: the tile lies in the first-level cache, and no scatter into registers is needed. What was
written is bound by memory, so that codes are unpacked and looked up one at a time, which holds for any width.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvquant.kernels import KeyStore, LayerConstants, Rope, ValueStore, fused_read

_ENTRIES = 64  # outliers put back at a time
_WARPS = 4


@triton.jit
def _add_plane(code, row, d, D: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    # A width of b bits has the planes that b is written with in binary, the widest first and lowest.
    if BITS & WIDTH:
        BELOW: tl.constexpr = BITS // (2 * WIDTH) * (2 * WIDTH)
        BYTES: tl.constexpr = D * WIDTH // 8
        byte = tl.load(row + (D * BELOW // 8 + d % BYTES)[None, :], mask=(d < D)[None, :], other=0).to(
            tl.int32
        )
        field = (byte >> (d // BYTES * WIDTH)[None, :]) & ((1 << WIDTH) - 1)
        code |= field << BELOW
    return code


@triton.jit
def _load_codes(row, d, ROWS: tl.constexpr, DP: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Codes [ROWS, DP] of rows [ROWS, 1], see ``kvquant.packing``."""
    code = tl.zeros((ROWS, DP), tl.int32)
    code = _add_plane(code, row, d, D, BITS, 8)
    code = _add_plane(code, row, d, D, BITS, 4)
    code = _add_plane(code, row, d, D, BITS, 2)
    return _add_plane(code, row, d, D, BITS, 1)


@triton.jit
def _angles(
    position, j, live, offset_cos, offset_sin, base_cos, base_sin, HALF: tl.constexpr, TILE: tl.constexpr
):
    """Cosines and sines of positions [ROWS] by pairs of channels ``j``, with the model's attention scaling."""
    there = live[:, None] & (j < HALF)[None, :]
    base = (position // TILE * HALF)[:, None] + j[None, :]
    offset = (position % TILE * HALF)[:, None] + j[None, :]
    cb = tl.load(base_cos + base, mask=there, other=1.0)
    sb = tl.load(base_sin + base, mask=there, other=0.0)
    co = tl.load(offset_cos + offset, mask=there, other=1.0)
    so = tl.load(offset_sin + offset, mask=there, other=0.0)
    return cb * co - sb * so, sb * co + cb * so


@triton.jit
def _rotate(
    source, to, position, live, offset_cos, offset_sin, base_cos, base_sin,
    HALF: tl.constexpr, HALF_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rotate the first 2 * HALF channels of rows ``source`` [ROWS, 1] into rows ``to``, which may be the same."""
    j = tl.arange(0, HALF_P)
    there = live[:, None] & (j < HALF)[None, :]
    cos, sin = _angles(position, j, live, offset_cos, offset_sin, base_cos, base_sin, HALF, TILE)
    first = tl.load(source + j[None, :], mask=there, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + j[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(to + j[None, :], (first * cos - second * sin).to(to.dtype.element_ty), mask=there)
    tl.store(to + HALF + j[None, :], (second * cos + first * sin).to(to.dtype.element_ty), mask=there)


@triton.jit
def _put_back(to, row_stride, number, kept, live, slots, D: tl.constexpr):
    """Write outliers, numbered slot * D + channel, over a tile whose slot 0 is at ``to``."""
    slot = number // D
    at = to + slot.to(tl.int64) * row_stride + number % D
    tl.store(at, kept.to(to.dtype.element_ty), mask=live & (slot < slots))


@triton.jit
def _dequantize_keys(
    blocks, table, codes, count, index, value, spill_head, spill_next, spill_index, spill_value,
    zero, scale, centroids, offset_cos, offset_sin, base_cos, base_sin, out,
    table_stride, base_entries, row_stride, head_stride, H,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, SP: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr,
    HALF: tl.constexpr, HALF_P: tl.constexpr, TILE: tl.constexpr, EC: tl.constexpr,
):  # fmt: skip
    """Keys of one head of one block; ``HALF`` pairs of channels are rotated to their positions, 0 for none."""
    entry, h = blocks + tl.program_id(0) * 4, tl.program_id(1)
    column = tl.load(entry + 1)
    block = tl.load(table + tl.load(entry) * table_stride + column).to(tl.int64)
    slots = tl.load(entry + 3)
    to = out + tl.load(entry + 2).to(tl.int64) * row_stride + h.to(tl.int64) * head_stride
    place = block * H + h
    slot, d = tl.arange(0, SP), tl.arange(0, DP)
    live = slot < slots
    row = codes + (place * BS + tl.where(live, slot, 0))[:, None] * ROW_BYTES
    code = _load_codes(row, d, SP, DP, D, BITS)
    s = tl.load(scale + h * D + d, mask=d < D, other=0.0)[None, :]
    z = tl.load(zero + h * D + d, mask=d < D, other=0.0)[None, :]
    x = tl.load(centroids + code) * s + z
    rows = to + slot.to(tl.int64)[:, None] * row_stride
    tl.store(rows + d[None, :], x.to(out.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])

    tl.debug_barrier()  # an outlier is written by another thread than what lies under it
    entries = tl.load(count + place)
    in_base = tl.minimum(entries, base_entries)
    for first in range(0, in_base, EC):
        e = first + tl.arange(0, EC)
        number = tl.load(index + place * base_entries + e, mask=e < in_base, other=0).to(tl.int32) & 0xFFFF
        kept = tl.load(value + place * base_entries + e, mask=e < in_base, other=0.0)
        _put_back(to, row_stride, number, kept, e < in_base, slots, D)
    left = entries - base_entries
    if left > 0:
        chunk = tl.load(spill_head + place).to(tl.int64)
        while left > 0:
            lane = tl.arange(0, 32)
            number = tl.load(spill_index + chunk * 32 + lane, mask=lane < left, other=0).to(tl.int32) & 0xFFFF
            kept = tl.load(spill_value + chunk * 32 + lane, mask=lane < left, other=0.0)
            _put_back(to, row_stride, number, kept, lane < left, slots, D)
            left -= 32
            if left > 0:
                chunk = tl.load(spill_next + chunk).to(tl.int64)

    if HALF > 0:
        tl.debug_barrier()
        _rotate(
            rows, rows, column * BS + slot, live, offset_cos, offset_sin, base_cos, base_sin, HALF, HALF_P, TILE
        )  # fmt: skip


@triton.jit
def _dequantize_values(
    blocks, table, codes, zero, scale, index, value, ends, centroids, out,
    table_stride, row_stride, head_stride, H, VG, outliers,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, SP: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr,
    WHOLE_HEADS: tl.constexpr, EC: tl.constexpr,
):  # fmt: skip
    """Values of one head of one block, open or closed."""
    entry, h = blocks + tl.program_id(0) * 4, tl.program_id(1)
    block = tl.load(table + tl.load(entry) * table_stride + tl.load(entry + 1)).to(tl.int64)
    slots = tl.load(entry + 3)
    to = out + tl.load(entry + 2).to(tl.int64) * row_stride + h.to(tl.int64) * head_stride
    slot, d = tl.arange(0, SP), tl.arange(0, DP)
    live = slot < slots
    there = live[:, None] & (d < D)[None, :]
    row = codes + ((block * H + h) * BS + tl.where(live, slot, 0))[:, None] * ROW_BYTES
    code = _load_codes(row, d, SP, DP, D, BITS)
    if WHOLE_HEADS:
        at = ((block * BS + slot) * VG + h * VG // H)[:, None]
        known = live[:, None]
    else:  # a group is a run of channels that ends inside a head
        at = ((block * BS + slot) * VG)[:, None] + ((h * D + d) // (H * D // VG))[None, :]
        known = there
    s = tl.load(scale + at, mask=known, other=0.0).to(tl.float32)
    z = tl.load(zero + at, mask=known, other=0.0).to(tl.float32)
    x = tl.load(centroids + code) * s + z
    tl.store(
        to + slot.to(tl.int64)[:, None] * row_stride + d[None, :], x.to(out.dtype.element_ty), mask=there
    )

    if outliers > 0:
        tl.debug_barrier()  # an outlier is written by another thread than what lies under it
        closed = tl.load(ends + block * H + H - 1) > 0
        first = tl.load(ends + block * H + h - 1, mask=closed & (h > 0), other=0)
        last = tl.load(ends + block * H + h, mask=closed, other=0)
        last = tl.where(closed, last, slots * outliers)
        for start in range(first, last, EC):
            e = start + tl.arange(0, EC)
            number = tl.load(index + block * BS * outliers + e, mask=e < last, other=0).to(tl.int32) & 0xFFFF
            kept = tl.load(value + block * BS * outliers + e, mask=e < last, other=0.0)
            # An open block lists its tokens' entries of all heads, by channel of the layer.
            channel = number - h * D
            mine = (e < last) & (closed | ((channel >= 0) & (channel < D)))
            number = tl.where(closed, number, e // outliers * D + channel)
            _put_back(to, row_stride, tl.where(mine, number, 0), kept, mine, slots, D)


@triton.jit(do_not_specialize=["num_entries"])
def _copy_exact(
    entries, table, keys, values, offset_cos, offset_sin, base_cos, base_sin, out_keys, out_values,
    num_entries, table_stride, H,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, SP: tl.constexpr,
    HALF: tl.constexpr, HALF_P: tl.constexpr, TILE: tl.constexpr, FROM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Exact rows into a workspace [rows, H, D], keys rotated to their positions: one head of a block or of SP rows."""
    h = tl.program_id(1)
    slot, d = tl.arange(0, SP), tl.arange(0, DP)
    if FROM_BLOCKS:
        entry = entries + tl.program_id(0) * 4
        column = tl.load(entry + 1)
        block = tl.load(table + tl.load(entry) * table_stride + column).to(tl.int64)
        live = slot < tl.load(entry + 3)
        source = ((block * H + h) * BS + slot) * D
        row, position = tl.load(entry + 2) + slot, column * BS + slot
    else:
        e = tl.program_id(0) * SP + slot
        live = e < num_entries
        source = (tl.load(entries + e * 3, mask=live, other=0).to(tl.int64) * H + h) * D
        row = tl.load(entries + e * 3 + 1, mask=live, other=0)
        position = tl.load(entries + e * 3 + 2, mask=live, other=0)
    to = ((row.to(tl.int64) * H + h) * D)[:, None]
    source = source[:, None]
    there = live[:, None] & (d < D)[None, :]
    rest = there & (d >= 2 * HALF)[None, :]
    if HALF > 0:
        _rotate(
            keys + source, out_keys + to, position, live, offset_cos, offset_sin, base_cos, base_sin,
            HALF, HALF_P, TILE,
        )  # fmt: skip
    if 2 * HALF < D:
        tl.store(
            out_keys + to + d[None, :], tl.load(keys + source + d[None, :], mask=rest, other=0.0), mask=rest
        )
    tl.store(
        out_values + to + d[None, :], tl.load(values + source + d[None, :], mask=there, other=0.0), mask=there
    )


def dequantize_keys(
    store: KeyStore,
    constants: LayerConstants,
    blocks: Tensor,
    table: Tensor,
    out: Tensor,
    rope: Rope | None,
    *,
    bits: int,
    block_size: int,
    row_stride: int,
    head_stride: int,
) -> None:
    """Write blocks of keys as rows of ``out``, rotated to their positions where ``rope`` is given.

    Args:
        store: the layer's keys in the pool, each tensor contiguous.
        constants: codebook, zero and scale of the layer.
        blocks: int32 [n, 4] (row of the table, column, first row, slots to write).
        table: block ids; columns lie next to each other.
        out: rows of D channels.
        rope: tables for tiles of so many tokens as ``offset_cos`` has rows, or None.
        bits: width of a code.
        block_size: BS.
        row_stride: elements of ``out`` between tokens.
        head_stride: elements of ``out`` between heads.
    """
    _, H, _, row_bytes = store.codes.shape
    D = constants.key_zero.shape[-1]
    half, tables = _rope_tables(rope, constants.key_zero)
    _dequantize_keys[(len(blocks), H)](
        blocks, table, store.codes, store.outlier_count, store.outlier_index, store.outlier_value,
        store.spill_head, store.spill_next, store.spill_index, store.spill_value,
        constants.key_zero, constants.key_scale, constants.key_centroids, *tables, out,
        table.stride(0), store.outlier_index.shape[-1], row_stride, head_stride, H,
        D=D, DP=triton.next_power_of_2(D), BS=block_size, SP=triton.next_power_of_2(block_size), BITS=bits,
        ROW_BYTES=row_bytes, HALF=half, HALF_P=triton.next_power_of_2(max(1, half)),
        TILE=1 if rope is None else rope.offset_cos.shape[0], EC=_ENTRIES, num_warps=_WARPS,
    )  # fmt: skip


def dequantize_values(
    store: ValueStore,
    constants: LayerConstants,
    blocks: Tensor,
    table: Tensor,
    out: Tensor,
    *,
    bits: int,
    head_dim: int,
    row_stride: int,
    head_stride: int,
) -> None:
    """Write blocks of values as rows of ``out``; arguments as of :func:`dequantize_keys`."""
    _, H, BS, row_bytes = store.codes.shape
    _dequantize_values[(len(blocks), H)](
        blocks, table, store.codes, store.zero, store.scale, store.outlier_index, store.outlier_value,
        store.outlier_end, constants.value_centroids, out,
        table.stride(0), row_stride, head_stride, H, store.zero.shape[-1], store.outlier_index.shape[-1],
        D=head_dim, DP=triton.next_power_of_2(head_dim), BS=BS, SP=triton.next_power_of_2(BS), BITS=bits,
        ROW_BYTES=row_bytes, WHOLE_HEADS=H % store.zero.shape[-1] == 0, EC=_ENTRIES, num_warps=_WARPS,
    )  # fmt: skip


def copy_exact(
    entries: Tensor,
    table: Tensor | None,
    keys: Tensor,
    values: Tensor,
    out: tuple[Tensor, Tensor],
    rope: Rope | None,
) -> None:
    """Copy exact keys, rotated to their positions where ``rope`` is given, and values into a workspace.

    Args:
        entries: int32; with a table [n, 4] as of :func:`dequantize_keys`, without one [n, 3] (row of the source, row of
            the workspace, position).
        table: block ids, or None.
        keys: [N, H, BS, D] with a table, else [rows, H, D].
        values: likewise.
        out: keys and values [rows, H, D] of the workspace.
        rope: as of :func:`dequantize_keys`.
    """
    H, D = out[0].shape[-2:]
    if not len(entries):
        return
    size = 16 if table is None else keys.shape[2]
    half, tables = _rope_tables(rope, keys)
    grid = (triton.cdiv(len(entries), size) if table is None else len(entries), H)
    _copy_exact[grid](
        entries, entries if table is None else table, keys, values, *tables, *out,
        len(entries), 0 if table is None else table.stride(0), H,
        D=D, DP=triton.next_power_of_2(D), BS=size, SP=triton.next_power_of_2(size),
        HALF=half, HALF_P=triton.next_power_of_2(max(1, half)),
        TILE=1 if rope is None else rope.offset_cos.shape[0], FROM_BLOCKS=table is not None, num_warps=4,
    )  # fmt: skip


def _rope_tables(rope: Rope | None, stand_in: Tensor) -> tuple[int, tuple[Tensor, ...]]:
    """Rotated pairs of channels, and the tables; without a rotation, tensors that are not read."""
    if rope is None:
        return 0, (stand_in,) * 4
    return rope.offset_cos.shape[-1], tuple(table.contiguous() for table in rope)


@functools.lru_cache(maxsize=16)
def _tile_entries(S: int, P: int, H: int, block_size: int, device: torch.device) -> Tensor:
    """Entries of all blocks of ids [S, P], for tiles [S, H, P * BS, D]: rows are counted through all heads."""
    s, p = torch.meshgrid(torch.arange(S), torch.arange(P), indexing="ij")
    row = (s * H * P + p) * block_size
    entries = torch.stack([s, p, row, torch.full_like(s, block_size)], -1)
    return entries.view(-1, 4).to(torch.int32).to(device, non_blocking=True)


def read_keys(
    store: KeyStore, constants: LayerConstants, block_ids: Tensor, *, bits: int, head_dim: int
) -> Tensor:
    """Dequantize blocks of keys to tiles; see ``fused_read.read_keys``."""
    if head_dim % 8:  # a plane's bytes would not all be full
        return fused_read.read_keys(store, constants, block_ids, bits=bits, head_dim=head_dim)
    S, P = block_ids.shape
    _, H, BS, _ = store.codes.shape
    out = torch.empty(S, H, P * BS, head_dim, dtype=torch.float32, device=store.codes.device)
    entries = _tile_entries(S, P, H, BS, out.device)
    dequantize_keys(
        store, constants, entries, block_ids.contiguous(), out, None,
        bits=bits, block_size=BS, row_stride=head_dim, head_stride=P * BS * head_dim,
    )  # fmt: skip
    return out


def read_values(
    store: ValueStore, constants: LayerConstants, block_ids: Tensor, *, bits: int, head_dim: int
) -> Tensor:
    """Dequantize blocks of values to tiles; see ``fused_read.read_values``."""
    if head_dim % 8:
        return fused_read.read_values(store, constants, block_ids, bits=bits, head_dim=head_dim)
    S, P = block_ids.shape
    _, H, BS, _ = store.codes.shape
    out = torch.empty(S, H, P * BS, head_dim, dtype=torch.float32, device=store.codes.device)
    entries = _tile_entries(S, P, H, BS, out.device)
    dequantize_values(
        store, constants, entries, block_ids.contiguous(), out,
        bits=bits, head_dim=head_dim, row_stride=head_dim, head_stride=P * BS * head_dim,
    )  # fmt: skip
    return out
