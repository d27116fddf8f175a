"""Quantizing and storing values of a 16-bit type, two channels at a time: a warp for a token of 1,024 channels.

A thread holds eight neighbouring channels of every 256. Once it knows the outliers (``value_ends``), it compares pairs
with boundaries rounded down to the values' own type, which leaves every comparison as it is. Outliers are NaN there,
which exceeds no boundary and so has code 0.
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

from kvquant.kernels import ERROR_VALUE_NOT_FINITE, LayerConstants, ValueStore
from kvquant.kernels.triton_kernels.codes import (
    bits_of_bytes,
    is_finite,
    number_of_bit,
    report,
    store_planes,
    sum_of_bytes,
)
from kvquant.kernels.triton_kernels.pairs import (
    bytes_of_halves,
    code_of_pair,
    counted,
    floor_bits,
    larger,
    number,
    order,
    smaller,
    spoilt,
    spread,
    twice,
)
from kvquant.kernels.triton_kernels.value_ends import channel_of, extreme, outliers

_VALUE_NOT_FINITE = tl.constexpr(ERROR_VALUE_NOT_FINITE)
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
def _thresholds(zero, scale, stored, midpoints, BITS: tl.constexpr, BF16: tl.constexpr):
    """Pairs of the largest number that does not exceed each boundary, in a tuple; NaN if not ``stored``."""
    LEVELS: tl.constexpr = 1 << BITS
    i = tl.arange(0, LEVELS)
    b = scale * tl.load(midpoints + i, mask=i < LEVELS - 1, other=0.0) + zero
    parts = (twice(tl.where(stored, floor_bits(b, BF16), 0x7FFF)),)
    for level in tl.static_range(BITS):
        halved = ()
        for k in tl.static_range(1 << level):
            part = tl.permute(tl.reshape(parts[k], (2, LEVELS >> (level + 1))), (1, 0))
            lower, upper = tl.split(part)
            halved = halved + (lower, upper)
        parts = halved
    return parts


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
def _quantize_values(
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
        mask, highest, lowest = outliers(x, N, LANES, REPS, BF16)
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
        highest, lowest = order(extreme(most, True)), order(extreme(least, False))
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
                code = code + (code_of_pair(pair, t, BITS, BF16),)
            words = words + (bytes_of_halves(counted(code[0] + code[1] * 256)),)
        eight = tl.reshape(tl.join(words[0], words[1]), (LANES * 2,))
        store_planes(eight, row + r * HPR * STRIDE, STRIDE, HPR, HPR, U, U, D // U, 4, BITS)


@triton.jit
def _store_outliers(
    values, mask, group, index, value, CHANNELS: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr
):
    """Store the outliers of a token in the order of channels."""
    count = bits_of_bytes(mask)
    # Four numbers below 256, whose sums keep to their bytes; a token's channels run through one byte, then the next.
    total = tl.sum(count, 0) * 0x01010100
    k = tl.cumsum(count, 0) - count + total
    for _one in range(tl.max(sum_of_bytes(count), 0)):
        bit = number_of_bit(mask & -mask)
        entry = (k >> (bit & 24)) & 255
        channel = channel_of(bit, LANES)
        # NaN has no place in the order; it must not leave the row.
        chosen = (mask != 0) & (entry < 2 * N)
        kept = tl.load(values + channel, mask=chosen, other=0.0)
        tl.store(index + entry, (group * CHANNELS + channel).to(tl.int16), mask=chosen)
        tl.store(value + entry, kept, mask=chosen)
        k += 1 << (bit & 24)
        mask &= mask - 1


def takes(values: Tensor, store: ValueStore, U: int, bits: int) -> bool:
    """Whether :func:`write` can store values: whole pairs and heads of powers of two, few outliers, up to 4 bits."""
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
        and _THREAD * lanes >= D
        and entries <= 255
        and 6 * entries <= channels
        and values.data_ptr() % 4 == 0
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
    _quantize_values[(T, VG)](
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
