"""The inner loop of optimal 1-D clustering: candidates in a register instead of arrays of them.

Floating point, unlike the other loops: the same operations in the same order, each rounded by itself (numba contracts
none of them), so that the clusters are those of `codebooks._best_last_split`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvquant.compiled import loop

Array = NDArray[Any]


@loop
def best_last_split(previous: Array, total_w: Array, total_s: Array, clusters: int) -> tuple[Array, Array]:
    """`codebooks._best_last_split`, prefix after prefix of each level."""
    num_points = previous.size - 1
    best = np.full(num_points + 1, -np.inf)
    split = np.zeros(num_points + 1, np.int64)
    shortest = clusters - 1
    num_prefixes = num_points - shortest
    split[shortest] = shortest
    stride = 1
    while 2 * stride <= num_prefixes:
        stride *= 2
    while stride > 0:
        for length in range(shortest + stride, num_points + 1, 2 * stride):
            low = split[length - stride]
            high = length - 1
            if length + stride <= num_points:
                high = min(high, split[length + stride])
            top, where = -np.inf, low
            for start in range(low, high + 1):
                sum_s = total_s[length] - total_s[start]
                value = previous[start] + sum_s * sum_s / (total_w[length] - total_w[start])
                if value > top:
                    top, where = value, start
            best[length], split[length] = top, where
        stride //= 2
    return best, split
