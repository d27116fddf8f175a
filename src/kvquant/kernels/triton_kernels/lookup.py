"""From packed bytes to centroids inside a kernel: byte permutes on the GPU, plain loads in the interpreter.

A code selects a byte of a table held in two registers (PRMT: four look-ups an instruction), once for the low and once
for the high byte of fp16 centroids; sixteen centroids take two tables and a select. That is 1.3, 1.5 and 2.9
instructions per element at 2, 3 and 4 bits (counted below), where a shared-memory look-up stops at 32 elements per
clock and multiprocessor.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

# One word holds four neighbouring bytes of a plane. The nibbles of (word & 0x33333333) select, in this order: byte 0
# field 0, byte 0 field 2, byte 1 field 0, byte 1 field 2, ...; PRMT reads the lower four. Then 0x6240 joins low and
# high bytes to the two halves of one field, 0x7351 to those of the other.
_TAKE_2 = """
    prmt.b32 l, {lo0}, {lo1}, s;
    prmt.b32 h, {hi0}, {hi1}, s;
    prmt.b32 {even}, l, h, 0x6240;
    prmt.b32 {odd}, l, h, 0x7351;
"""


def _two_bit_asm(high_plane: bool) -> tuple[str, str]:
    """Assembly of four bytes of a 2-bit plane, with or without the 1-bit plane of 3-bit codes, and its constraints."""
    inputs = 3 if high_plane else 1  # code bytes; bytes of the 1-bit plane; which of them to shift
    tables = 4 if high_plane else 2
    first = 8 + inputs
    # A 32-bit argument comes once for each of the four packed elements; the first copy is used.
    table = [f"${first + 4 * k}" for k in range(tables)]
    lo0, hi0 = table[0], table[tables // 2]
    lo1, hi1 = (table[1], table[3]) if high_plane else ("z", "z")
    lines = ["{ .reg .b32 s, e, l, h, z, u; mov.b32 z, 0;"]
    if high_plane:
        # Channels of the upper half of the bytes have their bit one place higher.
        lines.append("shr.u32 u, $9, 1; lop3.b32 u, $9, u, $10, 0xD8;")
    for pair, shift in enumerate((0, 2)):
        lines.append("mov.b32 s, $8;" if shift == 0 else "shr.u32 s, $8, 2;")
        lines.append("and.b32 s, s, 0x33333333;")
        if high_plane:
            lines.append("shl.b32 e, u, 2;" if shift == 0 else "mov.b32 e, u;")
            lines.append("and.b32 e, e, 0x44444444; or.b32 s, s, e;")
        for half in range(2):
            even, odd = f"${2 * pair + half}", f"${2 * (pair + 2) + half}"
            lines.append(_TAKE_2.format(lo0=lo0, lo1=lo1, hi0=hi0, hi1=hi1, even=even, odd=odd))
            if half == 0:
                lines.append("shr.u32 s, s, 16;")
    lines.append("}")
    constraints = ",".join(["=&r"] * 8 + ["r"] * (inputs + 4 * tables))
    return "\n".join(lines), constraints


def _four_bit_asm() -> tuple[str, str]:
    """Assembly of four bytes of a 4-bit plane: both tables looked up, bit 3 of each code selects."""
    t = [f"${5 + 4 * k}" for k in range(8)]
    lines = ["{ .reg .b32 s, m, k, a, b, l, h, z, c; mov.b32 z, 0; mov.b32 c, 0xFF00;"]
    lines.append("and.b32 s, $4, 0x77777777; shr.u32 m, $4, 3; and.b32 m, m, 0x11111111;")
    for half in range(2):
        lines.append(f"""
    prmt.b32 k, c, z, m;
    prmt.b32 a, {t[0]}, {t[1]}, s; prmt.b32 b, {t[2]}, {t[3]}, s; lop3.b32 l, a, b, k, 0xD8;
    prmt.b32 a, {t[4]}, {t[5]}, s; prmt.b32 b, {t[6]}, {t[7]}, s; lop3.b32 h, a, b, k, 0xD8;
    prmt.b32 ${half}, l, h, 0x6240; prmt.b32 ${2 + half}, l, h, 0x7351;""")
        if half == 0:
            lines.append("shr.u32 s, s, 16; shr.u32 m, m, 16;")
    lines.append("}")
    return "\n".join(lines), ",".join(["=&r"] * 4 + ["r"] * 33)


_ASM_2, _CONSTRAINTS_2 = (tl.constexpr(x) for x in _two_bit_asm(False))
_ASM_3, _CONSTRAINTS_3 = (tl.constexpr(x) for x in _two_bit_asm(True))
_ASM_4, _CONSTRAINTS_4 = (tl.constexpr(x) for x in _four_bit_asm())


@triton.jit
def _half_bits(table, i):
    return tl.load(table + i).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def table_word(table, first, SHIFT: tl.constexpr):
    """Byte ``SHIFT // 8`` of four fp16 centroids, as one 32-bit word."""
    w = (_half_bits(table, first) >> SHIFT) & 255
    w |= ((_half_bits(table, first + 1) >> SHIFT) & 255) << 8
    w |= ((_half_bits(table, first + 2) >> SHIFT) & 255) << 16
    return w | (((_half_bits(table, first + 3) >> SHIFT) & 255) << 24)


@triton.jit
def _plain(code, table):
    return tl.load(table + code.to(tl.int32)).to(tl.float16)


@triton.jit
def fields_2(codes, lo0, hi0, table, INTERPRET: tl.constexpr):
    """The four channels of every byte of a 2-bit plane, as fp16 centroids: four tiles of the shape of ``codes``."""
    if INTERPRET:
        return (
            _plain(codes & 3, table),
            _plain((codes >> 2) & 3, table),
            _plain((codes >> 4) & 3, table),
            _plain((codes >> 6) & 3, table),
        )
    else:
        return tl.inline_asm_elementwise(
            _ASM_2,
            _CONSTRAINTS_2,
            [codes, lo0, hi0],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def fields_3(codes, high, upper, lo0, lo1, hi0, hi1, table, INTERPRET: tl.constexpr):
    """As :func:`fields_2` for 3-bit codes; ``upper`` is 255 where a byte's bits lie one place higher in ``high``."""
    if INTERPRET:
        bit = tl.where(upper != 0, high >> 1, high)
        return (
            _plain((codes & 3) | ((bit & 1) << 2), table),
            _plain(((codes >> 2) & 3) | (((bit >> 2) & 1) << 2), table),
            _plain(((codes >> 4) & 3) | (((bit >> 4) & 1) << 2), table),
            _plain(((codes >> 6) & 3) | (((bit >> 6) & 1) << 2), table),
        )
    else:
        return tl.inline_asm_elementwise(
            _ASM_3,
            _CONSTRAINTS_3,
            [codes, high, upper, lo0, lo1, hi0, hi1],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def fields_4(codes, lo0, lo1, lo2, lo3, hi0, hi1, hi2, hi3, table, INTERPRET: tl.constexpr):
    """The two channels of every byte of a 4-bit plane, as fp16 centroids."""
    if INTERPRET:
        return _plain(codes & 15, table), _plain((codes >> 4) & 15, table)
    else:
        return tl.inline_asm_elementwise(
            _ASM_4,
            _CONSTRAINTS_4,
            [codes, lo0, lo1, lo2, lo3, hi0, hi1, hi2, hi3],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
