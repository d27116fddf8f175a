"""Key outliers into the rows and spill chains of their (block, head)s, one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvquant.compiled import loop
from kvquant.compiled.select_loops import sort_few

Array = NDArray[Any]


@loop
def append_outliers(
    found: Array,
    values: Array,
    head_dim: int,
    slot_block: Array,
    slot_offset: Array,
    count: Array,
    base_index: Array,
    base_value: Array,
    spill_head: Array,
    spill_next: Array,
    spill_index: Array,
    spill_value: Array,
    spill_free: Array,
    spill_top: Array,
) -> bool:
    """`outlier_append.append_key_outliers` for K entries in rising order; values are the bits of what is stored.

    The arrays from `count` on are those of `KeyStore`. Returns False, with no entry counted, when chunks run out.
    """
    H, base, lanes = count.shape[1], base_index.shape[2], spill_index.shape[1]
    C = H * head_dim
    spilled, num_spilled, num_new = np.empty(64, np.int64), 0, 0
    position = np.empty(64, np.int64)
    for i in range(len(found)):
        t = found[i] // C
        channel = found[i] - t * C
        h = channel // head_dim
        block = slot_block[t]
        entry = count[block, h]
        count[block, h] = entry + 1
        if entry < base:
            base_index[block, h, entry] = slot_offset[t] * head_dim + channel - h * head_dim
            base_value[block, h, entry] = values[i]
            continue
        if num_spilled == len(spilled):
            longer = np.empty((2, 2 * num_spilled), np.int64)
            longer[0, :num_spilled], longer[1, :num_spilled] = spilled, position
            spilled, position = longer[0], longer[1]
        spilled[num_spilled], position[num_spilled] = i, entry - base
        num_new += (entry - base) % lanes == 0
        num_spilled += 1
    if num_new > spill_top[0]:
        for flat in found:
            count[slot_block[flat // C], flat % C // head_dim] -= 1
        return False
    if num_spilled == 0:
        return True
    # Chunks are handed out by (block, head), in every backend; within one, entries keep their order.
    order = np.empty(num_spilled, np.int64)
    for k in range(num_spilled):
        flat = found[spilled[k]]
        order[k] = (slot_block[flat // C] * H + flat % C // head_dim) * num_spilled + k
    sort_few(order)
    group, chunk = np.int64(-1), np.int64(0)
    for n in range(num_spilled):
        of, k = order[n] // num_spilled, order[n] % num_spilled
        i, ordinal, lane = spilled[k], position[k] // lanes, position[k] % lanes
        block, h = of // H, of % H
        if of != group:
            group = of
            # To the chunk that the entry goes to, or that the new one is linked from.
            chunk = spill_head[block, h]
            for _ in range(ordinal if lane else ordinal - 1):
                chunk = spill_next[chunk]
        if lane == 0:
            spill_top[0] -= 1
            new = spill_free[spill_top[0]]
            if ordinal == 0:
                spill_head[block, h] = new
            else:
                spill_next[chunk] = new
            chunk = new
        t = found[i] // C
        channel = found[i] - t * C
        spill_index[chunk, lane] = slot_offset[t] * head_dim + channel - h * head_dim
        spill_value[chunk, lane] = values[i]
    return True
