"""Each token's smallest and largest values: `value_outliers` with the survivors of a bound sorted in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvquant.compiled import loop
from kvquant.compiled.encode_loops import order_row

Array = NDArray[Any]


@loop
def reached_by(extremes: Array, count: int) -> int:
    """The largest number that at least `count` of the integers reach; halving, because that takes no sort."""
    low, high = np.int64(extremes[0]), np.int64(extremes[0])
    for g in range(1, len(extremes)):
        low, high = min(low, np.int64(extremes[g])), max(high, np.int64(extremes[g]))
    while low < high:
        middle = (low + high + 1) >> 1
        bound = extremes.dtype.type(middle)
        reach = 0
        for g in range(len(extremes)):
            reach += extremes[g] >= bound
        if reach >= count:
            low = middle
        else:
            high = middle - 1
    return low


@loop
def sort_few(keys: Array) -> None:
    """Sort in place: some thirty numbers, by insertion, unless ties have let many through; then Shell's way, by gaps.

    numba's own sort takes longer to compile than all else here together.
    """
    gap = 1
    while gap < len(keys) // 50:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(gap, len(keys)):
            key, j = keys[i], i
            while j >= gap and keys[j - gap] > key:
                keys[j] = keys[j - gap]
                j -= gap
            keys[j] = key
        gap //= 3


@loop
def split_rows(
    values: Array,
    mask: int,
    n: int,
    groups: int,
    outliers: Array,
    lowest: Array,
    highest: Array,
    first: int,
    last: int,
) -> None:
    """Split rows first to last - 1 of values [R, C] as `value_outliers.split_value_outliers` does.

    Args:
        values: bits of the values.
        mask: all bits but the sign's.
        n: outliers at each end.
        groups: equal, strided groups of channels, more than n; their extremes bound what can be an outlier.
        outliers: set to the channels, ascending, int32 [R, 2n].
        lowest: set to the lowest of the rest, bits [R].
        highest: set to the highest.
        first: row.
        last: row.
    """
    C = values.shape[1]
    x = np.empty(C, values.dtype)
    top, bottom = np.empty(groups, values.dtype), np.empty(groups, values.dtype)
    inside = np.zeros((C + 7) // 8 * 8, np.uint8)
    words = inside.view(np.uint64)
    near = np.empty(C + 8, np.int64)
    low, high = np.empty(C + 1, np.int64), np.empty(C + 1, np.int64)
    for row in range(first, last):
        order_row(values[row], mask, x)
        top[:] = x[:groups]
        bottom[:] = x[:groups]
        for start in range(groups, C, groups):
            part = x[start : start + groups]
            for g in range(groups):
                top[g] = max(top[g], part[g])
            for g in range(groups):
                bottom[g] = min(bottom[g], part[g])
        for g in range(groups):
            bottom[g] = -bottom[g]
        from_top = x.dtype.type(reached_by(top, n + 1))
        from_bottom = x.dtype.type(-reached_by(bottom, n + 1))
        for c in range(C):
            inside[c] = np.uint8(x[c] >= from_top) | np.uint8(x[c] <= from_bottom)
        # Written whether it is kept or not, here and below: a branch that nobody can foresee costs more than a write.
        num_near, num_low, num_high = 0, 0, 0
        for w in range(len(words)):
            if words[w]:
                for c in range(8 * w, 8 * w + 8):
                    near[num_near] = c
                    num_near += inside[c]
        for i in range(num_near):
            c = near[i]
            # By value, then by channel: ties are settled as keys are sorted.
            key = (np.int64(x[c]) << 16) + c
            near[i] = low[num_low] = high[num_high] = key
            num_low += x[c] <= from_bottom
            num_high += x[c] >= from_top
        sort_few(low[:num_low])
        sort_few(high[:num_high])
        last_low, first_high = low[n - 1], high[num_high - n]
        kept = 0
        for i in range(num_near):
            if near[i] <= last_low or near[i] >= first_high:
                outliers[row, kept] = near[i] & 0xFFFF
                kept += 1
        lowest[row] = values[row, low[n] & 0xFFFF]
        highest[row] = values[row, high[num_high - n - 1] & 0xFFFF]
