"""Quantizing, packing and storing values on the GPU in one launch, which the host does not wait for.

16-bit values of whole heads are worked on in pairs (``value_pairs``), others one at a time (``value_ranges``). Where a
value group is not made of whole heads, its codes share bytes with other groups', and a second launch, a program per
tokens and head, writes them; what is an outlier it knows from the two ends and where ties at them stop.
"""

# Kernels take tensors of pointers and constants, which have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvquant.kernels import LayerConstants, ValueStore
from kvquant.kernels.triton_kernels import value_pairs
from kvquant.kernels.triton_kernels.codes import (
    as_bytes,
    boundaries,
    count_codes,
    fold,
    no_words,
    store_words,
    subfield_width,
    tile_rows,
)
from kvquant.kernels.triton_kernels.value_ranges import ranges_and_outliers

# Low bits that an fp32 number from a narrower type never has.
_UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit(do_not_specialize=["T"])
def _value_codes(
    values,
    skip,
    slot_block,
    slot_offset,
    midpoints,
    zero,
    scale,
    ends,
    codes,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    UP: tl.constexpr,
    BS: tl.constexpr,
    VG: tl.constexpr,
    N: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    SKIP: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < T
    block = tl.load(slot_block + row, mask=live, other=0)
    slot = tl.load(slot_offset + row, mask=live, other=0)
    row = row.to(tl.int64)
    CHANNELS: tl.constexpr = H * D // VG
    ROW_BYTES: tl.constexpr = BITS // (BITS & -BITS) * U
    j = tl.arange(0, UP)
    there = live[:, None] & (j < U)[None, :]
    words = no_words(ROWS, UP, BITS)
    for u in tl.static_range(D // U):
        channel = (head * D + u * U + j)[None, :]
        x = tl.load(values + (row * (H * D))[:, None] + channel, mask=there, other=0.0).to(tl.float32)
        group = channel // CHANNELS
        at = ((block * BS + slot) * VG)[:, None] + group
        z = tl.load(zero + at, mask=there, other=0.0).to(tl.float32)
        s = tl.load(scale + at, mask=there, other=0.0).to(tl.float32)
        code = count_codes(x, boundaries(z, s, midpoints, BITS), z, s, midpoints, BITS)
        if N > 0:
            end = ends + ((row * VG)[:, None] + group) * 4
            low = tl.load(end, mask=there, other=0.0)
            high = tl.load(end + 1, mask=there, other=0.0)
            low_until = tl.load(end + 2, mask=there, other=0.0)
            high_from = tl.load(end + 3, mask=there, other=0.0)
            c = (channel - group * CHANNELS).to(tl.float32)
            outlier = (
                (x < low) | (x > high) | ((x == low) & (c <= low_until)) | ((x == high) & (c >= high_from))
            )
            code = tl.where(outlier, 0, code)
        words = fold(words, code, u, BITS)
    if SKIP:
        words = tl.where((tl.load(skip + row, mask=live, other=1) == 0)[:, None], words, 0)
    to = codes + (((block * H + head) * BS + slot) * ROW_BYTES)[:, None] + j[None, :]
    store_words(words, to, there, U, BITS)


def write_values(
    values: Tensor,
    store: ValueStore,
    constants: LayerConstants,
    slot_block: Tensor,
    slot_offset: Tensor,
    skip: Tensor | None,
    error: Tensor,
    *,
    bits: int,
    runs: Tensor | None = None,
) -> None:
    """Quantize, pack and store values [T, H, D] with each token's own range; see ``fused_write.write_values``.

    Args:
        values: [T, H, D].
        store: the layer's values in the pool, each tensor contiguous.
        constants: midpoints of the layer's codebook.
        slot_block: block of each token, int64 [T].
        slot_offset: slot within the block, int64 [T].
        skip: sink tokens, bool [T], or None.
        error: the pool's error word, int64 [2].
        bits: width of a code.
        runs: not needed beside the slots; here for the arguments to be those of ``write_keys``.

    Raises:
        ValueError: the planes of a row do not fill whole bytes.
    """
    T, H, D = values.shape
    VG, BS = store.zero.shape[-1], store.zero.shape[-2]
    channels = H * D // VG
    per_end = store.outlier_index.shape[-1] // VG // 2
    U = subfield_width(D, bits)
    values, skip_bytes = values.contiguous(), as_bytes(skip, slot_block)
    slots = (slot_block, slot_offset)
    if value_pairs.takes(values, store, U, bits):
        value_pairs.write(
            values,
            store,
            constants,
            slots,
            skip_bytes,
            error,
            bits=bits,
            subfield=U,
            has_skip=skip is not None,
        )
        return
    UP = triton.next_power_of_2(U)
    # Groups of whole heads are encoded at once. Others share bytes, and are encoded when all their ranges are known.
    whole = channels % D == 0
    layout = {"HEADS": channels // D, "D": D, "U": U, "UP": UP} if whole else _as_one_head(channels)
    padded = triton.next_power_of_2(layout["HEADS"]) * (layout["D"] // layout["U"]) * layout["UP"]
    ends = torch.empty(
        (T, VG, 4) if per_end and not whole else (0,), dtype=torch.float32, device=values.device
    )
    ranges_and_outliers[(T, VG)](
        values,
        skip_bytes,
        *slots,
        store.zero,
        store.scale,
        store.outlier_index,
        store.outlier_value,
        ends,
        error,
        constants.value_midpoints,
        store.codes,
        H=H,
        **layout,
        P=padded,
        BS=BS,
        VG=VG,
        N=per_end,
        GROUP=_group_size(channels, per_end),
        UNUSED=_UNUSED_BITS[values.dtype],
        BITS=bits,
        SKIP=skip is not None,
        ENCODE=whole,
        num_warps=_warps(padded),
        enable_fp_fusion=False,
    )
    if whole:
        return
    rows = tile_rows(T)
    _value_codes[(triton.cdiv(T, rows), H)](
        values,
        skip_bytes,
        *slots,
        constants.value_midpoints,
        store.zero,
        store.scale,
        ends,
        store.codes,
        T,
        H=H,
        D=D,
        U=U,
        UP=UP,
        BS=BS,
        VG=VG,
        N=per_end,
        BITS=bits,
        ROWS=rows,
        SKIP=skip is not None,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _as_one_head(channels: int) -> dict[str, int]:
    """The channels of a group that is not whole heads, as one head of one subfield."""
    return {"HEADS": 1, "D": channels, "U": channels, "UP": triton.next_power_of_2(channels)}


def _warps(channels: int) -> int:
    """Warps for a token's channels: 16 channels a thread, which takes 90 to 103 registers. With 32 it took 168 and spilled."""
    return max(1, min(16, channels // 512))


def _group_size(channels: int, per_end: int) -> int:
    """Channels of a group: as many as leave three times as many groups as outliers, so that the bound is close."""
    return next((size for size in (8, 4, 2) if channels // size >= 3 * per_end), 1)
