"""Outliers of a block as products with 0/1 matrices made in registers: what decode does where it has no scratch.

Triton has no scatter, and atomics would add in any order. Outliers are added as differences to what their code 0
decodes to: to the scores (times the query turned back to the key's position) and to the output (times the weight). This
is the way of blocks too large for :mod:`scratch`, which takes a third of the instructions.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.triton_kernels.fragments import channel_of_row, row_of, rows_equal, tokens_equal
from kvquant.kernels.triton_kernels.outlier_entries import LARGEST


@triton.jit
def _key_differences(
    number, kept, live, q_half, floor, inverse_size, offset_cos, offset_sin, base,
    GP: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """What each of 32 outliers adds to its token's scores, [32, GP] fp32: an outlier weighs too much to be rounded."""
    HALF: tl.constexpr = D // 2
    t = number // D
    d = number % D
    g = tl.arange(0, GP)[None, :]
    delta = kept * inverse_size - tl.load(floor + d, mask=live, other=0.0)
    delta = tl.where(live, tl.minimum(tl.maximum(delta, -LARGEST), LARGEST), 0.0)
    own = tl.load(q_half + d[:, None] * GP + g).to(tl.float32)
    if ROTATED:
        j = d % HALF
        cb = tl.load(base + j)
        sb = tl.load(base + HALF + j)
        co = tl.load(offset_cos + t * HALF + j)
        so = tl.load(offset_sin + t * HALF + j)
        side = tl.where(d < HALF, delta, -delta)
        other = tl.load(q_half + tl.where(d < HALF, d + HALF, j)[:, None] * GP + g).to(tl.float32)
        return own * ((cb * co - sb * so) * delta)[:, None] + other * ((sb * co + cb * so) * side)[:, None]
    else:
        return own * delta[:, None]


@triton.jit
def key_products(
    scores, key_count, key_index, key_value, spill_head, spill_next, spill_index, spill_value, at, q_half, floor,
    inverse_size, offset_cos, offset_sin, base,
    GP: tl.constexpr, D: tl.constexpr, K_BASE: tl.constexpr, ROTATED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """``scores`` [16 R, GP] with the outliers of the block and head numbered ``at``."""
    entry = tl.arange(0, 32)
    count = tl.load(key_count + at)
    stored = tl.minimum(count, K_BASE)
    own_chunks = tl.cdiv(stored, 32)
    chunk = tl.zeros((), tl.int64)
    if count > K_BASE:
        chunk = tl.load(spill_head + at).to(tl.int64)
    for i in range(own_chunks + tl.cdiv(count - stored, 32)):
        # The block's own row first, then the chain of spilled chunks.
        left = stored - i * 32
        numbers = key_index + at * K_BASE + i * 32
        kepts = key_value + at * K_BASE + i * 32
        if i >= own_chunks:
            left = count - K_BASE - (i - own_chunks) * 32
            numbers = spill_index + chunk * 32
            kepts = spill_value + chunk * 32
            if left > 32:
                chunk = tl.load(spill_next + chunk).to(tl.int64)
        live = entry < left
        number = tl.load(numbers + entry, mask=live, other=0).to(tl.int32) & 0xFFFF
        kept = tl.load(kepts + entry, mask=live, other=0.0).to(tl.float32)
        w = _key_differences(
            number, kept, live, q_half, floor, inverse_size, offset_cos, offset_sin, base, GP, D, ROTATED
        )
        one = rows_equal(row_of(R), numbers, left, 0, D, True, R)
        high = w.to(tl.float16)
        scores = tl.dot(one, high, scores)
        scores = tl.dot(one, (w - high.to(tl.float32)).to(tl.float16), scores)
    return scores


@triton.jit
def value_products(
    out0, out1, out2, out3, plain, index, value, first, last, closed, origin, zero, scale, stride, v_first, inverse_size,
    D: tl.constexpr, W: tl.constexpr, NP: tl.constexpr, UPG: tl.constexpr, BS: tl.constexpr, V_ENTRIES: tl.constexpr,
):  # fmt: skip
    """The output's tiles with a block's outliers; ``plain`` [BS, GP] are the weights, the rest as of ``scratch``."""
    entry = tl.arange(0, 32)
    for e1 in range((first // 4) * 4, last, 32):
        picked = tl.dot(
            tokens_equal(index, e1, first, last, closed, D, BS, V_ENTRIES), plain
        )  # [32, GP]: the weights of the entries' tokens
        e = e1 + entry
        live = (e >= first) & (e < last)
        number = tl.load(index + e, mask=live, other=0).to(tl.int32) & 0xFFFF
        kept = tl.load(value + e, mask=live, other=0.0).to(tl.float32)
        t = tl.where(closed, number // D, e // V_ENTRIES) & (BS - 1)
        d = tl.where(closed, number % D, number - origin)
        live = live & (d >= 0) & (d < D)
        low = tl.load(zero + t * stride).to(tl.float32) + tl.load(scale + t * stride).to(tl.float32) * v_first
        delta = tl.where(live, (kept - low) * inverse_size, 0.0)
        w = tl.minimum(tl.maximum(picked * delta[:, None], -LARGEST), LARGEST).to(tl.float16)
        numbers = index + e1
        c0 = channel_of_row(row_of(4), 0, D, W, UPG, NP)
        c1 = channel_of_row(row_of(4), 1, D, W, UPG, NP)
        begin = tl.where(closed, -1, origin)
        out0 = tl.dot(rows_equal(c0, numbers, last - e1, begin, D, False, 4), w, out0)
        out1 = tl.dot(rows_equal(c1, numbers, last - e1, begin, D, False, 4), w, out1)
        if UPG == 2:
            c2 = channel_of_row(row_of(4), 2, D, W, UPG, NP)
            c3 = channel_of_row(row_of(4), 3, D, W, UPG, NP)
            out2 = tl.dot(rows_equal(c2, numbers, last - e1, begin, D, False, 4), w, out2)
            out3 = tl.dot(rows_equal(c3, numbers, last - e1, begin, D, False, 4), w, out3)
    return out0, out1, out2, out3
