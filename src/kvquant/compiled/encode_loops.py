"""Codes of whole tokens, counted, packed and put into their slots while they are in the first-level cache.

Shapes: T tokens, H heads, D channels of a head, C = H * D, M boundaries, N blocks of BS slots. Elements come as the
bits of their floats; boundaries as integers in the order of the floats (`ordered_bounds`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvquant.compiled import loop

Array = NDArray[Any]


@loop
def order_row(row: Array, mask: int, out: Array) -> None:
    """The bits of floats [C] as integers of the same order; both zeros are 0, NaN lies beyond infinity."""
    for c in range(len(row)):
        magnitude = row[c] & mask
        out[c] = -magnitude if row[c] < 0 else magnitude


@loop
def count_row(x: Array, bounds: Array, out: Array) -> None:
    """How many of the boundaries [M, C] lie below each element [C]; M is 2^bits - 1. Two at a time: fewer passes."""
    first = bounds[0]
    for c in range(len(x)):
        out[c] = np.uint8(x[c] > first[c])
    for j in range(1, len(bounds), 2):
        one, other = bounds[j], bounds[j + 1]
        for c in range(len(x)):
            out[c] += np.uint8(x[c] > one[c]) + np.uint8(x[c] > other[c])


@loop
def count_row_of_one(x: Array, bounds: Array, out: Array) -> None:
    """:func:`count_row` with the same boundaries [M] for all elements."""
    for c in range(len(x)):
        out[c] = np.uint8(x[c] > bounds[0])
    for j in range(1, len(bounds), 2):
        one, other = bounds[j], bounds[j + 1]
        for c in range(len(x)):
            out[c] += np.uint8(x[c] > one) + np.uint8(x[c] > other)


@loop
def put_row(codes: Array, widths: Array, ones: int, store: Array, block: int, slot: int) -> None:
    """Pack the codes of one token head by head into store [N, H, BS, row].

    As `packing.pack`: in a plane of `width` bits, byte w holds channels w, w + W, w + 2W, ... Where W is a multiple of
    8, codes and store are seen as integers of eight bytes: what a shift carries into the next byte, the mask takes away.

    Args:
        codes: [H, D], uint8 or eight to an int64; below 64, so that no integer is negative.
        widths: of the planes.
        ones: 1 in each byte of an integer.
    """
    H, D = codes.shape
    start, shift = 0, 0
    for width in widths:
        fields = 8 // width
        run = (D + fields - 1) // fields
        most = ((1 << width) - 1) * ones
        for field in range(fields):
            first, up = field * run, field * width
            kept = min(run, D - first)
            for h in range(H):
                source, out = codes[h, first : first + kept], store[block, h, slot, start : start + kept]
                if field:
                    for w in range(kept):
                        out[w] |= ((source[w] >> shift) & most) << up
                else:
                    for w in range(kept):
                        out[w] = (source[w] >> shift) & most
        start += run
        shift += width


@loop
def write_key_rows(
    keys: Array,
    mask: int,
    bounds: Array,
    low: Array,
    high: Array,
    skip: Array,
    widths: Array,
    ones: int,
    store: Array,
    slot_block: Array,
    slot_offset: Array,
    found: Array,
    first: int,
    last: int,
) -> Array:
    """Code and store tokens first to last - 1 of keys [T, C]; returns flat indices of their outliers, ascending.

    Args:
        keys: bits of the keys.
        mask: all bits but the sign's.
        bounds: [M, C], ascending along M.
        low: [C]; an element below is an outlier, its code is 0.
        high: [C]; so is one above.
        skip: nonzero for sink tokens, all of whose codes are 0, uint8 [T]; or empty.
        widths: of the planes of a code, int64.
        ones: 1 in each byte of an integer of the store.
        store: codes, [N, H, BS, row_bytes], or eight bytes to an int64.
        slot_block: int64 [T].
        slot_offset: int64 [T].
        found: room for the indices, int64; replaced by more if it does not do.
        first: token.
        last: token.
    """
    C = keys.shape[1]
    num_found = 0
    x, codes = np.empty(C, keys.dtype), np.empty(C, np.uint8)
    packable = codes.view(store.dtype).reshape(store.shape[1], -1)
    outside = np.zeros((C + 7) // 8 * 8, np.uint8)
    words = outside.view(np.uint64)
    for t in range(first, last):
        if len(skip) and skip[t]:
            codes[:] = 0
            put_row(packable, widths, ones, store, slot_block[t], slot_offset[t])
            continue
        order_row(keys[t], mask, x)
        count_row(x, bounds, codes)
        for c in range(C):
            outside[c] = np.uint8(x[c] < low[c]) | np.uint8(x[c] > high[c])
        if num_found + C > len(found):
            longer = np.empty(2 * len(found) + C, np.int64)
            longer[:num_found] = found[:num_found]
            found = longer
        for w in range(len(words)):
            if words[w]:
                for c in range(8 * w, 8 * w + 8):
                    if outside[c]:
                        codes[c] = 0
                        found[num_found] = t * C + c
                        num_found += 1
        put_row(packable, widths, ones, store, slot_block[t], slot_offset[t])
    return found[:num_found]


@loop
def write_value_rows(
    values: Array,
    mask: int,
    bounds: Array,
    outliers: Array,
    skip: Array,
    widths: Array,
    ones: int,
    store: Array,
    slot_block: Array,
    slot_offset: Array,
    first: int,
    last: int,
) -> None:
    """Code and store tokens first to last - 1 of values [T * VG, C // VG]; arguments as of :func:`write_key_rows`.

    Args:
        bounds: [M, T * VG], ascending along M.
        outliers: channels whose code is 0, int32 [T * VG, 2n].
    """
    group, groups = values.shape[1], len(values) // len(slot_block)
    x, codes = np.empty(group, values.dtype), np.empty(groups * group, np.uint8)
    packable = codes.view(store.dtype).reshape(store.shape[1], -1)
    for t in range(first, last):
        if len(skip) and skip[t]:
            codes[:] = 0
        else:
            for g in range(groups):
                row, part = t * groups + g, codes[g * group : (g + 1) * group]
                order_row(values[row], mask, x)
                count_row_of_one(x, bounds[:, row], part)
                for c in outliers[row]:
                    part[c] = 0
        put_row(packable, widths, ones, store, slot_block[t], slot_offset[t])
