"""Ranges, outliers and codes of values of any type and shape, one channel at a time: a program per token and value group.

The n-th largest of the maxima of small groups of channels is at most the n-th largest channel, and nearly it: bisection
over the maxima finds it. Mostly exactly 2n channels then lie at or beyond the two bounds; if not, a few steps from each
value to the next and a search among ties do the rest. Then the program, which still holds the token, encodes it.
"""

# Kernels take tensors of pointers and constants, which have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels import ERROR_VALUE_NOT_FINITE
from kvquant.kernels.triton_kernels.codes import (
    boundaries,
    count_codes,
    is_finite,
    mask_of_eight,
    number_of_bit,
    report,
    store_rows,
)

_VALUE_NOT_FINITE = tl.constexpr(ERROR_VALUE_NOT_FINITE)
_LEAST, _MOST = tl.constexpr(-(1 << 31)), tl.constexpr((1 << 31) - 1)


@triton.jit
def _ordered(x, UNUSED: tl.constexpr):
    """Numbers as int32 of the same order, both zeros 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & _MOST)) >> UNUSED


@triton.jit
def _unordered(o, UNUSED: tl.constexpr):
    bits = o << UNUSED
    # The low bits of a negative number, all 0, were turned to 1.
    return tl.where(o < 0, (bits | ((1 << UNUSED) - 1)) ^ _MOST, bits).to(tl.float32, bitcast=True)


@triton.jit
def _ceil_average(a, b):
    return (a | b) - ((a ^ b) >> 1)  # no overflow between the ends of int32


@triton.jit
def _reached(high, high_bound, low, low_bound, WIDE: tl.constexpr):
    """How many of ``high`` and of ``low`` reach their bounds: two counts in one sum."""
    if WIDE:
        both = tl.sum((high >= high_bound).to(tl.int64) + ((low >= low_bound).to(tl.int64) << 32), 0)
        return (both & _MOST).to(tl.int32), (both >> 32).to(tl.int32)
    else:
        both = tl.sum((high >= high_bound).to(tl.int32) + ((low >= low_bound).to(tl.int32) << 16), 0)
        return both & 0xFFFF, both >> 16


@triton.jit
def _nth_largest_bounds(
    x, there, inside, N: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, UNUSED: tl.constexpr
):  # fmt: skip
    """The N-th largest of the group maxima of ``x`` [P], and the N-th smallest of the minima, by bisecting both at once."""
    GROUPS: tl.constexpr = P // GROUP
    high = tl.max(tl.reshape(tl.where(there, x, -float("inf")), (GROUPS, GROUP)), 1)
    low = tl.min(tl.reshape(tl.where(there, x, float("inf")), (GROUPS, GROUP)), 1)
    high, low = _ordered(high, UNUSED), -_ordered(low, UNUSED)
    high_from, high_to = tl.min(tl.where(inside, high, _MOST), 0), tl.max(tl.where(inside, high, _LEAST), 0)
    low_from, low_to = tl.min(tl.where(inside, low, _MOST), 0), tl.max(tl.where(inside, low, _LEAST), 0)
    high, low = tl.where(inside, high, _LEAST), tl.where(inside, low, _LEAST)
    while (high_from < high_to) | (low_from < low_to):
        high_mid, low_mid = _ceil_average(high_from, high_to), _ceil_average(low_from, low_to)
        high_reached, low_reached = _reached(high, high_mid, low, low_mid, GROUPS > 16384)
        high_enough, low_enough = high_reached >= N, low_reached >= N
        high_from = tl.where(high_enough, high_mid, high_from)
        high_to = tl.where(high_enough, high_to, high_mid - 1)
        low_from = tl.where(low_enough, low_mid, low_from)
        low_to = tl.where(low_enough, low_to, low_mid - 1)
    return _unordered(high_from, UNUSED), _unordered(-low_from, UNUSED)


@triton.jit
def _ends(x, there, high, low, N: tl.constexpr):
    """The N-th largest and smallest of ``x``, from bounds that N elements reach, and how many elements lie beyond each."""
    largest = tl.where(there, x, -float("inf"))
    smallest = tl.where(there, x, float("inf"))
    above = tl.sum((largest > high).to(tl.int32), 0)
    while above >= N:
        high = tl.min(tl.where(largest > high, x, float("inf")), 0)
        above = tl.sum((largest > high).to(tl.int32), 0)
    below = tl.sum((smallest < low).to(tl.int32), 0)
    while below >= N:
        low = tl.max(tl.where(smallest < low, x, -float("inf")), 0)
        below = tl.sum((smallest < low).to(tl.int32), 0)
    return high, above, low, below


@triton.jit
def _tie_bounds(c, at_high, wanted_high, at_low, wanted_low, P: tl.constexpr):
    """The first channel of the last ``wanted_high`` ties at the high end, and the last of the first ``wanted_low`` at the low.

    Where all ties are wanted, the bounds are 0 and P and nothing is searched.
    """
    surplus_high = tl.sum(at_high.to(tl.int32), 0) > wanted_high
    surplus_low = tl.sum(at_low.to(tl.int32), 0) > wanted_low
    first, first_most = tl.where(surplus_high, 1, 0), tl.where(surplus_high, P, 0)
    while first < first_most:
        middle = (first + first_most) // 2
        few = tl.sum((at_high & (c >= middle)).to(tl.int32), 0) <= wanted_high
        first = tl.where(few, first, middle + 1)
        first_most = tl.where(few, middle, first_most)
    last, last_most = tl.where(surplus_low, -1, P), tl.where(surplus_low, P - 1, P)
    while last < last_most:
        middle = (last + last_most + 1) // 2
        few = tl.sum((at_low & (c <= middle)).to(tl.int32), 0) <= wanted_low
        last = tl.where(few, middle, last)
        last_most = tl.where(few, last_most, middle - 1)
    return first, last


@triton.jit
def _range(x, rest):
    """The least and the most of ``x`` where ``rest``. Like the twin's, a zero that bounds the range is never negative."""
    lowest = tl.min(tl.where(rest, x, float("inf")), 0) + 0.0
    return lowest, tl.max(tl.where(rest, x, float("-inf")), 0) + 0.0


@triton.jit
def _channel(i, HEADS: tl.constexpr, D: tl.constexpr, U: tl.constexpr, UP: tl.constexpr):
    """Channel of element ``i`` of a token whose heads, and subfields in them, are padded; and whether it is one.

    Where the first of a few neighbours is none, all are none.
    """
    if UP == U and (HEADS & (HEADS - 1)) == 0:
        return i, tl.full(i.shape, True, tl.int1)
    else:
        head, u, j = i // (D // U * UP), i // UP % (D // U), i % UP
        return head * D + u * U + j, (head < HEADS) & (j < U)


@triton.jit
def ranges_and_outliers(
    values,
    skip,
    slot_block,
    slot_offset,
    zero,
    scale,
    outlier_index,
    outlier_value,
    ends,
    error,
    midpoints,
    codes,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    UP: tl.constexpr,
    P: tl.constexpr,
    BS: tl.constexpr,
    VG: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    UNUSED: tl.constexpr,
    BITS: tl.constexpr,
    SKIP: tl.constexpr,
    ENCODE: tl.constexpr,
):
    """Store a token's range and outliers, and its codes if ``ENCODE``; else what tells outliers from others, [T, VG, 4]."""
    CHANNELS: tl.constexpr = HEADS * D
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, there = _channel(tl.arange(0, P), HEADS, D, U, UP)
    x = tl.load(values + (token * VG + group) * CHANNELS + c, mask=there, other=0.0).to(tl.float32)
    block, slot = tl.load(slot_block + token), tl.load(slot_offset + token)
    at = block * BS + slot
    stored = True
    if SKIP:
        stored = tl.load(skip + token) == 0
    if N == 0:
        lowest, highest = _range(x, there)
    else:
        _first, inside = _channel(tl.arange(0, P // GROUP) * GROUP, HEADS, D, U, UP)
        high, low = _nth_largest_bounds(x, there, inside, N, P, GROUP, UNUSED)
        # Mostly the bounds are the ends themselves, and nothing else equals them. Else the ends are found from there, and
        # ties go to the highest channels at the high end, to the lowest at the low end.
        outlier = there & ((x >= high) | (x <= low))
        packed = mask_of_eight(outlier, (P // 8, 8))
        found = tl.sum(packed >> 16, 0)
        high_from = found - found
        low_until = high_from + P
        # What leaves the branches are few numbers and no masks, which would take a register an element.
        if found == 2 * N:
            lowest, highest = _range(x, there & (outlier == 0))
        else:
            high, above, low, below = _ends(x, there, high, low, N)
            at_high, at_low = there & (x == high), there & (x == low)
            high_from, low_until = _tie_bounds(c, at_high, N - above, at_low, N - below, P)
            outlier = there & ((x > high) | (x < low))
            outlier = outlier | (at_high & (c >= high_from)) | (at_low & (c <= low_until))
            packed = mask_of_eight(outlier, (P // 8, 8))
            lowest, highest = _range(x, there & (outlier == 0))
        outlier = tl.reshape((packed[:, None] & (1 << tl.arange(0, 8))[None, :]) != 0, (P,))
        count = packed >> 16
        left, k = packed & 255, tl.cumsum(count, 0) - count
        c8 = tl.arange(0, P // 8) * 8
        for _one in range(tl.max(count, 0)):
            channel, _there = _channel(c8 + number_of_bit(left & -left), HEADS, D, U, UP)
            # NaN has no place in the order; it must not leave the row
            chosen = (left > 0) & (k < 2 * N)
            one = tl.load(values + (token * VG + group) * CHANNELS + channel, mask=chosen, other=0.0)
            kept = one.to(tl.float32).to(outlier_value.dtype.element_ty)
            to = (at * VG + group) * (2 * N) + k
            tl.store(outlier_index + to, (group * CHANNELS + channel).to(tl.int16), mask=chosen)
            tl.store(outlier_value + to, kept, mask=chosen)
            k += 1
            left &= left - 1
        if not ENCODE:
            # What the second launch needs to know an outlier by; channels are exact in fp32.
            mine = ends + (token * VG + group) * 4
            tl.store(mine, low)
            tl.store(mine + 1, high)
            tl.store(mine + 2, low_until.to(tl.float32))
            tl.store(mine + 3, high_from.to(tl.float32))
    centre = ((highest + lowest) * 0.5).to(zero.dtype.element_ty)
    half = ((highest - lowest) * 0.5).to(zero.dtype.element_ty)
    tl.store(zero + at * VG + group, centre)
    tl.store(scale + at * VG + group, half)
    if ENCODE:
        z, s = centre.to(tl.float32), half.to(tl.float32)
        code = count_codes(x, boundaries(z, s, midpoints, BITS), z, s, midpoints, BITS)
        if N > 0:
            code = tl.where(outlier, 0, code)
        if SKIP:
            code = tl.where(stored, code, 0)
        STRIDE: tl.constexpr = BS * (BITS // (BITS & -BITS) * U)
        row = codes + (block * H + group * HEADS) * STRIDE + slot * (STRIDE // BS)
        store_rows(code, row, STRIDE, HEADS, P // (D // U * UP), U, UP, D // U, BITS)
    # Numbers that are not finite are rare: their channels are looked for only where there is one, or where outliers are
    # stored in a narrower type that they may overflow.
    worst = tl.max(tl.where(there, x.to(tl.int32, bitcast=True) & _MOST, 0), 0)
    bad_channel = worst - worst + P
    if (worst >= 0x7F800000) | (values.dtype.element_ty != zero.dtype.element_ty):
        bad = there & (is_finite(x) == 0)
        if N > 0:
            bad = bad | (outlier & (is_finite(x.to(outlier_value.dtype.element_ty)) == 0) & stored)
        bad_channel = tl.min(tl.where(bad, c, P), 0)
    if N == 0:
        # Without outliers the range must fit the 16-bit storage; with them, an outlier overflows first.
        size = tl.where(there, tl.abs(x), -1.0)
        widest = tl.min(tl.where(size == tl.max(size, 0), c, P), 0)
        overflows = ((is_finite(centre) & is_finite(half)) == 0) & stored
        bad_channel = tl.where((bad_channel == P) & overflows, widest, bad_channel)
    report(
        error,
        _VALUE_NOT_FINITE,
        tl.where(bad_channel < P, group * CHANNELS + bad_channel, VG * CHANNELS),
        VG * CHANNELS,
    )
