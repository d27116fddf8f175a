"""Quantizing, packing and storing keys on the GPU in a few launches, none of which the host waits for.

The first writes codes, marks outliers and counts each (run, head)'s: ``key_pairs`` for keys of 16 bits, else the kernel
here, one channel at a time. ``key_outliers`` then stores what is marked.
"""

# Kernels take tensors of pointers and constants, which have no types.
# mypy: disable-error-code="no-untyped-def, assignment"
# Nor can tuples in them, which grow, be unpacked into others.
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvquant.kernels import ERROR_KEY_NOT_FINITE, KeyStore, LayerConstants
from kvquant.kernels.triton_kernels import key_pairs
from kvquant.kernels.triton_kernels.codes import (
    as_bytes,
    boundaries,
    count_codes,
    fold,
    is_finite,
    mask_of_eight,
    no_words,
    report,
    store_words,
    subfield_width,
    tile_rows,
)
from kvquant.kernels.triton_kernels.key_outliers import scratch_for, store_outliers

_KEY_NOT_FINITE = tl.constexpr(ERROR_KEY_NOT_FINITE)
_HELD = tl.constexpr(32)  # boundaries that a thread keeps from tile to tile


@triton.jit
def _tile(
    keys, skip, lower, upper, row, live, head, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SKIP: tl.constexpr
):  # fmt: skip
    """Load the keys [rows, DP] of one head as fp32, with a mask of what is there and one of what is an outlier."""
    d = tl.arange(0, DP)
    there = live[:, None] & (d < D)[None, :]
    x = tl.load(keys + (row.to(tl.int64) * (H * D) + head * D)[:, None] + d[None, :], mask=there, other=0.0)
    x = x.to(tl.float32)
    low = tl.load(lower + head * D + d, mask=d < D, other=0.0)
    high = tl.load(upper + head * D + d, mask=d < D, other=0.0)
    outside = there & ((x < low[None, :]) | (x > high[None, :]))
    if SKIP:
        outside = outside & (tl.load(skip + row, mask=live, other=1) == 0)[:, None]
    return x, there, outside


@triton.jit
def _codes(
    keys,
    lower,
    upper,
    zero,
    scale,
    midpoints,
    skip,
    runs,
    codes,
    run,
    head,
    part,
    H: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    COLUMNS: tl.constexpr,
    BS: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    SKIP: tl.constexpr,
):
    """Write the codes of a run of one head, ``COLUMNS`` channels of every subfield.

    A thread has one channel of each subfield in all its rows, and computes its boundaries once, or, where they would
    take too many registers, once a tile.
    """
    block = tl.load(runs + run * 4).to(tl.int64)
    first = tl.load(runs + run * 4 + 1).to(tl.int64)
    count = tl.load(runs + run * 4 + 2)
    first_slot = tl.load(runs + run * 4 + 3)
    ROW_BYTES: tl.constexpr = BITS // (BITS & -BITS) * U
    HOISTED: tl.constexpr = D // U * ((1 << BITS) - 1) <= _HELD
    j = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = j < U
    zeros, scales, lows, highs, bounds = (), (), (), (), ()
    for u in tl.static_range(D // U):
        channel = head * D + u * U + j
        z = tl.load(zero + channel, mask=inside, other=0.0)[None, :]
        s = tl.load(scale + channel, mask=inside, other=0.0)[None, :]
        zeros, scales = zeros + (z,), scales + (s,)
        lows = lows + (tl.load(lower + channel, mask=inside, other=0.0)[None, :],)
        highs = highs + (tl.load(upper + channel, mask=inside, other=0.0)[None, :],)
        if HOISTED:
            bounds = bounds + (boundaries(z, s, midpoints, BITS),)
    r = tl.arange(0, ROWS)
    source = keys + first * (H * D) + head * D
    source = source + r[:, None] * (H * D) + tl.max_contiguous(j, 1)[None, :]
    to = codes + ((block * H + head) * BS + first_slot) * ROW_BYTES
    to = to + r[:, None] * ROW_BYTES + tl.max_contiguous(j, 1)[None, :]
    for start in range(0, count, ROWS):
        live = start + r < count
        there = live[:, None] & inside[None, :]
        words = no_words(ROWS, COLUMNS, BITS)
        for u in tl.static_range(D // U):
            x = tl.load(source + u * U, mask=there, other=0.0).to(tl.float32)
            b = bounds[u] if HOISTED else boundaries(zeros[u], scales[u], midpoints, BITS)
            code = count_codes(x, b, zeros[u], scales[u], midpoints, BITS)
            words = fold(words, tl.where((x < lows[u]) | (x > highs[u]), 0, code), u, BITS)
        if SKIP:
            stored = tl.load(skip + first + start + r, mask=live, other=1) == 0
            words = tl.where(stored[:, None], words, 0)
        store_words(words, to, there, U, BITS)
        source += ROWS * H * D
        to += ROWS * ROW_BYTES


@triton.jit
def _marks(
    keys,
    lower,
    upper,
    skip,
    runs,
    marks,
    outlier_count,
    scratch,
    error,
    run,
    head,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    SKIP: tl.constexpr,
    MARKS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Mark the outliers of a run of one head and count them; ``KEPT`` is their type in the store."""
    first = tl.load(runs + run * 4 + 1)
    count = tl.load(runs + run * 4 + 2)
    number = count - count
    d, d8 = tl.arange(0, DP), tl.arange(0, DP // 8)
    for start in range(0, count, ROWS):
        r = start + tl.arange(0, ROWS)
        row, live = first + r, r < count
        x, there, outside = _tile(keys, skip, lower, upper, row, live, head, H, D, DP, SKIP)
        if MARKS:
            packed = mask_of_eight(outside, (ROWS, DP // 8, 8))
            to = marks + (row.to(tl.int64) * H + head)[:, None] * (DP // 8) + d8[None, :]
            tl.store(to, (packed & 255).to(tl.uint8), mask=live[:, None])
            number += tl.sum(tl.sum(packed >> 16, 1), 0)

        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        worst = tl.max(tl.max(bits, 1), 0)  # what is not there is 0
        if (worst >= 0x7F800000) | (keys.dtype.element_ty != KEPT):
            bad = there & ((is_finite(x) == 0) | (outside & (is_finite(x.to(KEPT)) == 0)))
            bad_channel = tl.min(tl.min(tl.where(bad, (head * D + d)[None, :], H * D), 1), 0)
            report(error, _KEY_NOT_FINITE, bad_channel, H * D)

    if MARKS:
        at = run * H + head
        block = tl.load(runs + run * 4).to(tl.int64)
        tl.store(scratch + at, number)
        tl.store(scratch + tl.num_programs(0) * H + at, tl.load(outlier_count + block * H + head))


@triton.jit
def _codes_and_marks(
    keys,
    lower,
    upper,
    zero,
    scale,
    midpoints,
    skip,
    runs,
    codes,
    marks,
    outlier_count,
    outlier_value,
    scratch,
    error,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    U: tl.constexpr,
    COLUMNS: tl.constexpr,
    BS: tl.constexpr,
    BITS: tl.constexpr,
    CODE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    SKIP: tl.constexpr,
    MARKS: tl.constexpr,
):
    # Outliers and codes are separate programs: either needs few registers, and reads of one serve the other's. Runs are
    # many, and only the first axis of a grid is long.
    run, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if part == 0:
        _marks(
            keys, lower, upper, skip, runs, marks, outlier_count, scratch, error, run, head,
            H, D, DP, ROWS, SKIP, MARKS, outlier_value.dtype.element_ty,
        )  # fmt: skip
    else:
        _codes(
            keys, lower, upper, zero, scale, midpoints, skip, runs, codes, run, head, part - 1,
            H, D, U, COLUMNS, BS, BITS, CODE_ROWS, SKIP,
        )  # fmt: skip


def write_keys(
    keys: Tensor,
    store: KeyStore,
    constants: LayerConstants,
    slot_block: Tensor,
    slot_offset: Tensor,
    skip: Tensor | None,
    error: Tensor,
    *,
    bits: int,
    runs: Tensor,
) -> None:
    """Quantize, pack and store keys [T, H, D] and append their outliers; see ``fused_write.write_keys``.

    Args:
        keys: pre-RoPE keys, [T, H, D].
        store: the layer's keys in the pool, each tensor contiguous.
        constants: thresholds and midpoints of the layer.
        slot_block: not needed beside ``runs``.
        slot_offset: the same.
        skip: sink tokens, bool [T], or None.
        error: the pool's error word, int64 [2].
        bits: width of a code.
        runs: where the tokens go, int32 [R, 4], see ``RaggedStep.runs``.

    Raises:
        ValueError: the planes of a row do not fill whole bytes.
    """
    T, H, D = keys.shape
    U, base = subfield_width(D, bits), store.outlier_index.shape[-1]
    DP = triton.next_power_of_2(D)
    keys, skip_bytes = keys.contiguous(), as_bytes(skip, runs)
    # No run is longer than this, and that is known without reading them.
    most_rows = min(T - len(runs) + 1, store.codes.shape[2])
    # Without room for outliers the thresholds are infinite.
    marked = bool(base or len(store.spill_free))
    marks = torch.empty((T, H, DP // 8) if marked else 0, dtype=torch.uint8, device=keys.device)
    scratch = scratch_for(runs, H)
    if key_pairs.takes(keys, store, bits):
        key_pairs.codes_and_marks(
            keys, store, constants, skip, skip_bytes, runs, marks, scratch, error, bits=bits
        )
    else:
        rows, columns = tile_rows(most_rows), min(32, triton.next_power_of_2(U))
        _codes_and_marks[(len(runs), H, 1 + triton.cdiv(U, columns))](
            keys,
            constants.key_lower,
            constants.key_upper,
            constants.key_zero,
            constants.key_scale,
            constants.key_midpoints,
            skip_bytes,
            runs,
            store.codes,
            marks,
            store.outlier_count,
            store.outlier_value,
            scratch,
            error,
            H=H,
            D=D,
            DP=DP,
            U=U,
            COLUMNS=columns,
            BS=store.codes.shape[2],
            BITS=bits,
            CODE_ROWS=min(rows, 512 // columns),
            ROWS=rows,
            SKIP=skip is not None,
            MARKS=marked,
            num_warps=4,
            enable_fp_fusion=False,
        )
    if marked:
        store_outliers(keys, marks, runs, scratch, store, error, most_rows=most_rows)
