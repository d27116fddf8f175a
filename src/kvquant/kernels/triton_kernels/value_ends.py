"""The outliers of a token's values, its n largest and n smallest channels, found in pairs of 16-bit numbers.

A thread holds eight neighbouring channels of each of up to four repetitions, in pairs that one instruction compares.
Bisection over the largest of each four channels, and the smallest, both ends in one register, finds bounds that n of
them reach. Mostly exactly 2n channels then lie at or beyond the bounds; if not, the ends are found from there in a few
steps. A thread's outliers are one mask of 32 bits, a byte a repetition.
"""

# Kernels take tensors of pointers and constants, which have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined, assignment"
# Nor can tuples in them, which grow, be unpacked into others.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.triton_kernels.codes import bits_of_bytes, number_of_bit, sum_of_bytes
from kvquant.kernels.triton_kernels.pairs import (
    above,
    counted,
    first,
    half_way,
    joined,
    larger,
    order,
    reaches,
    second,
    select,
    smaller,
    top_bits,
    twice,
    weight_in_half,
)

_SIGNS = tl.constexpr(-0x7FFF8000)  # the sign bits of a pair


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
            mask = mask | (out & weight_in_half(r, p))
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
            mask = mask | (reaches(pair, number, BF16) & reaches(number, pair, BF16) & weight_in_half(r, p))
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
        bound = twice(order(extreme(nearest, not HIGH)))
        beyond = _count_beyond(x, bound, HIGH, REPS, BF16)
    return bound, beyond


@triton.jit
def extreme(pair, LARGEST: tl.constexpr):
    """The largest (smallest) of all threads' pairs, as an int of the order."""
    if LARGEST:
        return tl.max(tl.maximum(order(first(pair)), order(second(pair))), 0)
    else:
        return tl.min(tl.minimum(order(first(pair)), order(second(pair))), 0)


@triton.jit
def channel_of(bit, LANES: tl.constexpr):
    """The channels that a bit of the threads' masks stands for."""
    return (bit >> 3) * (LANES * 8) + tl.arange(0, LANES) * 8 + (bit & 7)


@triton.jit
def _add_ties(mask, ties, count, HIGHEST: tl.constexpr, LANES: tl.constexpr):
    """Add the ``count`` highest (lowest) channels of a mask to another."""
    for _one in range(count):
        if HIGHEST:
            # Without the bit below the top, rounding does not reach the next power of two.
            bit = number_of_bit(ties & ~((ties >> 1) & 0x7FFFFFFF))
            channel = tl.where(ties != 0, channel_of(bit, LANES), -1)
            chosen = channel == tl.max(channel, 0)
        else:
            bit = number_of_bit(ties & -ties)
            channel = tl.where(ties != 0, channel_of(bit, LANES), 1 << 30)
            chosen = channel == tl.min(channel, 0)
        chosen = tl.where(chosen & (ties != 0), 1 << (bit & 31), 0)
        mask, ties = mask | chosen, ties & ~chosen
    return mask


@triton.jit
def outliers(x, N: tl.constexpr, LANES: tl.constexpr, REPS: tl.constexpr, BF16: tl.constexpr):
    """A thread's mask of outliers, and the pairs' extremes of the others."""
    bounds = _bounds(_groups(x, REPS, BF16), N, LANES, REPS, BF16)
    high, low = twice(bounds), twice((bounds ^ _SIGNS) >> 16)
    mask, most, least = _beyond(x, high, low, REPS, BF16)
    highest, lowest = extreme(most, True), extreme(least, False)
    found = tl.sum(sum_of_bytes(bits_of_bytes(mask)), 0)
    if found != 2 * N:
        high, above_high = _end(x, high, N, True, REPS, BF16)
        low, below_low = _end(x, low, N, False, REPS, BF16)
        mask, most, least = _beyond(x, high, low, REPS, BF16)
        highest, lowest = extreme(most, True), extreme(least, False)
        at_high, at_low = _equal(x, high, REPS, BF16), _equal(x, low, REPS, BF16)
        ties_high = tl.sum(sum_of_bytes(bits_of_bytes(at_high)), 0)
        ties_low = tl.sum(sum_of_bytes(bits_of_bytes(at_low)), 0)
        # Outliers are the highest channels of the ties at the high end, the lowest of those at the low end.
        mask = mask & ~(at_high | at_low)
        mask = _add_ties(mask, at_high, tl.minimum(N - above_high, ties_high), True, LANES)
        mask = _add_ties(mask, at_low, tl.minimum(N - below_low, ties_low), False, LANES)
        # Ties that are no outliers bound the range: from both sides where no other channel is left.
        high, low = order(first(high)), order(first(low))
        high_left, low_left = above_high + ties_high > N, below_low + ties_low > N
        highest, lowest = (
            tl.where(high_left, high, tl.where(low_left, tl.maximum(highest, low), highest)),
            tl.where(low_left, low, tl.where(high_left, tl.minimum(lowest, high), lowest)),
        )
    return mask, order(highest), order(lowest)
