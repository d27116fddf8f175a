"""Parts, what each of the programs that shared a sequence's blocks found, merged by log-sum-exp in a fixed order."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.triton_kernels.fragments import channel_of_row


@triton.jit
def store_part(
    part_out, at_part, acc, G: tl.constexpr, GP: tl.constexpr, PART: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    UPG: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """Store the output of one part as the decode kernel holds it: tile number ``PART`` of its channels, [64, GP]."""
    channels = channel_of_row(tl.arange(0, 64), PART, D, W, UPG, NP)[:, None]
    inside = (tl.arange(0, GP)[None, :] < G) & (channels < D)
    tl.store(part_out + at_part[None, :] * D + channels, acc, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def _merge_kernel(
    part_best, part_total, part_out, parts, out, programs, H, SINKS: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Fold the parts of one query head; a part that saw nothing has -inf and counts for nothing.

    Parts are [programs, H, GP (, D)], those of a sequence in a row (shares.py); with SINKS one more for each sequence
    stands behind them.
    """
    head = tl.program_id(0)
    b = head // (H * G)
    h = head // G % H
    g = head % G
    first = tl.load(parts + b * 2)
    count = tl.load(parts + b * 2 + 1)
    every = count + SINKS
    d = tl.arange(0, DP)
    part = tl.arange(0, 16)
    highest = tl.full((16,), -float("inf"), tl.float32)
    for s in range(0, every, 16):
        place = tl.where(s + part < count, first + s + part, programs + b)
        row = (place * H + h) * GP + g
        highest = tl.maximum(highest, tl.load(part_best + row, mask=s + part < every, other=-float("inf")))
    best = tl.max(highest, 0)
    total = tl.zeros((16,), tl.float32)
    acc = tl.zeros((16, DP), tl.float32)
    for s in range(0, every, 16):
        inside = s + part < every
        place = tl.where(s + part < count, first + s + part, programs + b)
        row = (place * H + h) * GP + g
        weight = tl.exp2(tl.load(part_best + row, mask=inside, other=-float("inf")) - best)
        total += tl.load(part_total + row, mask=inside, other=0.0) * weight
        out_mask = inside[:, None] & (d < D)[None, :]
        acc += tl.load(part_out + row[:, None] * D + d[None, :], mask=out_mask, other=0.0) * weight[:, None]
    tl.store(out + head * D + d, (tl.sum(acc, 0) / tl.sum(total, 0)).to(out.dtype.element_ty), mask=d < D)
