"""Quantizing, packing and storing keys on the GPU in three launches, none of which the host waits for.

The first writes codes and what fits the base rows of outliers, and counts each (run, head)'s outliers. The second, one
program, adds up the spill chunks these need, in (run, head) order: runs come by rising block id, so every backend
hands out the same chunks. The third writes what lies beyond the base rows, and mostly finds nothing to do.
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

from kvquant.kernels import (
    ERROR_KEY_NOT_FINITE,
    ERROR_OUT_OF_SPILL,
    SPILL_ENTRIES,
    KeyStore,
    LayerConstants,
)
from kvquant.kernels.triton_kernels.codes import (
    as_bytes,
    boundaries,
    count_codes,
    fold,
    is_finite,
    lowest_bit,
    mask_of_eight,
    no_words,
    report,
    store_words,
    subfield_width,
    tile_rows,
)

_KEY_NOT_FINITE = tl.constexpr(ERROR_KEY_NOT_FINITE)
_OUT_OF_SPILL = tl.constexpr(ERROR_OUT_OF_SPILL)
_CHUNK = tl.constexpr(SPILL_ENTRIES)
_HELD = tl.constexpr(32)  # boundaries that a thread keeps from tile to tile
_LINKS = tl.constexpr(64)  # links that the third launch sets at a time


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
def _rank(outside, before, ROWS: tl.constexpr, DP: tl.constexpr):
    """Outliers of a tile in order: by eight channels their bits and the first one's entry; how many with those before;
    and the most that eight channels have."""
    packed = mask_of_eight(outside, (ROWS, DP // 8, 8))
    count = packed >> 16
    per_row = tl.sum(count, 1)
    entry = before + (tl.cumsum(per_row, 0) - per_row)[:, None] + tl.cumsum(count, 1) - count
    return packed & 255, entry, before + tl.sum(per_row, 0), tl.max(tl.max(count, 1), 0)


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
def _base_rows(
    keys,
    lower,
    upper,
    skip,
    runs,
    outlier_count,
    outlier_index,
    outlier_value,
    scratch,
    error,
    run,
    head,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BASE: tl.constexpr,
    ROWS: tl.constexpr,
    SKIP: tl.constexpr,
):
    """Store the outliers of a run of one head that fit its base row, and count all."""
    block = tl.load(runs + run * 4).to(tl.int64)
    first = tl.load(runs + run * 4 + 1)
    count = tl.load(runs + run * 4 + 2)
    first_slot = tl.load(runs + run * 4 + 3)
    place = block * H + head
    before = tl.load(outlier_count + place)

    entries = before
    d, d8 = tl.arange(0, DP), tl.arange(0, DP // 8)
    for start in range(0, count, ROWS):
        r = start + tl.arange(0, ROWS)
        live = r < count
        row, slot = first + r, first_slot + r
        x, there, outside = _tile(keys, skip, lower, upper, row, live, head, H, D, DP, SKIP)
        left, entry, entries, most = _rank(outside, entries, ROWS, DP)
        # Few of eight neighbours are outliers: one from each eight at a time, and few times.
        for _one in range(most):
            column = d8[None, :] * 8 + lowest_bit(left)
            chosen = (left > 0) & (entry < BASE)
            one = tl.load(
                keys + (row.to(tl.int64) * (H * D) + head * D)[:, None] + column, mask=chosen, other=0.0
            )
            to = place * BASE + entry
            tl.store(outlier_index + to, ((slot * D)[:, None] + column).to(tl.int16), mask=chosen)
            tl.store(outlier_value + to, one.to(tl.float32).to(outlier_value.dtype.element_ty), mask=chosen)
            entry += 1
            left &= left - 1

        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        worst = tl.max(tl.max(bits, 1), 0)  # what is not there is 0
        if (worst >= 0x7F800000) | (keys.dtype.element_ty != outlier_value.dtype.element_ty):
            kept = x.to(outlier_value.dtype.element_ty)
            bad = there & ((is_finite(x) == 0) | (outside & (is_finite(kept) == 0)))
            bad_channel = tl.min(tl.min(tl.where(bad, (head * D + d)[None, :], H * D), 1), 0)
            report(error, _KEY_NOT_FINITE, bad_channel, H * D)

    # Read once more, which is cheaper than a register through the loop.
    before = tl.load(outlier_count + place)
    at = run * H + head
    tl.store(scratch + at, entries - before)
    tl.store(scratch + tl.num_programs(2) * H + at, before)


@triton.jit
def _codes_and_base_rows(
    keys,
    lower,
    upper,
    zero,
    scale,
    midpoints,
    skip,
    runs,
    codes,
    outlier_count,
    outlier_index,
    outlier_value,
    scratch,
    error,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    U: tl.constexpr,
    COLUMNS: tl.constexpr,
    BS: tl.constexpr,
    BASE: tl.constexpr,
    BITS: tl.constexpr,
    CODE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    SKIP: tl.constexpr,
):
    # Outliers and codes are separate programs: either needs few registers, and reads of one serve the other's.
    part, head, run = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if part == 0:
        _base_rows(
            keys, lower, upper, skip, runs, outlier_count, outlier_index, outlier_value, scratch, error, run, head,
            H, D, DP, BASE, ROWS, SKIP,
        )  # fmt: skip
    else:
        _codes(
            keys, lower, upper, zero, scale, midpoints, skip, runs, codes, run, head, part - 1,
            H, D, U, COLUMNS, BS, BITS, CODE_ROWS, SKIP,
        )  # fmt: skip


@triton.jit
def _chunks(entries, BASE: tl.constexpr):
    return (tl.maximum(entries - BASE, 0) + _CHUNK - 1) // _CHUNK


@triton.jit(do_not_specialize=["total"])
def _hand_out_chunks(scratch, spill_top, error, total, BASE: tl.constexpr, PIECE: tl.constexpr):
    """Number each (run, head)'s new chunks, and say whether the chunks suffice for all; if not, none is taken."""
    top = tl.load(spill_top)
    # A scalar of the scratch's type, whatever type the constant 0 has.
    taken = top - top
    for start in range(0, total, PIECE):
        i = start + tl.arange(0, PIECE)
        live = i < total
        count = tl.load(scratch + i, mask=live, other=0)
        before = tl.load(scratch + total + i, mask=live, other=0)
        needed = _chunks(before + count, BASE) - _chunks(before, BASE)
        tl.store(scratch + 2 * total + i, taken + tl.cumsum(needed, 0) - needed, mask=live)
        taken += tl.sum(needed, 0)
    enough = taken <= top
    # Every thread has read the height of the stack before one changes it.
    tl.debug_barrier()
    tl.store(scratch + 3 * total, enough.to(tl.int32))
    tl.store(scratch + 3 * total + 1, top)
    tl.store(spill_top, top - taken, mask=enough)
    report(error, _OUT_OF_SPILL, tl.where(enough, 1, 0), 1)


@triton.jit
def _spill(
    keys,
    lower,
    upper,
    skip,
    runs,
    scratch,
    outlier_count,
    spill_head,
    spill_next,
    spill_index,
    spill_value,
    spill_free,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BASE: tl.constexpr,
    ROWS: tl.constexpr,
    SKIP: tl.constexpr,
):
    run, head = tl.program_id(0), tl.program_id(1)
    total = tl.num_programs(0) * H
    at = run * H + head
    before = tl.load(scratch + total + at)
    after = before + tl.load(scratch + at)
    enough = tl.load(scratch + 3 * total) != 0
    block = tl.load(runs + run * 4).to(tl.int64)
    tl.store(outlier_count + block * H + head, after, mask=enough & (after > before))
    if enough & (after > tl.maximum(before, BASE)):
        first = tl.load(runs + run * 4 + 1)
        count = tl.load(runs + run * 4 + 2)
        first_slot = tl.load(runs + run * 4 + 3)
        # New chunk k of this (run, head) is the k-th below here on the stack.
        newest = spill_free + tl.load(scratch + 3 * total + 1) - 1 - tl.load(scratch + 2 * total + at)
        held = _chunks(before, BASE)
        new = _chunks(after, BASE) - held
        tail = tl.load(spill_head + block * H + head, mask=held > 0, other=0)
        for _link in range(1, held):
            tail = tl.load(spill_next + tail)

        d8 = tl.arange(0, DP // 8)
        entries = before
        for start in range(0, count, ROWS):
            r = start + tl.arange(0, ROWS)
            row = first + r
            _x, _there, outside = _tile(keys, skip, lower, upper, row, r < count, head, H, D, DP, SKIP)
            left, entry, entries, most = _rank(outside, entries, ROWS, DP)
            for _one in range(most):
                channel = d8[None, :] * 8 + lowest_bit(left)
                beyond = (left > 0) & (entry >= BASE)
                value = tl.load(
                    keys + (row.to(tl.int64) * (H * D) + head * D)[:, None] + channel, mask=beyond, other=0.0
                )
                position = tl.maximum(entry - BASE, 0)
                ordinal = position // _CHUNK - held
                fresh = tl.load(newest - ordinal, mask=beyond & (ordinal >= 0), other=0)
                to = tl.where(ordinal >= 0, fresh, tail).to(tl.int64) * _CHUNK + position % _CHUNK
                index = ((first_slot + r) * D)[:, None] + channel
                tl.store(spill_index + to, index.to(tl.int16), mask=beyond)
                tl.store(spill_value + to, value.to(tl.float32).to(spill_value.dtype.element_ty), mask=beyond)
                entry += 1
                left &= left - 1

        for start in range(0, new, _LINKS):
            k = start + tl.arange(0, _LINKS)
            chunk = tl.load(newest - k, mask=k < new, other=0)
            previous = tl.load(newest - k + 1, mask=(k < new) & (k > 0), other=0)
            previous = tl.where(k > 0, previous, tail)
            tl.store(spill_next + previous, chunk, mask=(k < new) & ((k > 0) | (held > 0)))
            tl.store(spill_head + block * H + head + 0 * k, chunk, mask=(k < new) & (k == 0) & (held == 0))


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
    R, base = len(runs), store.outlier_index.shape[-1]
    U = subfield_width(D, bits)
    keys, skip_bytes = keys.contiguous(), as_bytes(skip, runs)
    scratch = torch.empty(3 * R * H + 2, dtype=torch.int32, device=keys.device)
    # No run is longer than this, and that is known without reading them.
    rows = tile_rows(min(T - R + 1, store.codes.shape[2]))
    options = {"num_warps": 4, "enable_fp_fusion": False}
    tile = {
        "H": H,
        "D": D,
        "DP": triton.next_power_of_2(D),
        "BASE": base,
        "SKIP": skip is not None,
        "ROWS": rows,
    }
    limits = (constants.key_lower, constants.key_upper)
    columns = min(32, triton.next_power_of_2(U))
    _codes_and_base_rows[(1 + triton.cdiv(U, columns), H, R)](
        keys,
        *limits,
        constants.key_zero,
        constants.key_scale,
        constants.key_midpoints,
        skip_bytes,
        runs,
        store.codes,
        store.outlier_count,
        store.outlier_index,
        store.outlier_value,
        scratch,
        error,
        U=U,
        COLUMNS=columns,
        CODE_ROWS=min(rows, 512 // columns),
        BS=store.codes.shape[2],
        BITS=bits,
        **tile,
        **options,
    )
    if not base and not len(store.spill_free):
        return  # stored without outliers: the thresholds are infinite
    _hand_out_chunks[(1,)](
        scratch, store.spill_top, error, R * H, BASE=base, PIECE=1024 if R * H <= 1024 else 4096, **options
    )
    _spill[(R, H)](
        keys,
        *limits,
        skip_bytes,
        runs,
        scratch,
        store.outlier_count,
        store.spill_head,
        store.spill_next,
        store.spill_index,
        store.spill_value,
        store.spill_free,
        **tile,
        **options,
    )
