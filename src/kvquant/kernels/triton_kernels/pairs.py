"""Pairs of 16-bit floats in one int32, the first in its lower half: compared, and the larger kept, two at a time.

A comparison answers with a mask, 16 bits set in each half where it holds. ``BF16`` names the type, else fp16. What a GPU
has no instruction for, and the interpreter, takes the halves apart.
"""

# Kernels take tensors and constants, which have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined, assignment, misc"
# Nor can tuples in them, which grow, be unpacked into others.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.triton_kernels.lookup import INTERPRET


@triton.jit
def number(bits, BF16: tl.constexpr):
    """The lower 16 bits as an fp32 number."""
    if BF16:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def twice(bits):
    """A pair of the same number, from its 16 bits."""
    return (bits & 0xFFFF) | (bits << 16)


@triton.jit
def joined(first, second):
    """A pair, from the lower 16 bits of each."""
    return (first & 0xFFFF) | (second << 16)


@triton.jit
def order(bits):
    """Sign-extended 16 bits as an int of the order of the numbers, -0 below +0; and back, since it undoes itself."""
    return bits ^ ((bits >> 31) & 0x7FFF)


@triton.jit
def first(pair):
    """The first number's bits, sign-extended."""
    return (pair << 16) >> 16


@triton.jit
def second(pair):
    """The second number's bits, sign-extended."""
    return pair >> 16


@triton.jit
def larger(a, b, BF16: tl.constexpr):
    """The larger of both, of each half; NaN only where both are."""
    if INTERPRET:
        return joined(_larger(a, b, BF16), _larger(a >> 16, b >> 16, BF16))
    elif BF16:
        return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _larger(a, b, BF16: tl.constexpr):
    x, y = number(a, BF16), number(b, BF16)
    return tl.where((x >= y) | (y != y), a, b)


@triton.jit
def smaller(a, b, BF16: tl.constexpr):
    """The smaller of both, of each half; NaN only where both are."""
    if INTERPRET:
        return joined(_smaller(a, b, BF16), _smaller(a >> 16, b >> 16, BF16))
    elif BF16:
        return tl.inline_asm_elementwise("min.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("min.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _smaller(a, b, BF16: tl.constexpr):
    x, y = number(a, BF16), number(b, BF16)
    return tl.where((x <= y) | (y != y), a, b)


@triton.jit
def _halves_compare(a, b, BF16: tl.constexpr, STRICT: tl.constexpr):
    a1, b1, a2, b2 = number(a, BF16), number(b, BF16), number(a >> 16, BF16), number(b >> 16, BF16)
    if STRICT:
        return tl.where(a1 > b1, 0xFFFF, 0) | tl.where(a2 > b2, -65536, 0)
    else:
        return tl.where(a1 >= b1, 0xFFFF, 0) | tl.where(a2 >= b2, -65536, 0)


@triton.jit
def above(a, b, BF16: tl.constexpr):
    """Mask of ``a`` > ``b``."""
    if INTERPRET:
        return _halves_compare(a, b, BF16, True)
    elif not BF16:
        return tl.inline_asm_elementwise("set.gt.u32.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)
    elif tl.target_info.cuda_capability_geq(9, 0):
        return tl.inline_asm_elementwise("set.gt.u32.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)
    else:
        return _halves_compare(a, b, BF16, True)


@triton.jit
def reaches(a, b, BF16: tl.constexpr):
    """Mask of ``a`` >= ``b``."""
    if INTERPRET:
        return _halves_compare(a, b, BF16, False)
    elif not BF16:
        return tl.inline_asm_elementwise("set.ge.u32.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)
    elif tl.target_info.cuda_capability_geq(9, 0):
        return tl.inline_asm_elementwise("set.ge.u32.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)
    else:
        return _halves_compare(a, b, BF16, False)


@triton.jit
def half_way(a, b, BF16: tl.constexpr):
    """The mean of both, rounded: one of them where no other number lies between."""
    if INTERPRET:
        return joined(_half_way(a, b, BF16), _half_way(a >> 16, b >> 16, BF16))
    elif BF16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 h, z, t; mov.b32 h, 0x3F003F00; mov.b32 z, 0x80008000;"
            "fma.rn.bf16x2 t, $1, h, z; fma.rn.bf16x2 $0, $2, h, t; }",
            "=r,r,r", [a, b], tl.int32, True, 1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 h, t; mov.b32 h, 0x38003800; mul.rn.f16x2 t, $1, h; fma.rn.f16x2 $0, $2, h, t; }",
            "=r,r,r", [a, b], tl.int32, True, 1,
        )  # fmt: skip


@triton.jit
def _half_way(a, b, BF16: tl.constexpr):
    mean = number(a, BF16) * 0.5 + number(b, BF16) * 0.5
    if BF16:
        return mean.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        return mean.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def spoilt(pair, so_far, BF16: tl.constexpr):
    """``so_far`` (0 at first) made anything but a zero in a half that ever held infinity or NaN."""
    if INTERPRET:
        LEAST: tl.constexpr = 0x7F80 if BF16 else 0x7C00
        bad = tl.where((pair & 0x7FFF) >= LEAST, 1, 0) | tl.where(((pair >> 16) & 0x7FFF) >= LEAST, 65536, 0)
        return so_far | bad
    elif BF16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0; fma.rn.bf16x2 $0, $1, z, $2; }",
            "=r,r,r", [pair, so_far], tl.int32, True, 1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0; fma.rn.f16x2 $0, $1, z, $2; }",
            "=r,r,r", [pair, so_far], tl.int32, True, 1,
        )  # fmt: skip


@triton.jit
def counted(mask_sum):
    """From a sum of masks, how often the first half was set, and from bit 16 on how often the second was."""
    return mask_sum * -0x10001


@triton.jit
def spread(a, b, BYTE: tl.constexpr):
    """A mask whose first half is the top bit of byte ``BYTE`` of ``a``, and whose second that of ``b``."""
    if INTERPRET:
        first_half = tl.where((a >> (8 * BYTE + 7)) & 1 != 0, 0xFFFF, 0)
        return first_half | tl.where((b >> (8 * BYTE + 7)) & 1 != 0, -65536, 0)
    elif BYTE == 0:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0xCC88;", "=r,r,r", [a, b], tl.int32, True, 1)
    elif BYTE == 1:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0xDD99;", "=r,r,r", [a, b], tl.int32, True, 1)
    elif BYTE == 2:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0xEEAA;", "=r,r,r", [a, b], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0xFFBB;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def bytes_of_halves(word):
    """Bytes 0, 2, 1, 3: two pairs of bytes, taken from halves two apart, in order."""
    if INTERPRET:
        return (word & -0xFFFF01) | ((word >> 8) & 0xFF00) | ((word << 8) & 0xFF0000)
    else:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0x3120;", "=r,r", [word], tl.int32, True, 1)


@triton.jit
def select(mask, a, b):
    """``a`` where ``mask``, else ``b``."""
    return (a & mask) | (b & ~mask)


@triton.jit
def top_bits(pair):
    """Mask of the halves whose top bit is set."""
    if INTERPRET:
        return tl.where(pair & 0x8000 != 0, 0xFFFF, 0) | tl.where(pair < 0, -65536, 0)
    else:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0xBB99;", "=r,r", [pair], tl.int32, True, 1)


@triton.jit
def floor_bits(number, BF16: tl.constexpr):
    """Bits of the largest 16-bit number that does not exceed an fp32 one: the same 16-bit numbers are above both."""
    if BF16:
        bits = number.to(tl.int32, bitcast=True)
        return (bits + ((bits >> 31) & 0xFFFF)) >> 16
    else:
        near = number.to(tl.float16)
        place = order(near.to(tl.int16, bitcast=True).to(tl.int32))
        return order(tl.where(near.to(tl.float32) > number, place - 1, place))


@triton.jit
def _half_of(upper, t, LEFT: tl.constexpr):
    """The upper or the lower 2**LEFT - 1 thresholds."""
    chosen = ()
    for k in tl.static_range((1 << LEFT) - 1):
        chosen = chosen + (select(upper, t[(1 << LEFT) + k], t[k]),)
    return chosen


@triton.jit
def code_of_pair(x, t, BITS: tl.constexpr, BF16: tl.constexpr):
    """Minus the sum of masks that :func:`counted` makes the codes of a pair."""
    upper = above(x, t[(1 << (BITS - 1)) - 1], BF16)
    code = upper
    for level in tl.static_range(1, BITS):
        t = _half_of(upper, t, BITS - level)
        upper = above(x, t[(1 << (BITS - 1 - level)) - 1], BF16)
        code = code * 2 + upper
    return code


@triton.jit
def high_and_low(x, t, BF16: tl.constexpr):
    """Codes of 3 bits as :func:`code_of_pair` gives them, the highest bit and the others apart."""
    high = above(x, t[3], BF16)
    t = _half_of(high, t, 2)
    return high, code_of_pair(x, t, 2, BF16)


@triton.jit
def weight_in_half(n: tl.constexpr, p: tl.constexpr):
    """The bits of pair p of the n-th eight channels in half a mark of sixteen, the second channel's in the upper half."""
    WEIGHT: tl.constexpr = (1 << (8 * (n % 2) + 2 * p)) | (1 << (16 + 8 * (n % 2) + 2 * p + 1))
    return tl.constexpr(WEIGHT - (1 << 32) if WEIGHT >= 1 << 31 else WEIGHT)
