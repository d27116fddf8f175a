"""Decode attention of one head over its blocks: a block is decoded in the first-level cache and forgotten.

Floats, unlike the loops that decide codes: sums are taken in the order that suits the processor's vectors.

Shapes: B sequences, H KV heads, G query heads of each, D channels, BS slots of a block, R rotated channels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvquant.compiled import float_loop, loop

Array = NDArray[Any]


@loop
def unpack_rows(packed: Array, widths: Array, ones: int, slots: Any, codes: Array) -> None:
    """Unpack rows slots[0] to slots[1] - 1 of [BS, row] into codes [BS, D]; integers as `encode_loops.put_row` has them.

    All rows of a field together: what a field needs is worked out once.
    """
    D = codes.shape[1]
    start, shift = 0, 0
    for width in widths:
        fields = 8 // width
        run = (D + fields - 1) // fields
        most = ((1 << width) - 1) * ones
        for field in range(fields):
            first, down = field * run, field * width
            kept = min(run, D - first)
            for s in range(slots[0], slots[1]):
                source, target = packed[s, start : start + kept], codes[s, first : first + kept]
                if shift:
                    for w in range(kept):
                        target[w] |= ((source[w] >> down) & most) << shift
                else:
                    for w in range(kept):
                        target[w] = (source[w] >> down) & most
        start += run
        shift += width


@loop
def turn(x: Array, cos: Array, sin: Array, sign: float) -> None:
    """Rotate the first R channels of [D] by half-split tables [R/2], in place; backwards where `sign` is -1."""
    half = len(cos)
    firsts, seconds = x[:half], x[half : 2 * half]
    way = np.float32(sign)
    for i in range(half):
        c, s = cos[i], way * sin[i]
        first, second = firsts[i], seconds[i]
        firsts[i] = first * c - second * s
        seconds[i] = second * c + first * s


@float_loop
def dot(x: Array, y: Array) -> float:
    """The scalar product of two rows."""
    total = np.float32(0.0)
    for d in range(len(x)):
        total += x[d] * y[d]
    return total


@float_loop
def add_scaled(x: Array, weight: float, out: Array) -> None:
    """Add a weighted row to a running sum."""
    for d in range(len(x)):
        out[d] += weight * x[d]


@loop
def decode_keys(
    store: Any, side: Any, constants: Any, floats: Array, block: int, h: int, slots: Any, tile: Array
) -> None:
    """Dequantize slots first to last - 1 of a block of keys of one head into tile [BS, D]."""
    codes, count, base_index, base_value, spill_head, spill_next, spill_index, spill_value = store
    widths, ones, centroids, rows, words = side
    D, zero, scale = tile.shape[1], constants[0][h], constants[1][h]
    unpack_rows(codes[block, h], widths, ones, slots, words)
    for s in range(slots[0], slots[1]):
        row, out = rows[s], tile[s]
        for d in range(D):
            out[d] = centroids[row[d]] * scale[d] + zero[d]
    flat = tile.reshape(-1)
    base, lanes = base_index.shape[2], spill_index.shape[1]
    left = count[block, h]
    for k in range(min(left, base)):
        flat[base_index[block, h, k] & 0xFFFF] = floats[base_value[block, h, k] & 0xFFFF]
    left -= base
    chunk = spill_head[block, h]
    while left > 0:
        for k in range(min(left, lanes)):
            flat[spill_index[chunk, k] & 0xFFFF] = floats[spill_value[chunk, k] & 0xFFFF]
        left -= lanes
        if left > 0:
            chunk = spill_next[chunk]


@loop
def decode_values(store: Any, side: Any, floats: Array, block: int, h: int, slots: Any, tile: Array) -> None:
    """Dequantize slots first to last - 1 of a block of values of one head into tile [BS, D]."""
    codes, zero, scale, outlier_index, outlier_value, outlier_end = store
    widths, ones, centroids, rows, words = side
    D, H, VG = tile.shape[1], codes.shape[1], zero.shape[2]
    group = H * D // VG
    unpack_rows(codes[block, h], widths, ones, slots, words)
    for s in range(slots[0], slots[1]):
        row, out = rows[s], tile[s]
        first = 0
        while first < D:
            g = (h * D + first) // group
            last = min(D, (g + 1) * group - h * D)
            z, r = floats[zero[block, s, g] & 0xFFFF], floats[scale[block, s, g] & 0xFFFF]
            for d in range(first, last):
                out[d] = centroids[row[d]] * r + z
            first = last
    flat = tile.reshape(-1)
    K = outlier_index.shape[2]
    if outlier_end[block, H - 1] > 0:  # closed: ordered by head
        index, value = outlier_index[block].reshape(-1), outlier_value[block].reshape(-1)
        begin = outlier_end[block, h - 1] if h > 0 else 0
        for k in range(begin, outlier_end[block, h]):
            flat[index[k] & 0xFFFF] = floats[value[k] & 0xFFFF]
    else:
        for s in range(slots[0], slots[1]):
            for k in range(K):
                d = (outlier_index[block, s, k] & 0xFFFF) - h * D
                if 0 <= d < D:
                    tile[s, d] = floats[outlier_value[block, s, k] & 0xFFFF]


@loop
def attend_heads(
    query: Array,
    table: Array,
    lengths: Array,
    window: int,
    softcap: float,
    rope: Any,
    tile_blocks: int,
    keys: Any,
    key_side: Any,
    key_constants: Any,
    values: Any,
    value_side: Any,
    floats: Array,
    sinks: Any,
    tile: Array,
    out: Array,
    first: int,
    last: int,
) -> None:
    """Attention of KV heads first to last - 1, counted head by head and in each through the sequences.

    Args:
        query: rotated and scaled, fp32 [B, Hq, D].
        table: block ids, int32 [B, M].
        lengths: tokens of each sequence, int64 [B].
        window: a query sees only keys less than this many positions back.
        softcap: 0: none.
        rope: cosines and sines of offsets in a tile [tile, R/2] and of tile bases [tiles, R/2]; R is 0: no rotation.
        tile_blocks: blocks of such a tile.
        keys: arrays of a `KeyStore`, its free stack left out.
        key_side: widths of the planes, ones, centroids, and codes uint8 [BS, D] to work in with the same as the store's
            integers.
        key_constants: zero and scale, fp32 [H, D] each.
        values: arrays of a `ValueStore`.
        value_side: as key_side.
        floats: value of each 16-bit pattern, fp32 [65536].
        sinks: exact keys and values of the first tokens, fp32 [B, sink_tokens, H, D] each.
        tile: to work in, fp32 [BS, D].
        out: fp32 [B, Hq, D].
        first: of B * H.
        last: of B * H.
    """
    B, Hq, D = query.shape
    BS, H = tile.shape[0], keys[0].shape[1]
    G = Hq // H
    offset_cos, offset_sin, base_cos, base_sin = rope
    sink_keys, sink_values = sinks
    turned, result = np.empty((G, D), np.float32), np.empty((G, D), np.float32)
    scores = np.empty((G, BS), np.float32)
    best, total = np.empty(G, np.float32), np.empty(G, np.float32)
    for pair in range(first, last):
        h, b = pair // B, pair % B
        best[:], total[:], result[:] = -np.inf, 0.0, 0.0
        begin = max(0, lengths[b] - window)
        for column in range(begin // BS, (lengths[b] + BS - 1) // BS):
            block, start = table[b, column], column * BS
            slots = (max(0, begin - start), min(BS, lengths[b] - start))
            num_sinks = min(slots[1], sink_keys.shape[1] - start)
            turned[:] = query[b, h * G : (h + 1) * G]
            if offset_cos.shape[1]:
                in_tile = column % tile_blocks * BS
                # Tables of offsets carry the model's attention scaling, which is the keys' to apply.
                scaling = offset_cos[0, 0]
                for g in range(G):
                    turn(turned[g], base_cos[column // tile_blocks], base_sin[column // tile_blocks], -1.0)
                    turn(turned[g], offset_cos[in_tile], offset_sin[in_tile], -1.0)
                    for d in range(2 * offset_cos.shape[1]):
                        turned[g, d] /= scaling
            decode_keys(keys, key_side, key_constants, floats, block, h, slots, tile)
            for s in range(slots[0], num_sinks):
                tile[s] = sink_keys[b, start + s, h]
            for s in range(slots[0], slots[1]):
                turn(tile[s], offset_cos[s], offset_sin[s], 1.0)
                for g in range(G):
                    score = dot(turned[g], tile[s])
                    if softcap > 0:
                        score = softcap * math.tanh(score / softcap)
                    scores[g, s] = score
            for g in range(G):
                highest = best[g]
                for s in range(slots[0], slots[1]):
                    highest = max(highest, scores[g, s])
                fade = np.float32(math.exp(best[g] - highest))
                best[g] = highest
                total[g] *= fade
                for d in range(D):
                    result[g, d] *= fade
                for s in range(slots[0], slots[1]):
                    scores[g, s] = math.exp(scores[g, s] - highest)
                    total[g] += scores[g, s]
            decode_values(values, value_side, floats, block, h, slots, tile)
            for s in range(slots[0], num_sinks):
                tile[s] = sink_values[b, start + s, h]
            for s in range(slots[0], slots[1]):
                for g in range(G):
                    add_scaled(tile[s], scores[g, s], result[g])
        for g in range(G):
            for d in range(D):
                out[b, h * G + g, d] = result[g, d] / total[g]
