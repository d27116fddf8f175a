"""From packed words to fp16 numbers inside a kernel: byte permutes on the GPU, plain loads in the interpreter.

A code selects a byte of a table held in two registers (PRMT: four look-ups an instruction), once for the low and once
for the high byte of fp16 centroids; sixteen centroids take two tables and a select. That is 1.3, 1.5 and 2.9
instructions per element at 2, 3 and 4 bits, where a shared-memory look-up stops at 32 elements per clock and
multiprocessor. Keys go on in the same registers, two fp16 numbers an instruction: their channel's range and the
rotation by their place in the block, 1.5 instructions per element.

A unit is what one word (four neighbouring bytes of a plane) gives at once: four channels of two fields whose channels
are D/2 apart, RoPE partners. A 4-bit word is one unit (its low and high nibbles), a 2-bit word two (fields 0 and 2, 1
and 3; the second after a shift by two); 3 bits are 2-bit words with a word of third bits. All results are int32 words
of two fp16 numbers.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

# Whether kernels run in Triton's interpreter, which knows no inline assembly; settled when this is imported.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False)
_TABLES = {2: 2, 3: 4, 4: 8}  # registers of a table: four bytes each, low bytes first


class _Operands:
    """Hand out operand numbers in order."""

    def __init__(self) -> None:
        self.count = 0

    def take(self, registers: int) -> list[str]:
        """The next ``registers`` operands."""
        self.count += registers
        return [f"${k}" for k in range(self.count - registers, self.count)]


def _look_up(bits: int, table: list[str]) -> list[str]:
    """Bytes l and h of the four codes that the lower half of ``s`` (and, at 4 bits, of ``m``) selects."""
    lo, hi = table[: len(table) // 2], table[len(table) // 2 :]
    if bits == 4:
        return [
            f"prmt.b32 a, {lo[0]}, {lo[1]}, s; prmt.b32 b, {lo[2]}, {lo[3]}, s; prmt.b32 l, a, b, m;",
            f"prmt.b32 a, {hi[0]}, {hi[1]}, s; prmt.b32 b, {hi[2]}, {hi[3]}, s; prmt.b32 h, a, b, m;",
        ]
    second_lo, second_hi = (lo[1], hi[1]) if bits == 3 else ("z", "z")
    return [f"prmt.b32 l, {lo[0]}, {second_lo}, s; prmt.b32 h, {hi[0]}, {second_hi}, s;"]


def _select(bits: int, word: str, third: str) -> list[str]:
    """Selectors ``s`` (and ``m``) from the nibbles of ``word`` and, for 3 bits, of ``third``."""
    if bits == 4:
        # Byte i of the first or, plus four, of the second table's four bytes.
        return [
            f"and.b32 s, {word}, 0x77777777; shr.u32 m, {word}, 1; mov.b32 k, 0x32103210;",
            "lop3.b32 m, m, 0x44444444, k, 0xEA;",
        ]
    lines = [f"and.b32 s, {word}, 0x33333333;"]
    if bits == 3:
        lines.append(f"shl.b32 m, {third}, 2; lop3.b32 s, m, 0x44444444, s, 0xEA;")  # (m & mask) | s
    return lines


def _next_half(bits: int, shift: str) -> str:
    """Selectors of the upper half: a shift as a product, because the pipe that shifts is the busier one."""
    lines = f"mul.wide.u32 q, s, {shift}; mov.b64 {{t, s}}, q;"
    return lines + (f" mul.wide.u32 q, m, {shift}; mov.b64 {{t, m}}, q;" if bits == 4 else "")


_REGISTERS = "{ .reg .b64 q; .reg .b32 s, m, k, a, b, l, h, z, t, w, u, x, y; mov.b32 z, 0;"


def _key_assembly(bits: int) -> tuple[str, str]:
    """x01, x23, y01, y23 from: word, third bits (3 bits only), tables, 65536, scales and zeros of x and y."""
    operands = _Operands()
    out = operands.take(4)
    word, third = operands.take(1)[0], operands.take(1)[0] if bits == 3 else ""
    table, upper = operands.take(_TABLES[bits]), operands.take(1)[0]
    scale_x, zero_x, scale_y, zero_y = (operands.take(2) for _ in range(4))
    lines = [_REGISTERS, *_select(bits, word, third)]
    for half in range(2):
        lines += _look_up(bits, table)
        lines.append("prmt.b32 x, l, h, 0x6240; prmt.b32 y, l, h, 0x7351;")
        if half == 0:
            lines.append(_next_half(bits, upper))
        lines.append(f"fma.rn.f16x2 {out[half]}, x, {scale_x[half]}, {zero_x[half]};")
        lines.append(f"fma.rn.f16x2 {out[2 + half]}, y, {scale_y[half]}, {zero_y[half]};")
    return "\n".join([*lines, "}"]), ",".join(["=&r"] * 4 + ["r"] * (operands.count - 4))


def _value_assembly(bits: int, field: int) -> tuple[str, str]:
    """Channels 0 to 3 of one field, each a word of (token a, token b), from the two tokens' words.

    Operands: a, b, their third bits (3 bits only), the unit's shift (2 and 3 bits), tables. The tokens' nibbles are
    interleaved before the look-up, so that pairing tokens, as a tensor core wants them, costs a quarter of an
    instruction per element.
    """
    operands = _Operands()
    out = operands.take(4)
    words = operands.take(2)
    thirds = operands.take(2) if bits == 3 else []
    shift = operands.take(1)[0] if bits < 4 else ""
    table, upper = operands.take(_TABLES[bits]), operands.take(1)[0]
    move = "shr.u32 t, {0}, 4; lop3.b32 {2}, t, {1}" if field else "shl.b32 t, {1}, 4; lop3.b32 {2}, {0}, t"
    nibbles = move + ", 0x0F0F0F0F, 0xE4;"  # mask ? first : second
    lines = [_REGISTERS, nibbles.format(*words, "w")]
    if bits < 4:
        lines.append(f"shr.u32 w, w, {shift};")
    if bits == 3:
        lines.append(nibbles.format(*thirds, "u") + f" shr.u32 u, u, {shift};")
    lines += _select(bits, "w", "u")
    for half in range(2):
        lines += _look_up(bits, table)
        lines.append(f"prmt.b32 {out[2 * half]}, l, h, 0x5140; prmt.b32 {out[2 * half + 1]}, l, h, 0x7362;")
        if half == 0:
            lines.append(_next_half(bits, upper))
    return "\n".join([*lines, "}"]), ",".join(["=&r"] * 4 + ["r"] * (operands.count - 4))


_KEY_2, _KEY_2_C = (tl.constexpr(x) for x in _key_assembly(2))
_KEY_3, _KEY_3_C = (tl.constexpr(x) for x in _key_assembly(3))
_KEY_4, _KEY_4_C = (tl.constexpr(x) for x in _key_assembly(4))
_VALUE_2, _VALUE_2_C, _VALUE_2B, _ = (tl.constexpr(x) for f in (0, 1) for x in _value_assembly(2, f))
_VALUE_3, _VALUE_3_C, _VALUE_3B, _ = (tl.constexpr(x) for f in (0, 1) for x in _value_assembly(3, f))
_VALUE_4, _VALUE_4_C, _VALUE_4B, _ = (tl.constexpr(x) for f in (0, 1) for x in _value_assembly(4, f))


@triton.jit
def _half_bits(table, i):
    return tl.load(table + i).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def _table_word(table, first, SHIFT: tl.constexpr):
    """Byte ``SHIFT // 8`` of four fp16 centroids, as one 32-bit word."""
    w = (_half_bits(table, first) >> SHIFT) & 255
    w |= ((_half_bits(table, first + 1) >> SHIFT) & 255) << 8
    w |= ((_half_bits(table, first + 2) >> SHIFT) & 255) << 16
    return w | (((_half_bits(table, first + 3) >> SHIFT) & 255) << 24)


@triton.jit
def load_tables(centroids, BITS: tl.constexpr):
    """Words of the look-up tables, low bytes and high bytes; those a width has no use for repeat the first."""
    lo0 = _table_word(centroids, 0, 0)
    hi0 = _table_word(centroids, 0, 8)
    lo1 = lo0
    lo2 = lo0
    lo3 = lo0
    hi1 = hi0
    hi2 = hi0
    hi3 = hi0
    if BITS >= 3:
        lo1 = _table_word(centroids, 4, 0)
        hi1 = _table_word(centroids, 4, 8)
    if BITS == 4:
        lo2 = _table_word(centroids, 8, 0)
        hi2 = _table_word(centroids, 8, 8)
        lo3 = _table_word(centroids, 12, 0)
        hi3 = _table_word(centroids, 12, 8)
    return lo0, lo1, lo2, lo3, hi0, hi1, hi2, hi3


@triton.jit
def first_half(word):
    """The lower fp16 number of each word."""
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def second_half(word):
    """The upper fp16 number of each word."""
    return ((word >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def pack(low, high):
    """Words of two fp16 numbers."""
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | ((high.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) << 16)


@triton.jit
def _plain(word, third, shift, table, BYTE: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr):
    """The centroid of one byte's code, by a plain load: field 0 or 1 of the unit."""
    if BITS == 4:
        code = (word >> (8 * BYTE + 4 * FIELD)) & 15
    else:
        code = (word >> (8 * BYTE + 4 * FIELD + shift)) & 3
        if BITS == 3:
            code |= ((third >> (8 * BYTE + 4 * FIELD + shift)) & 1) << 2
    return tl.load(table + code).to(tl.float16)


@triton.jit
def fused(x, y, z):
    """x y + z of fp16 numbers, rounded once (twice in one of thousands of cases), as the GPU's instruction does."""
    return (x.to(tl.float32) * y.to(tl.float32) + z.to(tl.float32)).to(tl.float16)


@triton.jit
def _plain_key_pair(
    word, third, shift, table, scale, zero, FIRST: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr
):
    a = _plain(word, third, shift, table, FIRST, FIELD, BITS)
    b = _plain(word, third, shift, table, FIRST + 1, FIELD, BITS)
    return pack(
        fused(a, first_half(scale), first_half(zero)), fused(b, second_half(scale), second_half(zero))
    )


@triton.jit
def key_words(
    word, third, tables, table, upper, sx01, sx23, zx01, zx23, sy01, sy23, zy01, zy23,
    SHIFT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A unit of keys, dequantized: x01, x23 and their RoPE partners y01, y23.

    Args:
        word, third: codes and, for 3 bits, third bits, int32 of any shape; ``third`` is not yet shifted by SHIFT.
        tables, table: from :func:`load_tables`; the centroids themselves, fp32.
        upper: 65536, not known to the compiler, which would make shifts of the products with it.
        sx01 to zy23: scales and zeros of the unit's channels, words of two fp16 numbers.
        SHIFT: 2 for the second unit of a 2 or 3-bit word, else 0.
    """
    OUT: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
    if INTERPRET:
        return (
            _plain_key_pair(word, third, SHIFT, table, sx01, zx01, 0, 0, BITS),
            _plain_key_pair(word, third, SHIFT, table, sx23, zx23, 2, 0, BITS),
            _plain_key_pair(word, third, SHIFT, table, sy01, zy01, 0, 1, BITS),
            _plain_key_pair(word, third, SHIFT, table, sy23, zy23, 2, 1, BITS),
        )
    elif BITS == 4:
        return tl.inline_asm_elementwise(
            _KEY_4, _KEY_4_C,
            [word, tables[0], tables[1], tables[2], tables[3], tables[4], tables[5], tables[6], tables[7], upper,
             sx01, sx23, zx01, zx23, sy01, sy23, zy01, zy23], dtype=OUT, is_pure=False, pack=1,
        )  # fmt: skip
    elif BITS == 3:
        return tl.inline_asm_elementwise(
            _KEY_3, _KEY_3_C,
            [word >> SHIFT, third >> SHIFT, tables[0], tables[1], tables[4], tables[5], upper,
             sx01, sx23, zx01, zx23, sy01, sy23, zy01, zy23], dtype=OUT, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            _KEY_2, _KEY_2_C,
            [word >> SHIFT, tables[0], tables[4], upper, sx01, sx23, zx01, zx23, sy01, sy23, zy01, zy23],
            dtype=OUT, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _plain_tokens(
    a, b, third_a, third_b, shift, table, BYTE: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr
):
    return pack(
        _plain(a, third_a, shift, table, BYTE, FIELD, BITS),
        _plain(b, third_b, shift, table, BYTE, FIELD, BITS),
    )


@triton.jit
def value_words(
    a, b, third_a, third_b, shift, tables, table, upper,
    FIELD: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One field of a unit of values of two tokens: its channels 0 to 3, words of (a, b).

    ``shift`` is 2 for the second unit of a 2 or 3-bit word, else 0, int32 of a shape that broadcasts.
    """
    OUT: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
    if INTERPRET:
        return (
            _plain_tokens(a, b, third_a, third_b, shift, table, 0, FIELD, BITS),
            _plain_tokens(a, b, third_a, third_b, shift, table, 1, FIELD, BITS),
            _plain_tokens(a, b, third_a, third_b, shift, table, 2, FIELD, BITS),
            _plain_tokens(a, b, third_a, third_b, shift, table, 3, FIELD, BITS),
        )
    elif BITS == 4:
        return tl.inline_asm_elementwise(
            _VALUE_4B if FIELD else _VALUE_4, _VALUE_4_C,
            [a, b, tables[0], tables[1], tables[2], tables[3], tables[4], tables[5], tables[6], tables[7], upper], dtype=OUT, is_pure=False, pack=1,
        )  # fmt: skip
    elif BITS == 3:
        return tl.inline_asm_elementwise(
            _VALUE_3B if FIELD else _VALUE_3, _VALUE_3_C,
            [a, b, third_a, third_b, shift, tables[0], tables[1], tables[4], tables[5], upper], dtype=OUT, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            _VALUE_2B if FIELD else _VALUE_2, _VALUE_2_C,
            [a, b, shift, tables[0], tables[4], upper], dtype=OUT, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def equal(x, y):
    """1.0 where fp16 numbers are equal, else 0.0: two comparisons an instruction."""
    if INTERPRET:
        return tl.where(x == y, 1.0, 0.0).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            "set.eq.f16x2.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.float16, is_pure=True, pack=2
        )
