"""Rotation of a call's tokens to their positions in one launch, rounded once.

In plain PyTorch it takes some eight passes over fp32 copies of the queries.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIRS = 2048  # of one program at most: 16 of each of its threads


@triton.jit
def _rotate_tokens(
    x, cos, sin, out, token_stride, head_stride, H,
    D: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, REST_P: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    j = tl.arange(0, HALF_P)
    live = (head < H)[:, None]
    there = live & (j < HALF)[None, :]
    # Heads may be further apart than 32 bits count: [H, T, D] of a long call.
    source = x + token * token_stride + (head.to(tl.int64) * head_stride)[:, None]
    to = out + token * H * D + (head * D)[:, None]
    c = tl.load(cos + token * (2 * HALF) + j, mask=j < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * (2 * HALF) + j, mask=j < HALF, other=0.0)[None, :]
    first = tl.load(source + j[None, :], mask=there, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + j[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(to + j[None, :], (first * c - second * s).to(out.dtype.element_ty), mask=there)
    tl.store(to + HALF + j[None, :], (second * c + first * s).to(out.dtype.element_ty), mask=there)
    if 2 * HALF < D:
        d = 2 * HALF + tl.arange(0, REST_P)
        rest = live & (d < D)[None, :]
        kept = tl.load(source + d[None, :], mask=rest, other=0.0)
        tl.store(to + d[None, :], kept.to(out.dtype.element_ty), mask=rest)


def rotate_tokens(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotate tokens [T, H, D], of any strides between tokens and heads; see ``reference.rotate_tokens``."""
    T, H, D = x.shape
    half = cos.shape[-1] // 2
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(T, H, D, dtype=dtype, device=x.device)
    pairs = triton.next_power_of_2(max(1, half))
    heads = min(triton.next_power_of_2(H), max(1, _PAIRS // pairs))
    # Products and sums are rounded one by one, so that the numbers are PyTorch's.
    _rotate_tokens[(T, triton.cdiv(H, heads))](
        x, cos.contiguous(), sin.contiguous(), out, x.stride(0), x.stride(1), H,
        D=D, HALF=half, HALF_P=pairs, REST_P=triton.next_power_of_2(max(1, D - 2 * half)), HEADS=heads,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
