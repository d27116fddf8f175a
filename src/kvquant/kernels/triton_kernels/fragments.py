"""Tensors of 64 threads in the shapes a tensor core wants: loads, look-ups, 0/1 matrices, and their rows and columns.

A product's side is [64 threads, registers] with the numbers that the tensor core expects of each thread, so that the
reshape and permute to its rows and columns move nothing. Lane 4q + r of warp w holds rows 16w + q (+ 8) of every 32, and
columns 4r to 4r + 3 of every 16. That the compiler then finds nothing to move depends on its choices of layouts, not on
anything it promises: wrong choices cost time, never correctness. Seen in the machine code of triton 3.6 and 3.7.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.triton_kernels.lookup import INTERPRET, equal, first_half, fused, pack, second_half

STREAM = tl.constexpr(
    ".cg"
)  # loads of what nobody reads again leave the first cache to the tables that all blocks share
_CACHED = tl.constexpr("")


@triton.jit
def stack(
    pointer, inside, LO: tl.constexpr, HI: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
    CACHE: tl.constexpr = _CACHED,
):  # fmt: skip
    """N loads of one shape, joined in registers, [..., 2, 2, ...]: their offsets count LO once, HI, 2 HI, 4 HI.

    One load a register instead of one load of all of them, because only then do all compilers leave the threads where
    they are.
    """
    if N == 1:
        if MASKED:
            return tl.load(pointer, mask=inside, other=0, cache_modifier=CACHE)
        else:
            return tl.load(pointer, cache_modifier=CACHE)
    elif N == 2:
        return tl.join(
            stack(pointer, inside, LO, HI, 1, MASKED, CACHE),
            stack(pointer + LO, inside, LO, HI, 1, MASKED, CACHE),
        )
    else:
        return tl.join(
            stack(pointer, inside, LO, HI, N // 2, MASKED, CACHE),
            stack(pointer + (N // 4) * HI, inside, LO, HI, N // 2, MASKED, CACHE),
        )


@triton.jit
def _byte(pointer, inside, ROW: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, N: tl.constexpr):
    return stack(pointer, inside, LO * ROW, HI * ROW, N, True).to(tl.int32)


@triton.jit
def load_words(
    codes, row, word, W: tl.constexpr, ROW: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr, BITS: tl.constexpr,
    LO: tl.constexpr, HI: tl.constexpr, N: tl.constexpr, CACHE: tl.constexpr = STREAM,
):  # fmt: skip
    """Words ``word`` of the rows numbered ``row`` and of N - 1 further ones (:func:`stack`), and their third bits.

    Third bits (of 3-bit codes; else the words again) come shifted into place.
    """
    inside = word < WORDS
    upper = tl.where(word >= W // 8, 1, 0)
    for _ in tl.static_range(0 if N == 1 else (1 if N == 2 else (2 if N == 4 else (3 if N == 8 else 4)))):
        upper = tl.join(upper, upper)
    if W % 8 == 0 or (BITS != 3 and W % 4 == 0):
        base = codes.to(tl.pointer_type(tl.int32)) + row * (ROW // 4)
        words = stack(base + word, inside, LO * (ROW // 4), HI * (ROW // 4), N, MASKED, CACHE)
        third = words
        if BITS == 3:
            at = base + W // 4 + word % (W // 8)
            third = stack(at, inside, LO * (ROW // 4), HI * (ROW // 4), N, MASKED, CACHE) >> upper
    else:  # rows of 3-bit codes that no word boundary divides
        words = _byte(codes + row * ROW + word * 4, inside & (word * 4 < W), ROW, LO, HI, N)
        third = words
        for k in tl.static_range(1, 4):
            byte = word * 4 + k
            words |= _byte(codes + row * ROW + byte, inside & (byte < W), ROW, LO, HI, N) << (8 * k)
        if BITS == 3:
            third = tl.zeros_like(words)
            for k in tl.static_range(4):
                byte = word * 4 + k
                ok = inside & (byte < W)
                low = _byte(codes + row * ROW + W + byte % (W // 2), ok & (byte < W // 2), ROW, LO, HI, N)
                high = _byte(codes + row * ROW + W + byte % (W // 2), ok & (byte >= W // 2), ROW, LO, HI, N)
                third |= (low | (high >> 1)) << (8 * k)
    return words, third


@triton.jit
def flat(x, N: tl.constexpr):
    """What :func:`stack` gives for one number a thread, as [64, N]."""
    return tl.reshape(x, (64, N))


@triton.jit
def column_of(x, C: tl.constexpr, N: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """Column C of [T, N, (R)], [T, R]."""
    if N > 1:
        even, odd = tl.split(tl.permute(tl.reshape(x, (T, N // 2, 2, R)), (0, 1, 3, 2)))
        return column_of(odd if C % 2 else even, C // 2, N // 2, R, T)
    else:
        return tl.reshape(x, (T, R))


@triton.jit
def four_columns(x, R: tl.constexpr, T: tl.constexpr):
    """The four columns of [T, 4, (R)], [T, R] each."""
    return (
        column_of(x, 0, 4, R, T),
        column_of(x, 1, 4, R, T),
        column_of(x, 2, 4, R, T),
        column_of(x, 3, 4, R, T),
    )


@triton.jit
def two_words(x):
    """The lower and the upper half of 64-bit words."""
    return x.to(tl.int32), (x >> 32).to(tl.int32)


@triton.jit
def key_side(low, high, R: tl.constexpr):
    """Words of a thread's columns (0, 1) and (2, 3), [64, R] each, as [R * 16, 16] fp16; R is 2 or 4."""
    x = tl.join(tl.join(first_half(low), second_half(low)), tl.join(first_half(high), second_half(high)))
    x = tl.reshape(x, (2, 8, 4, 2, R // 2, 2, 2))  # warp; q; r; row: 8, 32; b; i
    return tl.reshape(tl.permute(x, (4, 0, 3, 1, 2, 6, 5)), (R * 16, 16))


@triton.jit
def query_side(low, high, NG: tl.constexpr):
    """Words [32, NG] of query heads in fours of lanes as [16, 8 NG] fp16."""
    x = tl.join(tl.join(first_half(low), second_half(low)), tl.join(first_half(high), second_half(high)))
    if NG == 4:
        x = tl.reshape(x, (8, 4, 2, 2, 2, 2))  # head: 1; r; head: 8, 16; b; i
        x = tl.permute(x, (1, 5, 4, 3, 2, 0))
    else:
        x = tl.reshape(x, (8, 4, NG, 2, 2))  # head: 1; r; head: 8; b; i
        x = tl.permute(x, (1, 4, 3, 2, 0))
    return tl.reshape(x, (16, NG * 8))


@triton.jit
def _value_pair(even, odd):
    """Words of (two tokens) of channels 2c and 2c + 1: [64, S, token, channel] fp16."""
    return tl.join(tl.join(first_half(even), second_half(even)), tl.join(first_half(odd), second_half(odd)))


@triton.jit
def value_side(w0, w1, w2, w3, S: tl.constexpr):
    """Words of (two tokens) of a thread's channels 0 to 3, [64, S] each, as [64 channels, 8 S tokens] fp16.

    Rows are as :func:`channel_of_row` says.
    """
    x = tl.join(_value_pair(w0, w1), _value_pair(w2, w3))  # [64, S, token, channel, channel pair]
    # warp; q; r; tokens: 2, 16, 32, 64; token; channel; pair
    if S == 4:
        x = tl.permute(tl.reshape(x, (2, 8, 4, 2, 2, 2, 2, 2)), (7, 0, 6, 1, 4, 2, 3, 5))
    elif S == 8:
        x = tl.permute(tl.reshape(x, (2, 8, 4, 2, 2, 2, 2, 2, 2)), (8, 0, 7, 1, 5, 4, 2, 3, 6))
    else:
        x = tl.permute(tl.reshape(x, (2, 8, 4, 2, 2, 2, 2, 2, 2, 2)), (9, 0, 8, 1, 6, 5, 4, 2, 3, 7))
    return tl.reshape(x, (64, S * 8))


@triton.jit
def channel_of_row(
    row, PART: tl.constexpr, D: tl.constexpr, W: tl.constexpr, UPG: tl.constexpr, NP: tl.constexpr
):
    """Channel in row 0 to 63 of an output tile; PART is its unit of the group, times two, plus its field."""
    unit = (((row // 16) % 2) * 8 + row % 8) * UPG + PART // 2
    byte = (unit // NP) * 4 + (row // 32) * 2 + (row // 8) % 2
    return tl.where(unit < D // 8, (unit % NP) * W + byte + (PART % 2) * (D // 2), D)


@triton.jit
def rows_of(pointer, stride, row, first, last, N: tl.constexpr):
    """Numbers of a thread's rows as :func:`stack` joins them, fp32; of the nearest row for rows outside first to last."""
    if N == 1:
        return tl.load(pointer + tl.minimum(tl.maximum(row, first), last) * stride).to(tl.float32)
    else:
        return tl.join(
            rows_of(pointer, stride, row, first, last, N // 2),
            rows_of(pointer, stride, row + (8 if N == 2 else N * 8), first, last, N // 2),
        )


@triton.jit
def row_groups(x, J: tl.constexpr):
    """[64, R] of a thread's rows as a tuple of J [64, R / J], of 64 rows each; J is 1 or 2."""
    if J == 1:
        return x, x
    else:
        return tl.split(tl.reshape(x, (64, x.shape[1] // 2, 2)))


@triton.jit
def all_rows(s0, s1, J: tl.constexpr, GP: tl.constexpr):
    """The first J of two [., GP], one below the other."""
    if J == 1:
        return s0
    else:
        return tl.reshape(tl.permute(tl.join(s0, s1), (2, 0, 1)), (128, GP))


@triton.jit
def score_side(x, R: tl.constexpr, GP: tl.constexpr):
    """A number for each of a thread's rows, [64, R] (:func:`rows_of`), as [16 R, GP]."""
    if R == 8:
        x = tl.permute(tl.reshape(x, (2, 8, 4, 2, 2, 2)), (5, 4, 0, 3, 1, 2))  # warp; q; r; row: 8, 32, 64
    else:
        x = tl.permute(tl.reshape(x, (2, 8, 4, 2, R // 2)), (4, 0, 3, 1, 2))  # warp; q; r; row: 8, 32
    x = tl.reshape(x, (R * 16, 1, 4, 1))
    return tl.reshape(tl.broadcast_to(x, (R * 16, GP // 8, 4, 2)), (R * 16, GP))


@triton.jit
def over_rows(x, BS: tl.constexpr, GP: tl.constexpr):
    """Sums of a block's scores [BS, GP] over the rows that one thread holds, [2 warps, 8, GP]."""
    return tl.sum(tl.sum(tl.reshape(x, (BS // 32, 2, 2, 8, GP)), 2), 0)


@triton.jit
def any_row(x, BS: tl.constexpr, GP: tl.constexpr):
    """What all rows have in common, in the shape of :func:`over_rows`: one conversion of layouts less."""
    return tl.max(tl.max(tl.reshape(x, (BS // 32, 2, 2, 8, GP)), 2), 0)


@triton.jit
def turned(x01, x23, y01, y23, c01, c23, s01, s23):
    """Turned back by an angle: x cos + y sin, y cos - x sin, words of two fp16 numbers. Turned on with x and y swapped."""
    if INTERPRET:
        return (
            _half_rotation(x01, y01, c01, s01, 1.0),
            _half_rotation(x23, y23, c23, s23, 1.0),
            _half_rotation(y01, x01, c01, s01, -1.0),
            _half_rotation(y23, x23, c23, s23, -1.0),
        )
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t, a;
            mul.rn.f16x2 a, $4, $8; fma.rn.f16x2 $0, $6, $10, a;
            mul.rn.f16x2 a, $5, $9; fma.rn.f16x2 $1, $7, $11, a;
            neg.f16x2 t, $4; mul.rn.f16x2 a, $6, $8; fma.rn.f16x2 $2, t, $10, a;
            neg.f16x2 t, $5; mul.rn.f16x2 a, $7, $9; fma.rn.f16x2 $3, t, $11, a; }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
            [x01, x23, y01, y23, c01, c23, s01, s23],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _half_rotation(x, y, c, s, sign):
    low = fused((first_half(y) * sign).to(tl.float16), first_half(s), first_half(x) * first_half(c))
    high = fused((second_half(y) * sign).to(tl.float16), second_half(s), second_half(x) * second_half(c))
    return pack(low, high)


@triton.jit
def turned_once_rounded(x01, x23, y01, y23, c01, c23, s01, s23):
    """:func:`turned` in fp32. What is rounded of a query moves the scores of all tokens behind the angle alike."""
    x01, y01 = _pair_turned(x01, y01, c01, s01)
    x23, y23 = _pair_turned(x23, y23, c23, s23)
    return x01, x23, y01, y23


@triton.jit
def _pair_turned(x, y, c, s):
    x0, x1 = first_half(x).to(tl.float32), second_half(x).to(tl.float32)
    y0, y1 = first_half(y).to(tl.float32), second_half(y).to(tl.float32)
    c0, c1 = first_half(c).to(tl.float32), second_half(c).to(tl.float32)
    s0, s1 = first_half(s).to(tl.float32), second_half(s).to(tl.float32)
    x = pack((x0 * c0 + y0 * s0).to(tl.float16), (x1 * c1 + y1 * s1).to(tl.float16))
    y = pack((y0 * c0 - x0 * s0).to(tl.float16), (y1 * c1 - x1 * s1).to(tl.float16))
    return x, y


@triton.jit
def _small(number):
    """Numbers below 1024 as fp16 numbers to compare: 1024 + number, by setting bits."""
    return ((number & 1023) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _thread_row():
    """Of every 32 rows of a product, the first that each thread holds, [64, 1]."""
    thread = tl.arange(0, 64)[:, None]
    return (thread // 32) * 16 + (thread % 32) // 4


@triton.jit
def _entries_equal(
    rows, index, last, origin, D: tl.constexpr, DIVIDE: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """:func:`rows_equal` of 16 entries, still [64, R, 4]: a register's row and its entry of four.

    The compiler keeps the layout in which the entries are loaded only as long as no dimension is added after that.
    """
    first = (tl.arange(0, 64)[:, None, None] % 4) * 4
    number = tl.load(index + first + tl.arange(0, 4)[None, None, :], mask=first < last, other=0)
    number = number.to(tl.int32) & 0xFFFF
    number = number // D if DIVIDE else tl.where(origin < 0, number % D, number - origin)
    shape: tl.constexpr = (64, R, 4)
    return equal(tl.broadcast_to(_small(number), shape), tl.broadcast_to(_small(rows), shape))


@triton.jit
def rows_equal(
    rows, index, last, origin, D: tl.constexpr, DIVIDE: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """The 0/1 matrix [16 R, 32]: does entry e, if below ``last`` (a multiple of four more may be read), belong to this row?

    Args:
        rows: each register's row number, [64, R, 1]: of tokens if DIVIDE, else of channels.
        index: numbers token * D + channel, or of the layer's channels, of which this head's begin at ``origin`` >= 0.
    """
    one = tl.join(
        _entries_equal(rows, index, last, origin, D, DIVIDE, R),
        _entries_equal(rows, index + 16, last - 16, origin, D, DIVIDE, R),
    )
    one = tl.reshape(one, (2, 8, 4, R // 2, 2, 4, 2))  # warp; q; r; row: 32, 8; entry: 1, 16
    return tl.reshape(tl.permute(one, (3, 0, 4, 1, 6, 2, 5)), (R * 16, 32))


@triton.jit
def _places_equal(
    index, first, begin, end, closed, D: tl.constexpr, BS: tl.constexpr, V_ENTRIES: tl.constexpr,
):  # fmt: skip
    """:func:`tokens_equal` of the first or second rows that 64 threads hold, still [64, BS / 4]."""
    at = first + _thread_row()  # [64, 1]
    inside = (at >= begin) & (at < end)
    number = tl.load(index + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
    token = tl.where(closed, number // D, at // V_ENTRIES)
    column = tl.arange(0, BS // 4)[None, :]
    column = (column // 4) * 16 + (tl.arange(0, 64)[:, None] % 4) * 4 + column % 4
    return equal(tl.broadcast_to(_small(token), (64, BS // 4)), _small(column))


@triton.jit
def tokens_equal(
    index, first, begin, end, closed, D: tl.constexpr, BS: tl.constexpr, V_ENTRIES: tl.constexpr,
):  # fmt: skip
    """The 0/1 matrix [32, BS]: is entry ``first + e`` of value outliers of this token of the block?"""
    one = tl.join(
        _places_equal(index, first, begin, end, closed, D, BS, V_ENTRIES),
        _places_equal(index, first + 8, begin, end, closed, D, BS, V_ENTRIES),
    )
    one = tl.reshape(one, (2, 8, 4, BS // 16, 4, 2))  # warp; q; r; token: 16, 1; entry: 8
    return tl.reshape(tl.permute(one, (0, 5, 1, 3, 2, 4)), (32, BS))


@triton.jit
def row_of(R: tl.constexpr):
    """The row of a product that each register of each thread holds, [64, R, 1]."""
    p = tl.arange(0, R)[None, :, None]
    return _thread_row()[:, :, None] + (p // 2) * 32 + (p % 2) * 8
