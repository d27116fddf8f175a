"""Outliers of a block as a matrix in shared memory: zeros, except where a difference was stored for the tensor core to add.

Triton has no scatter, so the few instructions that store, load and wait are inline assembly, and the scratch is a static
array beside the memory that Triton manages. It is laid out in the order in which threads load their side of a product,
16 bytes at a time (fragments.py), so that a load is conflict-free and needs no shuffle. Every entry has a place of its
own, so that nothing depends on an order, and whoever stored a number stores the zero that removes it: a block costs two
loads and two stores per 64 outliers and 16 loads of the matrix per thread, whatever its outliers are.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.triton_kernels.lookup import INTERPRET, first_half, pack, second_half

STATIC_BYTES = 48 * 1024  # what a kernel may have unless it asks for more
TABLES = 128  # bytes of two look-up tables, two copies of each
ANGLES = tl.constexpr(1024)  # bytes for the angles of one block's first tokens, a word of each thread in turn
# Of a difference: fp16 holds the sum of two products with numbers up to a half.
LARGEST = tl.constexpr(32000.0)


def matrix_bytes(head_dim: int, block_size: int, key_units: int, columns: int) -> int:
    """Bytes of the matrix, which keys and values take turns with; 0 if a kernel may not declare as many.

    Args:
        key_units: units (lookup.py) of a row of keys that one lane of four decodes.
        columns: query heads that a program serves, with padding.
    """
    # Triton's own share: weights of a block on their way into two products, and sums. Only what it asks for itself may
    # go beyond the limit.
    dynamic = 2 * block_size * columns * 2 + 1024
    values = (1 if head_dim <= 128 else 2) * 2 * (block_size // 8)
    size = 1024 * max(key_units * (block_size // 16), values)
    return size if size + TABLES + ANGLES.value + dynamic <= STATIC_BYTES else 0


def declaration(matrix: int) -> str:
    """Assembly that declares the scratch (:func:`scratch_bytes`) and gives its address."""
    return f".shared .align 16 .b8 scratch[{scratch_bytes(matrix)}]; mov.u32 $0, scratch;"


def scratch_bytes(matrix: int) -> int:
    """Room for both look-up tables, a matrix of as many bytes and, if there is one, angles."""
    return TABLES + matrix + (ANGLES.value if matrix else 0)


@triton.jit
def ahead(pointers):
    """Ask for what the next block needs while this one is worked on: it comes from memory as far as the L2 cache."""
    if not INTERPRET:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
def allocate(DECLARATION: tl.constexpr, BYTES: tl.constexpr, look_up, memory):
    """The scratch's address: the 32 words of ``look_up`` (two copies of two tables), and a matrix of zeros after them.

    In the interpreter, whose programs run one after the other, it is ``memory``, and starts with zeros.
    """
    if INTERPRET:
        return memory
    else:
        scratch = tl.inline_asm_elementwise(DECLARATION, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        thread = tl.arange(0, 64) * 16
        for first in tl.static_range(0, BYTES, 1024):
            _store_words(scratch + 128 + first + thread, 0, 0, 0, 0)
        words = look_up + tl.arange(0, 8) * 4
        at = scratch + tl.arange(0, 8) * 16
        _store_words(at, tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3))
        tl.debug_barrier()
        return scratch


@triton.jit
def _store_words(at, a, b, c, d):
    tl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;", "=r,r,r,r,r,r", [at, a, b, c, d],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def fetch_tables(at):
    """Eight words of a look-up table, [64, 1] each.

    Read anew for every block, or both sides' would be held all the time; and from one of two copies, or the compiler
    sees that they are the same for all threads and keeps them where byte permutes cannot read them.
    """
    at += (tl.arange(0, 64) % 2) * 16
    a, b, c, d = _four_words(at[:, None])
    e, f, g, h = _four_words(at[:, None] + 32)
    return a, b, c, d, e, f, g, h


@triton.jit
def put(at, number, live):
    """Store fp16 numbers at these addresses where ``live``."""
    if INTERPRET:
        tl.store(at.to(tl.pointer_type(tl.float16)), number, mask=live)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.b16 [$1], $2; mov.b32 $0, 0; }", "=r,r,h,r",
            [at, number.to(tl.int16, bitcast=True), live.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _put_word(at, word, live):
    if INTERPRET:
        tl.store(at.to(tl.pointer_type(tl.int32)), word, mask=live)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, 0; }", "=r,r,r,r",
            [at, word, live.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def put_angles(at, a, words, WORDS: tl.constexpr):
    """Store the words number ``a`` of angles [units, (cos, sin), 4 r, 4 k] so that cosines and sines of a lane are neighbours."""
    to = ((a // 16) * 4 + (a // 2) % 4) * 4 + (a // 8) % 2 * 2 + a % 2
    _put_word(at + to * 4, words, a < WORDS)


@triton.jit
def fetch_angles(at, unit, lane):
    """Words of a unit's cosines (2) and sines (2), [32, 1] each."""
    cos01, cos23, sin01, sin23 = _four_words(at + (unit * 4 + lane % 4) * 16)
    return cos01[:, None], cos23[:, None], sin01[:, None], sin23[:, None]


@triton.jit
def _four_words(at):
    if INTERPRET:
        word = at.to(tl.pointer_type(tl.int32))
        return tl.load(word), tl.load(word + 1), tl.load(word + 2), tl.load(word + 3)
    else:
        return tl.inline_asm_elementwise(
            "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [at],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def fetch_keys(at, N: tl.constexpr):
    """Differences of a unit of keys at this address and of N - 1 further rows, joined as :func:`fragments.stack` does."""
    if N == 1:
        return _four_words(at)
    else:
        a0, a1, a2, a3 = fetch_keys(at, N // 2)
        b0, b1, b2, b3 = fetch_keys(at + N * 512, N // 2)
        return tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3)


@triton.jit
def fetch_values(at, N: tl.constexpr):
    """Differences of channels 0 to 3 of N pairs of tokens, [64, 2, 2, ...], joined as :func:`fragments.stack` does.

    Four words, two channels of tokens sixteen apart, are one operand of the tensor core as they come.
    """
    if N == 4:
        a0, a1, b0, b1 = _four_words(at)
        a2, a3, b2, b3 = _four_words(at + 1024)
        c0, c1, d0, d1 = _four_words(at + 2048)
        c2, c3, d2, d3 = _four_words(at + 3072)
        return (
            _square(a0, b0, c0, d0),
            _square(a1, b1, c1, d1),
            _square(a2, b2, c2, d2),
            _square(a3, b3, c3, d3),
        )
    else:
        a0, a1, a2, a3 = fetch_values(at, N // 2)
        b0, b1, b2, b3 = fetch_values(at + N * 512, N // 2)
        return tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3)


@triton.jit
def _square(a, b, c, d):
    return tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 2, 1))


@triton.jit
def key_place(number, D: tl.constexpr, W: tl.constexpr, CPL: tl.constexpr, NP: tl.constexpr, R: tl.constexpr):
    """Byte of the scratch that key number slot * D + channel has: unit, row, thread; field x or y, byte of the word."""
    t = number // D
    d = number % D
    x = d % (D // 2)
    word = (x % W) // 4
    row = 2 * (t // 32) + (t // 8) % 2
    thread = ((t // 16) % 2) * 32 + (t % 8) * 4 + word // CPL
    unit = (word % CPL) * NP + x // W
    return ((unit * R + row) * 64 + thread) * 16 + (d // (D // 2)) * 8 + (x % 4) * 2


@triton.jit
def value_place(t, d, D: tl.constexpr, W: tl.constexpr, NP: tl.constexpr, UPG: tl.constexpr, S: tl.constexpr):
    """Byte of the scratch that channel ``d`` of token ``t`` has: output tile, tokens, half of the channels, thread."""
    x = d % (D // 2)
    unit = ((x % W) // 4) * NP + x // W
    group = unit // UPG
    thread = (group // 8) * 32 + (group % 8) * 4 + (t // 4) % 4
    tile = (unit % UPG) * 2 + d // (D // 2)
    channel = x % W % 4
    row = 4 * (t // 32) + 2 * ((t // 2) % 2) + channel // 2
    return ((tile * S + row) * 64 + thread) * 16 + ((t // 16) % 2) * 8 + (channel % 2) * 4 + (t % 2) * 2


@triton.jit
def half_add(x, y):
    """The sum of words of two fp16 numbers."""
    if INTERPRET:
        return pack(first_half(x) + first_half(y), second_half(x) + second_half(y))
    else:
        return tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def divergent_zero(upper):
    """Zero, but the compiler cannot know that threads agree on it; ``upper`` is 65536.

    Added to the address of a number that all threads share, it keeps that number out of uniform registers: moved there
    at once, it would be waited for as soon as it is asked for.
    """
    if INTERPRET:
        return 0
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; mov.u32 t, %tid.x; mul.hi.u32 $0, t, $1; }", "=r,r", [upper], dtype=tl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip


@triton.jit
def key_counts(key_count, spill_head, at):
    """How many key outliers a block and head has, those in its chain included, and the chain's first chunk if there is one."""
    return tl.load(key_count + at), tl.load(spill_head + at)


@triton.jit
def key_row(key_index, key_value, spill_index, spill_value, at, chunk, pair, count, K_BASE: tl.constexpr):
    """Pairs of entries of the own row of a block and head, and behind them of its chain's first chunk: two words.

    They stay words until they are needed (:func:`unsigned_half`, :func:`float_half`): taking one apart waits for it.
    """
    own = pair < K_BASE // 2
    inside = own | (2 * pair < tl.minimum(count, K_BASE + 32))
    row = at * (K_BASE // 2) + pair
    behind = chunk.to(tl.int64) * 16 - K_BASE // 2 + pair
    word: tl.constexpr = tl.pointer_type(tl.int32)
    number = tl.where(own, key_index.to(word) + row, spill_index.to(word) + behind)
    kept = tl.where(own, key_value.to(word) + row, spill_value.to(word) + behind)
    return tl.load(number, mask=inside, other=0), tl.load(kept, mask=inside, other=0)


@triton.jit
def value_row(value_index, value_value, pair, end):
    """Pairs of entries of a block's value outliers, from an even one; those from ``end`` on are not read."""
    word: tl.constexpr = tl.pointer_type(tl.int32)
    inside = pair * 2 < end
    number = tl.load(value_index.to(word) + pair, mask=inside, other=0)
    return number, tl.load(value_value.to(word) + pair, mask=inside, other=0)


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
def value_ends(value_end, at, h, H):
    """Of a block whose ends begin at ``at``: this head's first entry and the one behind its last, and the block's last: 0 while it is open."""
    ends = value_end + at
    return tl.load(ends + h - 1, mask=h > 0, other=0), tl.load(ends + h), tl.load(ends + H - 1)


@triton.jit
def key_entry(
    number, kept, entry, count, floor, inverse_size, scratch, D: tl.constexpr, W: tl.constexpr, CPL: tl.constexpr,
    NP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Addresses of key outliers (of those with ``entry`` below ``count``) and, in fp16, their differences to what code 0 decodes to, relative to the largest key."""
    delta = kept * inverse_size - tl.load(floor + number % D, mask=entry < count, other=0.0)
    delta = tl.minimum(tl.maximum(delta, -LARGEST), LARGEST).to(tl.float16)
    return scratch + key_place(number, D, W, CPL, NP, R).to(tl.int32), delta


@triton.jit
def key_pair(
    numbers, kept, pair, count, floor, inverse_size, scratch, DTYPE: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    CPL: tl.constexpr, NP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """:func:`key_entry` of entries 2 ``pair`` and behind it (:func:`key_row`)."""
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
    """Store the ``count`` outliers behind a block's first ``chunk`` of further ones, or zeros in their places."""
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
    """:func:`value_entry` of the entries ``first`` and behind it, and which of them are there."""
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
