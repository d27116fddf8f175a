"""What a program of decode keeps in shared memory: look-up tables, a matrix of a block's outliers, angles.

Outliers are a matrix of zeros, except where a difference was stored for the tensor core to add (outlier_entries.py).
Triton has no scatter, so the few instructions that store, load and wait are inline assembly, and the scratch is a
static array beside the memory that Triton manages. The matrix is laid out in the order in which threads load their
side of a product, 16 bytes at a time (fragments.py), so that a load is conflict-free and needs no shuffle. Every entry
has a place of its own, so that nothing depends on an order, and whoever stored a number stores the zero that removes
it: a block costs a thread two loads and four stores per 128 outliers, and 16 loads of the matrix, wherever they lie.

Angles are what queries are turned back by, the same for every fourth thread. Through here each word is asked for once,
a block ahead, and handed to them behind the barriers that the matrix needs anyway.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.triton_kernels.lookup import INTERPRET, first_half, pack, second_half

STATIC_BYTES = 48 * 1024  # what a kernel may have unless it asks for more
TABLES = 128  # bytes of two look-up tables, two copies of each
ANGLES = 1024  # bytes of a block's angles at most: cosines and sines of 128 pairs of channels, for two tokens


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
    return size if size + TABLES + ANGLES + dynamic <= STATIC_BYTES else 0


def declaration(matrix: int) -> str:
    """Assembly that declares the scratch (:func:`scratch_bytes`) and gives its address."""
    return f".shared .align 16 .b8 scratch[{scratch_bytes(matrix)}]; mov.u32 $0, scratch;"


def scratch_bytes(matrix: int) -> int:
    """Room for both look-up tables, a matrix of as many bytes and, if there is one, a block's angles behind it."""
    return TABLES + matrix + (ANGLES if matrix else 0)


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
    """Store words number ``a`` of angles [units, (cos, sin), 4 r, 4 k], cosines and sines of a lane side by side."""
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
    """Differences of a unit of keys at this address and N - 1 further rows, joined as :func:`fragments.stack` does."""
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
