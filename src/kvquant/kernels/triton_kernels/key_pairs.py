"""Codes of keys of a 16-bit type, two channels at a time, and marks of which are outliers.

A thread has sixteen channels of a head in all its rows: of each subfield the same few neighbours, so that it packs the
codes alone. It holds what they are compared with in pairs, rounded to the keys' own type in the direction that leaves
every comparison as it is; a launch before computes that once for all runs. Outliers are made NaN, which exceeds no
boundary and so has code 0.
"""

# Kernels take tensors of pointers and constants, which have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined, assignment, misc"
# Nor can tuples in them, which grow, be unpacked into others.
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvquant.kernels import ERROR_KEY_NOT_FINITE, KeyStore, LayerConstants
from kvquant.kernels.triton_kernels.codes import is_finite, report
from kvquant.kernels.triton_kernels.pairs import (
    above,
    bytes_of_halves,
    code_of_pair,
    counted,
    floor_bits,
    high_and_low,
    spoilt,
    weight_in_half,
)

_KEY_NOT_FINITE = tl.constexpr(ERROR_KEY_NOT_FINITE)
_THREAD = 16  # channels of a thread
_THREADS = 128  # of a program


@triton.jit
def _round_limits(
    lower,
    upper,
    zero,
    scale,
    midpoints,
    limits,
    C: tl.constexpr,
    PIECE: tl.constexpr,
    BITS: tl.constexpr,
    BF16: tl.constexpr,
):
    """The boundaries, the upper threshold and the negated lower one of all channels, rounded down: [2**BITS + 1, C]."""
    c = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    inside = c < C
    LEVELS: tl.constexpr = 1 << BITS
    z, s = tl.load(zero + c, mask=inside, other=0.0), tl.load(scale + c, mask=inside, other=0.0)
    m = tl.arange(0, LEVELS)
    b = s[None, :] * tl.load(midpoints + m, mask=m < LEVELS - 1, other=0.0)[:, None] + z[None, :]
    b = tl.where((m < LEVELS - 1)[:, None], b, tl.load(upper + c, mask=inside, other=0.0)[None, :])
    to = limits + m[:, None] * C + c[None, :]
    tl.store(to, floor_bits(b, BF16).to(tl.int16), mask=inside[None, :])
    low = -tl.load(lower + c, mask=inside, other=0.0)
    tl.store(limits + LEVELS * C + c, floor_bits(low, BF16).to(tl.int16), mask=inside)


@triton.jit
def _pairs_at(
    source, mask, S: tl.constexpr, V: tl.constexpr, U: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """The pairs of a tile, in a tuple: pair p of subfield u, of every thread, is the (u * V / 2 + p)-th, [ROWS, LANES]."""
    x = ()
    for u in tl.static_range(S):
        words = tl.load(source + u * (U // 2), mask=mask, other=0)
        if V == 8:
            even, odd = tl.split(tl.reshape(words, (ROWS, LANES, 2, 2)))
            p0, p2 = tl.split(even)
            p1, p3 = tl.split(odd)
            x = x + (p0, p1, p2, p3)
        elif V == 4:
            p0, p1 = tl.split(tl.reshape(words, (ROWS, LANES, 2)))
            x = x + (p0, p1)
        else:
            x = x + (words,)
    return x


@triton.jit
def _boundaries_of(limits, k: tl.constexpr, PAIRS: tl.constexpr, BITS: tl.constexpr):
    t = ()
    for m in tl.static_range((1 << BITS) - 1):
        t = t + (limits[m * PAIRS + k],)
    return t


@triton.jit
def _store_marks(
    halves,
    marks,
    live,
    S: tl.constexpr,
    V: tl.constexpr,
    U: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Store a bit for each channel; ``halves`` holds those of two subfields each, a byte a subfield."""
    SHARE: tl.constexpr = 8 // V  # threads whose marks make a byte
    byte = tl.arange(0, LANES // SHARE)[None, :]
    lane = tl.arange(0, LANES)[None, :]
    for k in tl.static_range((S + 3) // 4):
        word = (halves[2 * k] | (halves[2 * k] >> 16)) & 0xFFFF
        if S > 2:
            word = word | ((halves[2 * k + 1] | (halves[2 * k + 1] << 16)) & -65536)
        if SHARE > 1:
            word = word << (V * (lane % SHARE))
            word = tl.sum(tl.reshape(word, (ROWS, LANES // SHARE, SHARE)), 2)
        for u in tl.static_range(min(S, 4)):
            to = marks + (4 * k + u) * (U // 8) + byte
            tl.store(to, (word >> (8 * u)).to(tl.uint8), mask=live)


@triton.jit
def _codes_and_marks_of_pairs(
    keys,
    limits,
    skip,
    runs,
    codes,
    marks,
    outlier_count,
    scratch,
    error,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    V: tl.constexpr,
    BS: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    SKIP: tl.constexpr,
    MARKS: tl.constexpr,
):
    run, head = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = H * D
    U: tl.constexpr = D // S
    PAIRS: tl.constexpr = S * V // 2
    LEVELS: tl.constexpr = 1 << BITS
    ROW_BYTES: tl.constexpr = BITS // (BITS & -BITS) * U
    BF16: tl.constexpr = keys.dtype.element_ty == tl.bfloat16
    block = tl.load(runs + run * 4).to(tl.int64)
    first = tl.load(runs + run * 4 + 1).to(tl.int64)
    count = tl.load(runs + run * 4 + 2)
    first_slot = tl.load(runs + run * 4 + 3)
    r, w = tl.arange(0, ROWS)[:, None], tl.arange(0, LANES * V // 2)[None, :]
    # The same for all rows, and loaded as a tile is, so that each thread has them where it needs them.
    bounds = ()
    for m in tl.static_range(LEVELS + 1):
        at = (limits + m * C + head * D).to(tl.pointer_type(tl.int32)) + w + 0 * r
        bounds = bounds + _pairs_at(at, (w >= 0) & (r >= 0), S, V, U, ROWS, LANES)

    source = (keys + (first * C + head * D)).to(tl.pointer_type(tl.int32)) + r * (C // 2) + w
    to = codes + ((block * H + head) * BS + first_slot) * ROW_BYTES + r * ROW_BYTES
    to_marks = marks + (first * H + head) * (DP // 8) + r * (H * DP // 8)
    bad = tl.zeros((ROWS, LANES), tl.int32)
    found = tl.zeros((ROWS, LANES), tl.int32)
    for start in range(0, count, ROWS):
        live = start + r < count
        x = _pairs_at(source, live & (w >= 0), S, V, U, ROWS, LANES)
        for k in tl.static_range(PAIRS):
            bad = spoilt(x[k], bad, BF16)
        if SKIP:
            sink = tl.load(skip + first + start + r, mask=live, other=1) != 0
            x = _where_not(x, tl.where(sink, -1, 0), PAIRS)
        if MARKS:
            x, halves, number_out = _without_outliers(x, bounds, S, V, LEVELS, BF16)
            _store_marks(halves, to_marks, live, S, V, U, ROWS, LANES)
            found += tl.where(live, number_out, 0)
        _store_codes(x, bounds, to, live, S, V, U, BITS, ROWS, LANES, BF16)
        source += ROWS * (C // 2)
        to += ROWS * ROW_BYTES
        to_marks += ROWS * (H * DP // 8)

    if MARKS:
        at = run * H + head
        total = counted(found)
        tl.store(scratch + at, tl.sum(tl.sum((total & 0xFFFF) + (total >> 16), 1), 0))
        tl.store(scratch + tl.num_programs(0) * H + at, tl.load(outlier_count + block * H + head))
    if tl.max(tl.max(bad & 0x7FFF7FFF, 1), 0) != 0:
        _report(keys, first, count, head, error, H, D, DP, ROWS)


@triton.jit
def _where_not(x, mask, PAIRS: tl.constexpr):
    kept = ()
    for k in tl.static_range(PAIRS):
        kept = kept + (x[k] | mask,)
    return kept


@triton.jit
def _without_outliers(x, bounds, S: tl.constexpr, V: tl.constexpr, LEVELS: tl.constexpr, BF16: tl.constexpr):
    """The pairs with NaN for outliers, marks of those, two subfields' in a number, and a sum of masks that counts them."""
    PAIRS: tl.constexpr = S * V // 2
    kept, halves, total = (), (), x[0] ^ x[0]
    for u in tl.static_range(S):
        if u % 2 == 0:
            half = x[0] ^ x[0]
        for p in tl.static_range(V // 2):
            pair = x[u * V // 2 + p]
            upper, lower = (
                bounds[(LEVELS - 1) * PAIRS + u * V // 2 + p],
                bounds[LEVELS * PAIRS + u * V // 2 + p],
            )
            out = above(pair, upper, BF16) | above(pair ^ -0x7FFF8000, lower, BF16)
            half = half | (out & weight_in_half(u, p))
            total += out
            kept = kept + (pair | out,)
        if u % 2 == 1 or u == S - 1:
            halves = halves + (half,)
    return kept, halves, total


@triton.jit
def _store_codes(
    x,
    bounds,
    to,
    mask,
    S: tl.constexpr,
    V: tl.constexpr,
    U: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    BF16: tl.constexpr,
):
    """Pack the codes of a tile and store them."""
    PAIRS: tl.constexpr = S * V // 2
    pairs = ()
    for p in tl.static_range(V // 2):
        # Sums of masks, each a byte of a run once counted: at 3 bits two runs of low bits and one of high ones.
        runs = (x[0] ^ x[0], x[0] ^ x[0], x[0] ^ x[0])
        for u in tl.static_range(S):
            t = _boundaries_of(bounds, u * V // 2 + p, PAIRS, BITS)
            if BITS == 3:
                high, low = high_and_low(x[u * V // 2 + p], t, BF16)
                if u % 2 == 0:
                    runs = (runs[0] + low * (1 << u), runs[1], runs[2] + high * (1 << u))
                else:
                    runs = (runs[0], runs[1] + low * (1 << (u - 1)), runs[2] + high * (1 << u))
            else:
                code = code_of_pair(x[u * V // 2 + p], t, BITS, BF16)
                runs = (runs[0] + code * (1 << (BITS * u)), runs[1], runs[2])
        pairs = pairs + (runs,)
    j = V * tl.arange(0, LANES)[None, :]
    if V == 2:
        if BITS == 3:
            both = bytes_of_halves(counted(pairs[0][0] + pairs[0][1] * 256))
            tl.store((to + j).to(tl.pointer_type(tl.int16)), both.to(tl.int16), mask=mask)
            tl.store((to + U + j).to(tl.pointer_type(tl.int16)), (both >> 16).to(tl.int16), mask=mask)
            one = bytes_of_halves(counted(pairs[0][2]))
            tl.store((to + 2 * U + j).to(tl.pointer_type(tl.int16)), one.to(tl.int16), mask=mask)
        else:
            one = bytes_of_halves(counted(pairs[0][0]))
            tl.store((to + j).to(tl.pointer_type(tl.int16)), one.to(tl.int16), mask=mask)
    elif V == 4:
        four = bytes_of_halves(counted(pairs[0][0] + pairs[1][0] * 256))
        tl.store((to + j).to(tl.pointer_type(tl.int32)), four, mask=mask)
    else:
        four = bytes_of_halves(counted(pairs[0][0] + pairs[1][0] * 256))
        next_four = bytes_of_halves(counted(pairs[2][0] + pairs[3][0] * 256))
        tl.store((to + j).to(tl.pointer_type(tl.int32)), four, mask=mask)
        tl.store((to + j + 4).to(tl.pointer_type(tl.int32)), next_four, mask=mask)


@triton.jit
def _report(
    keys, first, count, head, error, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr
):
    """Name the first key of a run that is not finite."""
    r, d = tl.arange(0, ROWS)[:, None], tl.arange(0, DP)[None, :]
    nearest = count * D
    for start in range(0, count, ROWS):
        there = (start + r < count) & (d < D)
        x = tl.load(keys + (first + start + r) * (H * D) + head * D + d, mask=there, other=0.0)
        place = tl.where(is_finite(x), count * D, (start + r) * D + d)
        nearest = tl.minimum(nearest, tl.min(tl.min(place, 1), 0))
    report(error, _KEY_NOT_FINITE, tl.where(nearest < count * D, head * D + nearest % D, H * D), H * D)


def takes(keys: Tensor, store: KeyStore, bits: int) -> bool:
    """Whether :func:`codes_and_marks` can encode keys: 16 bits, stored as they are, heads of powers of two, whole pairs."""
    D = keys.shape[2]
    return (
        keys.dtype in (torch.float16, torch.bfloat16)
        and keys.dtype == store.outlier_value.dtype
        and bits <= 4
        and D & (D - 1) == 0
        and 4 * _THREAD <= D <= _THREADS * _THREAD
        and keys.data_ptr() % 4 == 0
    )


def codes_and_marks(
    keys: Tensor,
    store: KeyStore,
    constants: LayerConstants,
    skip: Tensor | None,
    skip_bytes: Tensor,
    runs: Tensor,
    marks: Tensor,
    scratch: Tensor,
    error: Tensor,
    *,
    bits: int,
) -> None:
    """Store the codes of contiguous keys [T, H, D] that :func:`takes` accepts, and mark and count outliers.

    Args:
        keys: [T, H, D].
        store: the layer's keys in the pool.
        constants: thresholds and midpoints of the layer.
        skip: sink tokens, bool [T], or None.
        skip_bytes: the same as bytes, or anything.
        runs: where the tokens go, int32 [R, 4].
        marks: a bit per channel, uint8 [T, H, DP / 8], DP the next power of two; empty where nothing is an outlier.
        scratch: counts of each (run, head) and what was there before, int32 [2 * R * H] and more.
        error: the pool's error word.
        bits: width of a code.
    """
    _, H, D = keys.shape
    S = 8 // (bits & -bits)
    limits = torch.empty((1 << bits) + 1, H * D, dtype=torch.int16, device=keys.device)
    _round_limits[(triton.cdiv(H * D, 128),)](
        constants.key_lower,
        constants.key_upper,
        constants.key_zero,
        constants.key_scale,
        constants.key_midpoints,
        limits,
        C=H * D,
        PIECE=128,
        BITS=bits,
        BF16=keys.dtype == torch.bfloat16,
        num_warps=4,
        enable_fp_fusion=False,
    )
    lanes = D // _THREAD
    _codes_and_marks_of_pairs[(len(runs), H)](
        keys,
        limits,
        skip_bytes,
        runs,
        store.codes,
        marks,
        store.outlier_count,
        scratch,
        error,
        H=H,
        D=D,
        DP=triton.next_power_of_2(D),
        S=S,
        V=_THREAD // S,
        BS=store.codes.shape[2],
        BITS=bits,
        ROWS=_THREADS // lanes,
        LANES=lanes,
        SKIP=skip is not None,
        MARKS=marks.numel() > 0,
        num_warps=4,
        enable_fp_fusion=False,
    )
