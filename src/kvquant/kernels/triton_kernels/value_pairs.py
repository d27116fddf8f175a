"""Quantizing and storing values of a 16-bit type, two channels at a time: a warp for a token of 1,024 channels.

A thread holds eight neighbouring channels of every 256, in pairs that one instruction compares. Bisection over the
largest of each four channels, and the smallest, both ends in one register, finds bounds that n of them reach. Mostly
exactly 2n channels then lie at or beyond the bounds; if not, the ends are found from there in a few steps. Outliers
are one mask of 32 bits a thread; in what is encoded they are NaN, which exceeds no boundary and so has code 0.
"""

# Kernels take tensors of pointers and constants, which have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined, assignment"
# Nor can tuples in them, which grow, be unpacked into others.
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvquant.kernels import ERROR_VALUE_NOT_FINITE, LayerConstants, ValueStore
from kvquant.kernels.triton_kernels.codes import is_finite, report, store_planes
from kvquant.kernels.triton_kernels.pairs import (
    above,
    bytes_of_halves,
    counted,
    first,
    half_way,
    joined,
    larger,
    number,
    order,
    reaches,
    second,
    select,
    smaller,
    spoilt,
    spread,
    top_bits,
    twice,
)

_VALUE_NOT_FINITE = tl.constexpr(ERROR_VALUE_NOT_FINITE)
_SIGNS = tl.constexpr(-0x7FFF8000)  # the sign bits of a pair
_WARP = 1024  # channels of a warp
_THREAD = 8  # neighbouring channels of a thread


@triton.jit
def _load(values, LANES: tl.constexpr, REPS: tl.constexpr):
    """The pairs of a token, in tuples: pair p of repetition r, of every thread, is the (4 * r + p)-th."""
    x = ()
    for r in tl.static_range(REPS):
        words = tl.load(values.to(tl.pointer_type(tl.int32)) + r * LANES * 4 + tl.arange(0, LANES * 4))
        even, odd = tl.split(tl.reshape(words, (LANES, 2, 2)))
        p0, p2 = tl.split(even)
        p1, p3 = tl.split(odd)
        x = x + (p0, p1, p2, p3)
    return x


@triton.jit
def _groups(x, REPS: tl.constexpr, BF16: tl.constexpr):
    """Pairs of the largest of four channels and of the negated smallest."""
    groups = ()
    for r in tl.static_range(REPS):
        high = larger(larger(x[4 * r], x[4 * r + 1], BF16), larger(x[4 * r + 2], x[4 * r + 3], BF16), BF16)
        low = smaller(smaller(x[4 * r], x[4 * r + 1], BF16), smaller(x[4 * r + 2], x[4 * r + 3], BF16), BF16)
        low = low ^ _SIGNS
        groups = groups + (joined(high, low), joined(high >> 16, low >> 16))
    return groups


@triton.jit
def _bounds(groups, N: tl.constexpr, LANES: tl.constexpr, REPS: tl.constexpr, BF16: tl.constexpr):
    """A pair: a bound that N of the groups' first numbers reach, mostly no more, and the same of their second."""
    most, least = groups[0], groups[0]
    for g in tl.static_range(1, 2 * REPS):
        most, least = larger(most, groups[g], BF16), smaller(least, groups[g], BF16)
    if N <= LANES:
        least = most  # each thread has one that reaches the least of the threads' largest
    until = joined(order(tl.max(order(first(most)), 0)), order(tl.max(order(second(most)), 0)))
    reached = joined(order(tl.min(order(first(least)), 0)), order(tl.min(order(second(least)), 0)))
    wanted = reached - reached + N * 0x10001
    count = wanted + 0x10001
    middle = half_way(reached, until, BF16)
    while (above(middle, reached, BF16) & above(until, middle, BF16) & above(count, wanted, BF16)) != 0:
        total = reaches(groups[0], middle, BF16)
        for g in tl.static_range(1, 2 * REPS):
            total += reaches(groups[g], middle, BF16)
        total = tl.sum(counted(total), 0)
        # The sign bit of each half: whether enough reach.
        enough = total + (0x8000 - N) * 0x10001
        enough = top_bits(enough)
        reached, until = select(enough, middle, reached), select(enough, until, middle)
        count = select(enough, total, count)
        middle = half_way(reached, until, BF16)
    return reached


@triton.jit
def _weight(r: tl.constexpr, p: tl.constexpr):
    """The bits of pair p of repetition r in half a thread's mask, the second channel's in the upper half."""
    WEIGHT: tl.constexpr = (1 << (8 * (r % 2) + 2 * p)) | (1 << (16 + 8 * (r % 2) + 2 * p + 1))
    return tl.constexpr(WEIGHT - (1 << 32) if WEIGHT >= 1 << 31 else WEIGHT)


@triton.jit
def _mask(halves, REPS: tl.constexpr):
    mask = (halves[0] | (halves[0] >> 16)) & 0xFFFF
    if REPS > 2:
        mask = mask | ((halves[1] | (halves[1] << 16)) & -65536)
    return mask


@triton.jit
def _beyond(x, high, low, REPS: tl.constexpr, BF16: tl.constexpr):
    """Mask of a thread's channels at or beyond two bounds, a byte a repetition; and the extremes of the others."""
    halves, zero = (), x[0] ^ x[0]
    most, least = zero + _order_end(True, BF16), zero + _order_end(False, BF16)
    for r in tl.static_range(REPS):
        if r % 2 == 0:
            mask = zero
        for p in tl.static_range(4):
            pair = x[4 * r + p]
            out = reaches(pair, high, BF16) | reaches(low, pair, BF16)
            mask = mask | (out & _weight(r, p))
            # NaN is neither the larger nor the smaller of two.
            most, least = larger(most, pair | out, BF16), smaller(least, pair | out, BF16)
        if r % 2 == 1 or r == REPS - 1:
            halves = halves + (mask,)
    return _mask(halves, REPS), most, least


@triton.jit
def _equal(x, number, REPS: tl.constexpr, BF16: tl.constexpr):
    """Mask, like that of :func:`_beyond`, of the channels that equal a pair of one number."""
    halves, zero = (), x[0] ^ x[0]
    for r in tl.static_range(REPS):
        if r % 2 == 0:
            mask = zero
        for p in tl.static_range(4):
            pair = x[4 * r + p]
            mask = mask | (reaches(pair, number, BF16) & reaches(number, pair, BF16) & _weight(r, p))
        if r % 2 == 1 or r == REPS - 1:
            halves = halves + (mask,)
    return _mask(halves, REPS)


@triton.jit
def _order_end(LEAST: tl.constexpr, BF16: tl.constexpr):
    """A pair of infinities: the negative, which is the least of the order, or the positive."""
    if BF16:
        return tl.constexpr(-0x7F0080 if LEAST else 0x7F807F80)
    else:
        return tl.constexpr(-0x3FF0400 if LEAST else 0x7C007C00)


@triton.jit
def _count_beyond(x, bound, HIGH: tl.constexpr, REPS: tl.constexpr, BF16: tl.constexpr):
    """How many channels are above (below) a pair of one number."""
    total = x[0] ^ x[0]
    for i in tl.static_range(4 * REPS):
        total += above(x[i], bound, BF16) if HIGH else above(bound, x[i], BF16)
    total = counted(total)
    return tl.sum((total & 0xFFFF) + (total >> 16), 0)


@triton.jit
def _end(x, bound, N: tl.constexpr, HIGH: tl.constexpr, REPS: tl.constexpr, BF16: tl.constexpr):
    """The N-th largest (smallest) channel as a pair, from a bound that N reach, and how many exceed it."""
    beyond = _count_beyond(x, bound, HIGH, REPS, BF16)
    while beyond >= N:
        nearest = (x[0] ^ x[0]) + _order_end(not HIGH, BF16)
        for i in tl.static_range(4 * REPS):
            if HIGH:
                nearest = smaller(nearest, x[i] | ~above(x[i], bound, BF16), BF16)
            else:
                nearest = larger(nearest, x[i] | ~above(bound, x[i], BF16), BF16)
        bound = twice(order(_extreme(nearest, not HIGH)))
        beyond = _count_beyond(x, bound, HIGH, REPS, BF16)
    return bound, beyond


@triton.jit
def _extreme(pair, LARGEST: tl.constexpr):
    """The largest (smallest) of all threads' pairs, as an int of the order."""
    if LARGEST:
        return tl.max(tl.maximum(order(first(pair)), order(second(pair))), 0)
    else:
        return tl.min(tl.minimum(order(first(pair)), order(second(pair))), 0)


@triton.jit
def _bit(mask):
    """Number of the only bit set, or of the highest of few: the exponent of the mask as a number."""
    return (mask.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _channel(bit, LANES: tl.constexpr):
    return (bit >> 3) * (LANES * 8) + tl.arange(0, LANES) * 8 + (bit & 7)


@triton.jit
def _add_ties(mask, ties, count, HIGHEST: tl.constexpr, LANES: tl.constexpr):
    """Add the ``count`` highest (lowest) channels of a mask to another."""
    for _one in range(count):
        if HIGHEST:
            # Without the bit below the top, rounding does not reach the next power of two.
            bit = _bit(ties & ~((ties >> 1) & 0x7FFFFFFF))
            channel = tl.where(ties != 0, _channel(bit, LANES), -1)
            chosen = channel == tl.max(channel, 0)
        else:
            bit = _bit(ties & -ties)
            channel = tl.where(ties != 0, _channel(bit, LANES), 1 << 30)
            chosen = channel == tl.min(channel, 0)
        chosen = tl.where(chosen & (ties != 0), 1 << (bit & 31), 0)
        mask, ties = mask | chosen, ties & ~chosen
    return mask


@triton.jit
def _bits_of_bytes(mask):
    """How many bits each byte has, in the bytes."""
    mask = mask - ((mask >> 1) & 0x55555555)
    mask = (mask & 0x33333333) + ((mask >> 2) & 0x33333333)
    return (mask + (mask >> 4)) & 0x0F0F0F0F


@triton.jit
def _sum_of_bytes(count):
    return (count * 0x01010101) >> 24


@triton.jit
def _outliers(x, N: tl.constexpr, LANES: tl.constexpr, REPS: tl.constexpr, BF16: tl.constexpr):
    """A thread's mask of outliers, and the pairs' extremes of the others."""
    bounds = _bounds(_groups(x, REPS, BF16), N, LANES, REPS, BF16)
    high, low = twice(bounds), twice((bounds ^ _SIGNS) >> 16)
    mask, most, least = _beyond(x, high, low, REPS, BF16)
    highest, lowest = _extreme(most, True), _extreme(least, False)
    found = tl.sum(_sum_of_bytes(_bits_of_bytes(mask)), 0)
    if found != 2 * N:
        high, above_high = _end(x, high, N, True, REPS, BF16)
        low, below_low = _end(x, low, N, False, REPS, BF16)
        mask, most, least = _beyond(x, high, low, REPS, BF16)
        highest, lowest = _extreme(most, True), _extreme(least, False)
        at_high, at_low = _equal(x, high, REPS, BF16), _equal(x, low, REPS, BF16)
        ties_high = tl.sum(_sum_of_bytes(_bits_of_bytes(at_high)), 0)
        ties_low = tl.sum(_sum_of_bytes(_bits_of_bytes(at_low)), 0)
        # Ties that are no outliers bound the range. Outliers are the highest at the high end, the lowest at the low.
        mask = mask & ~(at_high | at_low)
        mask = _add_ties(mask, at_high, tl.minimum(N - above_high, ties_high), True, LANES)
        mask = _add_ties(mask, at_low, tl.minimum(N - below_low, ties_low), False, LANES)
        highest = tl.where(above_high + ties_high > N, order(first(high)), highest)
        lowest = tl.where(below_low + ties_low > N, order(first(low)), lowest)
    return mask, order(highest), order(lowest)


@triton.jit
def _thresholds(zero, scale, stored, midpoints, BITS: tl.constexpr, BF16: tl.constexpr):
    """Pairs of the largest number that does not exceed each boundary, in a tuple; NaN if not ``stored``."""
    LEVELS: tl.constexpr = 1 << BITS
    i = tl.arange(0, LEVELS)
    b = scale * tl.load(midpoints + i, mask=i < LEVELS - 1, other=0.0) + zero
    if BF16:
        bits = b.to(tl.int32, bitcast=True)
        bits = (bits + ((bits >> 31) & 0xFFFF)) >> 16
    else:
        near = b.to(tl.float16)
        bits = order(near.to(tl.int16, bitcast=True).to(tl.int32))
        bits = order(tl.where(near.to(tl.float32) > b, bits - 1, bits))
    parts = (twice(tl.where(stored, bits, 0x7FFF)),)
    for level in tl.static_range(BITS):
        halved = ()
        for k in tl.static_range(1 << level):
            part = tl.permute(tl.reshape(parts[k], (2, LEVELS >> (level + 1))), (1, 0))
            lower, upper = tl.split(part)
            halved = halved + (lower, upper)
        parts = halved
    return parts


@triton.jit
def _half_of(upper, t, LEFT: tl.constexpr):
    """The upper or the lower 2**LEFT - 1 thresholds."""
    chosen = ()
    for k in tl.static_range((1 << LEFT) - 1):
        chosen = chosen + (select(upper, t[(1 << LEFT) + k], t[k]),)
    return chosen


@triton.jit
def _code(x, t, BITS: tl.constexpr, BF16: tl.constexpr):
    """Minus the sum of masks that :func:`counted` makes the codes of a pair."""
    upper = above(x, t[(1 << (BITS - 1)) - 1], BF16)
    code = upper
    for level in tl.static_range(1, BITS):
        t = _half_of(upper, t, BITS - level)
        upper = above(x, t[(1 << (BITS - 1 - level)) - 1], BF16)
        code = code * 2 + upper
    return code


@triton.jit
def _report(values, error, base, range_bad, CHANNELS: tl.constexpr, TOTAL: tl.constexpr, N: tl.constexpr):
    """Name the first channel that is not finite or, without outliers, the widest of a range that is not."""
    c = tl.arange(0, CHANNELS)
    size = tl.abs(tl.load(values + c).to(tl.float32))
    channel = tl.min(tl.where(is_finite(size) == 0, c, CHANNELS), 0)
    if N == 0:
        widest = tl.min(tl.where(size == tl.max(size, 0), c, CHANNELS), 0)
        channel = tl.where((channel == CHANNELS) & range_bad, widest, channel)
    report(error, _VALUE_NOT_FINITE, tl.where(channel < CHANNELS, base + channel, TOTAL), TOTAL)


@triton.jit
def _quantize(
    values,
    skip,
    slot_block,
    slot_offset,
    zero,
    scale,
    outlier_index,
    outlier_value,
    error,
    midpoints,
    codes,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    BS: tl.constexpr,
    VG: tl.constexpr,
    N: tl.constexpr,
    LANES: tl.constexpr,
    REPS: tl.constexpr,
    BITS: tl.constexpr,
    SKIP: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * D
    BF16: tl.constexpr = values.dtype.element_ty == tl.bfloat16
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    values += (token * VG + group) * CHANNELS
    x = _load(values, LANES, REPS)
    block, slot = tl.load(slot_block + token), tl.load(slot_offset + token)
    at = (block * BS + slot) * VG + group
    stored = True
    if SKIP:
        stored = tl.load(skip + token) == 0
    bad = x[0] ^ x[0]
    for i in tl.static_range(4 * REPS):
        bad = spoilt(x[i], bad, BF16)
    bad = tl.max((bad & 0x7FFF7FFF), 0) != 0
    if N > 0:
        mask, highest, lowest = _outliers(x, N, LANES, REPS, BF16)
        _store_outliers(
            values,
            mask,
            group,
            outlier_index + at * (2 * N),
            outlier_value + at * (2 * N),
            CHANNELS,
            N,
            LANES,
        )
    else:
        most, least = x[0], x[0]
        for i in tl.static_range(1, 4 * REPS):
            most, least = larger(most, x[i], BF16), smaller(least, x[i], BF16)
        highest, lowest = order(_extreme(most, True)), order(_extreme(least, False))
    # A zero that bounds the range is never negative.
    high, low = number(highest, BF16) + 0.0, number(lowest, BF16) + 0.0
    centre = ((high + low) * 0.5).to(zero.dtype.element_ty)
    half = ((high - low) * 0.5).to(zero.dtype.element_ty)
    tl.store(zero + at, centre)
    tl.store(scale + at, half)
    range_bad = False
    if N == 0:
        range_bad = ((is_finite(centre) & is_finite(half)) == 0) & stored
    if bad | range_bad:
        _report(values, error, group * CHANNELS, range_bad, CHANNELS, VG * CHANNELS, N)

    t = _thresholds(centre.to(tl.float32), half.to(tl.float32), stored, midpoints, BITS, BF16)
    STRIDE: tl.constexpr = BS * (BITS // (BITS & -BITS) * U)
    HPR: tl.constexpr = LANES * 8 // D
    row = codes + (block * H + group * HEADS) * STRIDE + slot * (STRIDE // BS)
    for r in tl.static_range(REPS):
        words = ()
        for half_of_eight in tl.static_range(2):
            code = ()
            for p in tl.static_range(2 * half_of_eight, 2 * half_of_eight + 2):
                pair = x[4 * r + p]
                if N > 0:
                    pair = pair | spread(mask << (7 - 2 * p), mask << (6 - 2 * p), r)
                code = code + (_code(pair, t, BITS, BF16),)
            words = words + (bytes_of_halves(counted(code[0] + code[1] * 256)),)
        eight = tl.reshape(tl.join(words[0], words[1]), (LANES * 2,))
        store_planes(eight, row + r * HPR * STRIDE, STRIDE, HPR, HPR, U, U, D // U, 4, BITS)


@triton.jit
def _store_outliers(
    values, mask, group, index, value, CHANNELS: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr
):
    """Store the outliers of a token in the order of channels."""
    count = _bits_of_bytes(mask)
    # Four numbers below 256, whose sums keep to their bytes; a token's channels run through one byte, then the next.
    total = tl.sum(count, 0) * 0x01010100
    k = tl.cumsum(count, 0) - count + total
    for _one in range(tl.max(_sum_of_bytes(count), 0)):
        bit = _bit(mask & -mask)
        entry = (k >> (bit & 24)) & 255
        channel = _channel(bit, LANES)
        # NaN has no place in the order; it must not leave the row.
        chosen = (mask != 0) & (entry < 2 * N)
        kept = tl.load(values + channel, mask=chosen, other=0.0)
        tl.store(index + entry, (group * CHANNELS + channel).to(tl.int16), mask=chosen)
        tl.store(value + entry, kept, mask=chosen)
        k += 1 << (bit & 24)
        mask &= mask - 1


def takes(values: Tensor, store: ValueStore, U: int, bits: int) -> bool:
    """Whether :func:`write` can store values: whole heads of powers of two, few outliers, up to 4 bits."""
    _, H, D = values.shape
    VG = store.zero.shape[-1]
    channels, entries = H * D // VG, store.outlier_index.shape[-1] // VG
    lanes = _lanes(channels)
    return (
        values.dtype in (torch.float16, torch.bfloat16)
        and values.dtype == store.zero.dtype
        and bits <= 4
        and channels % D == 0
        and channels & (channels - 1) == 0
        and U % _THREAD == 0
        and D <= _THREAD * lanes
        and entries <= 255
        and 6 * entries <= channels
    )


def _lanes(channels: int) -> int:
    """Threads that hold different channels of a token."""
    return channels // _THREAD // max(1, min(4, channels // (_WARP // 4)))


def write(
    values: Tensor,
    store: ValueStore,
    constants: LayerConstants,
    slots: tuple[Tensor, Tensor],
    skip_bytes: Tensor,
    error: Tensor,
    *,
    bits: int,
    subfield: int,
    has_skip: bool,
) -> None:
    """Quantize, pack and store contiguous values [T, H, D] that :func:`takes` accepts.

    Args:
        values: [T, H, D].
        store: the layer's values in the pool.
        constants: midpoints of the layer's codebook.
        slots: block and slot of each token, int64 [T] each.
        skip_bytes: sink tokens, uint8 [T], read if ``has_skip``.
        error: the pool's error word.
        bits: width of a code.
        subfield: channels of a subfield.
        has_skip: whether there are sink tokens.
    """
    T, H, D = values.shape
    VG, BS = store.zero.shape[-1], store.zero.shape[-2]
    channels = H * D // VG
    lanes = _lanes(channels)
    _quantize[(T, VG)](
        values,
        skip_bytes,
        *slots,
        store.zero,
        store.scale,
        store.outlier_index,
        store.outlier_value,
        error,
        constants.value_midpoints,
        store.codes,
        H=H,
        HEADS=channels // D,
        D=D,
        U=subfield,
        BS=BS,
        VG=VG,
        N=store.outlier_index.shape[-1] // VG // 2,
        LANES=lanes,
        REPS=channels // _THREAD // lanes,
        BITS=bits,
        SKIP=has_skip,
        num_warps=max(1, lanes // 32),
        enable_fp_fusion=False,
    )
