"""Entries of outliers, on their way from a block's lists to places in the scratch (scratch.py), for the decode kernel.

An entry is a 16-bit number, of slot and channel, and a 16-bit value. What is stored is, in fp16, its difference to what
code 0 decodes to, relative to the head's largest key or the largest range of the block's values.

Most are read in pairs, a word of two numbers and one of two values, which stay words until they are needed: taking one
apart waits for it. Those are a block's own row of key outliers with the first chunk of its chain, and of a closed
block's value outliers as many as have a place. What is left is read one by one: further chunks, further value outliers,
and those of an open block, which lists all heads' together.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.triton_kernels.lookup import first_half, second_half
from kvquant.kernels.triton_kernels.scratch import key_place, put, value_place

# Of a difference: fp16 holds the sum of two products with numbers up to a half, as queries are.
LARGEST = tl.constexpr(32000.0)


@triton.jit
def unsigned_half(word, HALF: tl.constexpr):
    """The lower or the upper unsigned number of words."""
    return ((word >> (16 * HALF)) & 0xFFFF).to(tl.uint32)


@triton.jit
def float_half(word, DTYPE: tl.constexpr, HALF: tl.constexpr):
    """The lower or the upper 16-bit float of words, fp32."""
    if DTYPE.is_bf16():
        return (word & -65536 if HALF else word << 16).to(tl.float32, bitcast=True)
    else:
        return (second_half(word) if HALF else first_half(word)).to(tl.float32)


@triton.jit
def key_counts(key_count, spill_head, at):
    """How many key outliers a block and head has, its chain's included, and the first chunk of that if there is one."""
    return tl.load(key_count + at), tl.load(spill_head + at)


@triton.jit
def key_row(key_index, key_value, spill_index, spill_value, at, chunk, pair, count, K_BASE: tl.constexpr):
    """Words of pairs of entries of a block and head, numbers and values: its row's, then its chain's first chunk's."""
    own = pair < K_BASE // 2
    inside = own | (2 * pair < tl.minimum(count, K_BASE + 32))
    row = at * (K_BASE // 2) + pair
    behind = chunk.to(tl.int64) * 16 - K_BASE // 2 + pair
    word: tl.constexpr = tl.pointer_type(tl.int32)
    number = tl.where(own, key_index.to(word) + row, spill_index.to(word) + behind)
    kept = tl.where(own, key_value.to(word) + row, spill_value.to(word) + behind)
    return tl.load(number, mask=inside, other=0), tl.load(kept, mask=inside, other=0)


@triton.jit
def key_entry(
    number, kept, entry, count, floor, inverse_size, scratch, D: tl.constexpr, W: tl.constexpr, CPL: tl.constexpr,
    NP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Addresses and differences of key outliers, numbered slot * D + channel, where ``entry`` is below ``count``."""
    delta = kept * inverse_size - tl.load(floor + number % D, mask=entry < count, other=0.0)
    delta = tl.minimum(tl.maximum(delta, -LARGEST), LARGEST).to(tl.float16)
    return scratch + key_place(number, D, W, CPL, NP, R).to(tl.int32), delta


@triton.jit
def key_pair(
    numbers, kept, pair, count, floor, inverse_size, scratch, DTYPE: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    CPL: tl.constexpr, NP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """:func:`key_entry` of both entries of each pair of :func:`key_row`."""
    at0, delta0 = key_entry(
        unsigned_half(numbers, 0), float_half(kept, DTYPE, 0), 2 * pair, count, floor, inverse_size, scratch, D, W,
        CPL, NP, R,
    )  # fmt: skip
    at1, delta1 = key_entry(
        unsigned_half(numbers, 1), float_half(kept, DTYPE, 1), 2 * pair + 1, count, floor, inverse_size, scratch, D, W,
        CPL, NP, R,
    )  # fmt: skip
    return at0, at1, delta0, delta1


@triton.jit
def key_chain(
    count, chunk, spill_next, spill_index, spill_value, floor, inverse_size, scratch, D: tl.constexpr, W: tl.constexpr,
    CPL: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """Store the ``count`` outliers of a chain behind its first ``chunk``, or zeros in their places."""
    entry = tl.arange(0, 32)
    for i in range(0, count, 32):
        chunk = tl.load(spill_next + chunk)
        at = chunk.to(tl.int64) * 32 + entry
        number = tl.load(spill_index + at, mask=entry < count - i, other=0)
        number = number.to(tl.uint16, bitcast=True).to(tl.uint32)
        kept = tl.load(spill_value + at, mask=entry < count - i, other=0.0).to(tl.float32)
        at, delta = key_entry(number, kept, entry, count - i, floor, inverse_size, scratch, D, W, CPL, NP, R)
        put(at, tl.zeros_like(delta) if CLEAR else delta, entry < count - i)


@triton.jit
def value_ends(value_end, at, h, H):
    """A head's first entry, the one behind its last, and the one behind the block's last: 0 while that is open.

    The ends of the block's heads begin at ``at``.
    """
    ends = value_end + at
    return tl.load(ends + h - 1, mask=h > 0, other=0), tl.load(ends + h), tl.load(ends + H - 1)


@triton.jit
def value_row(value_index, value_value, pair, end):
    """Words of pairs of a block's entries, numbers and values: those from entry ``end`` on are not read."""
    word: tl.constexpr = tl.pointer_type(tl.int32)
    inside = pair * 2 < end
    number = tl.load(value_index.to(word) + pair, mask=inside, other=0)
    return number, tl.load(value_value.to(word) + pair, mask=inside, other=0)


@triton.jit
def _value_delta(kept, t, live, zero, scale, stride, v_first, inverse_size):
    low = tl.load(zero + t * stride, mask=live, other=0.0).to(tl.float32)
    low += tl.load(scale + t * stride, mask=live, other=0.0).to(tl.float32) * v_first
    delta = (kept.to(tl.float32) - low) * inverse_size
    return tl.minimum(tl.maximum(delta, -LARGEST), LARGEST).to(tl.float16)


@triton.jit
def value_entry(
    number, kept, live, zero, scale, stride, v_first, inverse_size, scratch, D: tl.constexpr, W: tl.constexpr,
    NP: tl.constexpr, UPG: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Addresses and differences of value outliers of a closed block, which are numbered slot * D + channel.

    ``zero``, ``scale`` of the block's tokens lie ``stride`` apart.
    """
    t = number // D
    delta = _value_delta(kept, t, live, zero, scale, stride, v_first, inverse_size)
    return scratch + value_place(t, number % D, D, W, NP, UPG, S).to(tl.int32), delta


@triton.jit
def value_pair(
    numbers, kept, first, begin, end, closed, zero, scale, stride, v_first, inverse_size, scratch, DTYPE: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, NP: tl.constexpr, UPG: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """:func:`value_entry` of both entries of each pair, ``first`` and the one behind it, and which are there.

    Those from ``begin`` to ``end`` - 1 are, once the block is ``closed``.
    """
    live0 = (first >= begin) & (first < end) & closed
    live1 = (first + 1 >= begin) & (first + 1 < end) & closed
    at0, delta0 = value_entry(
        unsigned_half(numbers, 0), float_half(kept, DTYPE, 0), live0, zero, scale, stride, v_first, inverse_size,
        scratch, D, W, NP, UPG, S,
    )  # fmt: skip
    at1, delta1 = value_entry(
        unsigned_half(numbers, 1), float_half(kept, DTYPE, 1), live1, zero, scale, stride, v_first, inverse_size,
        scratch, D, W, NP, UPG, S,
    )  # fmt: skip
    return at0, at1, delta0, delta1, live0, live1


@triton.jit
def value_rest(
    index, value, first, last, closed, origin, zero, scale, stride, v_first, inverse_size, scratch, D: tl.constexpr,
    W: tl.constexpr, NP: tl.constexpr, UPG: tl.constexpr, S: tl.constexpr, V_ENTRIES: tl.constexpr,
    CLEAR: tl.constexpr,
):  # fmt: skip
    """Store the entries ``first`` to ``last`` - 1 of a block, or zeros in their places.

    Those of an open block are all heads', V_ENTRIES a token, numbered by channel of the layer, of which this head's
    begin at ``origin``.
    """
    place = tl.arange(0, 64)
    for begin in range(first, last, 64):
        e = begin + place
        number = tl.load(index + e, mask=e < last, other=0).to(tl.int32) & 0xFFFF
        kept = tl.load(value + e, mask=e < last, other=0.0)
        t = tl.where(closed, number // D, e // V_ENTRIES)
        d = tl.where(closed, number % D, number - origin)
        live = (e < last) & (d >= 0) & (d < D)
        at = scratch + value_place(t, tl.where(live, d, 0), D, W, NP, UPG, S)
        if CLEAR:
            put(at, tl.zeros_like(kept).to(tl.float16), live)
        else:
            put(at, _value_delta(kept, t, live, zero, scale, stride, v_first, inverse_size), live)
