"""Parts, what each of the programs that shared a sequence's blocks found, merged by log-sum-exp in a fixed order."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

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
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, STEP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Fold the parts of one query head; a part that saw nothing has -inf and counts for nothing.

    Parts are [programs, H, GP (, D)], those of a sequence in a row (shares.py); with SINKS one more for each sequence
    stands behind them; STEP are looked at at once. EARLY: it is launched before the kernel that finds the parts ends.
    """
    head = tl.program_id(0)
    b = head // (H * G)
    h = head // G % H
    g = head % G
    if EARLY:
        gdc_wait()
    first = tl.load(parts + b * 2)
    count = tl.load(parts + b * 2 + 1)
    every = count + SINKS
    d = tl.arange(0, DP)
    part = tl.arange(0, STEP)
    highest = -float("inf")
    total = 0.0
    acc = tl.zeros((DP,), tl.float32)
    for s in range(0, every, STEP):
        inside = s + part < every
        place = tl.where(s + part < count, first + s + part, programs + b)
        row = (place * H + h) * GP + g
        # None of the three waits for another.
        best = tl.load(part_best + row, mask=inside, other=-float("inf"))
        part_totals = tl.load(part_total + row, mask=inside, other=0.0)
        out_mask = inside[:, None] & (d < D)[None, :]
        outs = tl.load(part_out + row[:, None] * D + d[None, :], mask=out_mask, other=0.0)
        higher = tl.maximum(highest, tl.max(best, 0))
        around = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp2(highest - around)
        weight = tl.exp2(best - around)
        total = total * fade + tl.sum(part_totals * weight, 0)
        acc = acc * fade + tl.sum(outs * weight[:, None], 0)
        highest = higher
    tl.store(out + head * D + d, (acc / total).to(out.dtype.element_ty), mask=d < D)
