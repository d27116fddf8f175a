"""What writing keys and values share: codes of a tile, and codes folded into the bytes of their planes.

Planes (``kvquant.packing``) differ in width, so a head's channels are worked on in subfields of U = D * w / 8 channels,
w the narrowest plane: subfield u is channels u*U to u*U + U - 1, and every byte of a plane 2**k times as wide lies in
one of 2**k runs of U bytes. All runs of a row come to U * (bits / w) bytes, the planes in their order; a tile of words
holds one byte of each run.
"""

# Kernels take tensors of pointers and constants, which have no types.
# mypy: disable-error-code="no-untyped-def, assignment"
# Nor can tuples in them, which grow, be unpacked into others.
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _boundary(zero, scale, midpoints, m: tl.constexpr):
    return scale * tl.load(midpoints + m) + zero


@triton.jit
def boundaries(zero, scale, midpoints, BITS: tl.constexpr):
    """What ``count_codes`` compares with, up to 4 bits: the rising boundaries zero + scale * midpoint, a tuple.

    Launch with ``enable_fp_fusion=False``: product and sum are rounded on their own.
    """
    b = ()
    if BITS <= 4:
        for m in tl.static_range((1 << BITS) - 1):
            b = b + (_boundary(zero, scale, midpoints, m),)
    return b


@triton.jit
def _count_1(x, b0):
    return (x > b0).to(tl.int32)


@triton.jit
def _count_2(x, b0, b1, b2):
    upper = x > b1
    return tl.where(upper, 2, 0) | _count_1(x, tl.where(upper, b2, b0))


@triton.jit
def _count_3(x, b0, b1, b2, b3, b4, b5, b6):
    upper = x > b3
    low = _count_2(x, tl.where(upper, b4, b0), tl.where(upper, b5, b1), tl.where(upper, b6, b2))
    return tl.where(upper, 4, 0) | low


@triton.jit
def count_codes(x, b, zero, scale, midpoints, BITS: tl.constexpr):
    """How many of the boundaries zero + scale * midpoint lie strictly below each element of the fp32 tile ``x``.

    Boundaries rise with the midpoints, so that ``BITS`` comparisons find it, each of which halves those that are left:
    up to 4 bits in registers, from the ``boundaries`` ``b`` of the same arguments; beyond by looking the next one up.
    Launch with ``enable_fp_fusion=False``, as for them.
    """
    if BITS == 1:
        return _count_1(x, b[0])
    elif BITS == 2:
        return _count_2(x, b[0], b[1], b[2])
    elif BITS == 3:
        return _count_3(x, b[0], b[1], b[2], b[3], b[4], b[5], b[6])
    elif BITS == 4:
        upper = x > b[7]
        low = _count_3(
            x,
            tl.where(upper, b[8], b[0]),
            tl.where(upper, b[9], b[1]),
            tl.where(upper, b[10], b[2]),
            tl.where(upper, b[11], b[3]),
            tl.where(upper, b[12], b[4]),
            tl.where(upper, b[13], b[5]),
            tl.where(upper, b[14], b[6]),
        )
        return tl.where(upper, 8, 0) | low
    else:
        code = tl.zeros(x.shape, tl.int32)
        for level in tl.static_range(BITS):
            half = 1 << (BITS - 1 - level)
            code += tl.where(x > scale * tl.load(midpoints + (code + (half - 1))) + zero, half, 0)
        return code


@triton.jit
def mask_of_eight(flags, SHAPE: tl.constexpr):
    """Eight neighbouring flags in one number: a bit each, and how many are set from bit 16 on.

    ``SHAPE`` is that of ``flags`` with eight to the last axis, which lie in one thread where elements were loaded so.
    """
    bit = tl.arange(0, 8)
    if len(SHAPE) == 2:
        weight = ((1 << bit) | (1 << 16))[None, :]
    else:
        weight = ((1 << bit) | (1 << 16))[None, None, :]
    return tl.sum(tl.where(tl.reshape(flags, SHAPE), weight, 0), len(SHAPE) - 1)


@triton.jit
def number_of_bit(mask):
    """Number of the only bit set, or of the highest of few: the exponent of the mask as a number."""
    return (mask.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def bits_of_bytes(mask):
    """How many bits each byte has, in the bytes."""
    mask = mask - ((mask >> 1) & 0x55555555)
    mask = (mask & 0x33333333) + ((mask >> 2) & 0x33333333)
    return (mask + (mask >> 4)) & 0x0F0F0F0F


@triton.jit
def sum_of_bytes(count):
    """The sum of a word's bytes, below 128."""
    return (count * 0x01010101) >> 24


@triton.jit
def _fold_plane(words, code, SUBFIELD: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    # A width of b bits has the planes that b is written with in binary, the widest first and lowest.
    if BITS & WIDTH:
        NARROWEST: tl.constexpr = BITS & -BITS
        BELOW: tl.constexpr = BITS // (2 * WIDTH) * (2 * WIDTH)
        RUNS: tl.constexpr = WIDTH // NARROWEST
        BYTE: tl.constexpr = BELOW // NARROWEST + SUBFIELD % RUNS
        field = (code >> BELOW) & ((1 << WIDTH) - 1)
        words |= field.to(words.dtype) << (8 * BYTE + SUBFIELD // RUNS * WIDTH)
    return words


@triton.jit
def fold(words, code, SUBFIELD: tl.constexpr, BITS: tl.constexpr):
    """Put the codes of one subfield into their place in a tile of words."""
    words = _fold_plane(words, code, SUBFIELD, BITS, 8)
    words = _fold_plane(words, code, SUBFIELD, BITS, 4)
    words = _fold_plane(words, code, SUBFIELD, BITS, 2)
    return _fold_plane(words, code, SUBFIELD, BITS, 1)


@triton.jit
def no_words(ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """An empty tile of words: 32 bits where they hold a byte of every run, 64 for 5 and 7 bits."""
    if BITS // (BITS & -BITS) <= 3:
        return tl.zeros((ROWS, COLUMNS), tl.int32)
    else:
        return tl.zeros((ROWS, COLUMNS), tl.int64)


@triton.jit
def store_words(words, at, mask, U: tl.constexpr, BITS: tl.constexpr):
    """Store a tile of words as the bytes of packed rows; ``at`` points to each word's byte of the first run."""
    for k in tl.static_range(BITS // (BITS & -BITS)):
        tl.store(at + k * U, ((words >> (8 * k)) & 255).to(tl.uint8), mask=mask)


@triton.jit
def _store_plane(
    words, to, rows, inside, U: tl.constexpr, S: tl.constexpr, V: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    if BITS & WIDTH:
        NARROWEST: tl.constexpr = BITS & -BITS
        BELOW: tl.constexpr = BITS // (2 * WIDTH) * (2 * WIDTH)
        RUNS: tl.constexpr = WIDTH // NARROWEST
        u = tl.arange(0, S)[None, :, None]
        field = words >> BELOW
        if WIDTH < 8:
            field = field & (((1 << WIDTH) - 1) * 0x01010101)
        field = field << (u // RUNS * WIDTH)
        for r in tl.static_range(RUNS):
            run = tl.sum(tl.where(u % RUNS == r, field, 0), 1)
            at = to + rows + (BELOW // NARROWEST + r) * U
            if V == 4:
                tl.store(at.to(tl.pointer_type(tl.int32)), run, mask=inside)
            else:
                tl.store(at, run.to(tl.uint8), mask=inside)


@triton.jit
def store_rows(
    code,
    to,
    stride,
    HEADS: tl.constexpr,
    HEADS_P: tl.constexpr,
    U: tl.constexpr,
    UP: tl.constexpr,
    S: tl.constexpr,
    BITS: tl.constexpr,
):
    """Pack the codes of one token, [HEADS_P * S * UP] in the order of channels, into its row of each head.

    ``to`` points to the first head's row and ``stride`` bytes on begins the next. Four neighbours share a word, so that
    what crosses lanes, the subfields of a byte, and what is stored are words too.
    """
    V: tl.constexpr = 4 if U % 4 == 0 else 1
    if V == 4:
        four = tl.reshape(code, (HEADS_P * S * UP // 4, 4))
        code = tl.sum(four << (8 * tl.arange(0, 4))[None, :], 1)
    store_planes(code, to, stride, HEADS, HEADS_P, U, UP, S, V, BITS)


@triton.jit
def store_planes(
    words,
    to,
    stride,
    HEADS: tl.constexpr,
    HEADS_P: tl.constexpr,
    U: tl.constexpr,
    UP: tl.constexpr,
    S: tl.constexpr,
    V: tl.constexpr,
    BITS: tl.constexpr,
):
    """What :func:`store_rows` does once ``V`` neighbours share a word: the codes are [HEADS_P * S * UP / V]."""
    words = tl.reshape(words, (HEADS_P, S, UP // V))
    head, j = tl.arange(0, HEADS_P)[:, None], V * tl.arange(0, UP // V)[None, :]
    rows, inside = head * stride + j, (head < HEADS) & (j < U)
    _store_plane(words, to, rows, inside, U, S, V, BITS, 8)
    _store_plane(words, to, rows, inside, U, S, V, BITS, 4)
    _store_plane(words, to, rows, inside, U, S, V, BITS, 2)
    _store_plane(words, to, rows, inside, U, S, V, BITS, 1)


@triton.jit
def is_finite(x):
    """Whether elements are neither NaN nor infinite."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def report(error, kind, channel, NO_CHANNEL: tl.constexpr):
    """Set the error word if ``channel`` is one and no error came before; programs of one launch report one kind."""
    set_it = (channel < NO_CHANNEL) & (tl.load(error) == 0)
    tl.store(error + 1, channel.to(tl.int64), mask=set_it)
    tl.store(error, kind, mask=set_it)


def subfield_width(head_dim: int, bits: int) -> int:
    """U, the channels of a subfield.

    Raises:
        ValueError: the planes of a row do not fill whole bytes.
    """
    per_byte = 8 // (bits & -bits)
    if head_dim % per_byte:
        raise ValueError(
            f"kernel=triton packs head_dim in multiples of {per_byte} at {bits} bits, got {head_dim}; "
            "use kernel=pytorch_fused"
        )
    return head_dim // per_byte


def tile_rows(most: int) -> int:
    """Rows of a tile for up to ``most`` of them: few sizes, so that few kernels are compiled."""
    return 4 if most <= 4 else 32


def as_bytes(skip: Tensor | None, other: Tensor) -> Tensor:
    """A mask as bytes; without one, a tensor that stands in for it and is not read."""
    return other if skip is None else skip.view(torch.uint8)
