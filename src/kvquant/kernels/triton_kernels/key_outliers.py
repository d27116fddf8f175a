"""Storing the outliers of keys by their marks: spill chunks handed out in order, then one program per run and head.

One program adds up the spill chunks that the (run, head) pairs need, in that order: runs come by rising block id, so
every backend hands out the same chunks. Then each pair's program ranks its marks and stores what they stand for, in the
base row or beyond it. The host waits for neither.
"""

# Kernels take tensors of pointers and constants, which have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvquant.kernels import ERROR_OUT_OF_SPILL, SPILL_ENTRIES, KeyStore
from kvquant.kernels.triton_kernels.codes import bits_of_bytes, number_of_bit, report, sum_of_bytes

_OUT_OF_SPILL = tl.constexpr(ERROR_OUT_OF_SPILL)
_CHUNK = tl.constexpr(SPILL_ENTRIES)
_LINKS = tl.constexpr(64)  # links set at a time


@triton.jit
def _chunks(entries, BASE: tl.constexpr):
    return (tl.maximum(entries - BASE, 0) + _CHUNK - 1) // _CHUNK


@triton.jit(do_not_specialize=["total"])
def _hand_out_chunks(scratch, spill_top, error, total, BASE: tl.constexpr, PIECE: tl.constexpr):
    """Number each (run, head)'s new chunks, and say whether the chunks suffice for all; if not, none is taken."""
    top = tl.load(spill_top)
    # A scalar of the scratch's type, whatever type the constant 0 has.
    taken = top - top
    for start in range(0, total, PIECE):
        i = start + tl.arange(0, PIECE)
        live = i < total
        count = tl.load(scratch + i, mask=live, other=0)
        before = tl.load(scratch + total + i, mask=live, other=0)
        needed = _chunks(before + count, BASE) - _chunks(before, BASE)
        tl.store(scratch + 2 * total + i, taken + tl.cumsum(needed, 0) - needed, mask=live)
        taken += tl.sum(needed, 0)
    enough = taken <= top
    # Every thread has read the height of the stack before one changes it.
    tl.debug_barrier()
    tl.store(scratch + 3 * total, enough.to(tl.int32))
    tl.store(scratch + 3 * total + 1, top)
    tl.store(spill_top, top - taken, mask=enough)
    report(error, _OUT_OF_SPILL, tl.where(enough, 1, 0), 1)


@triton.jit
def _store_outliers(
    keys,
    marks,
    runs,
    scratch,
    outlier_count,
    outlier_index,
    outlier_value,
    spill_head,
    spill_next,
    spill_index,
    spill_value,
    spill_free,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BASE: tl.constexpr,
    ROWS: tl.constexpr,
):
    run, head = tl.program_id(0), tl.program_id(1)
    total = tl.num_programs(0) * H
    at = run * H + head
    before = tl.load(scratch + total + at)
    after = before + tl.load(scratch + at)
    if after > before:
        enough = tl.load(scratch + 3 * total) != 0
        block = tl.load(runs + run * 4).to(tl.int64)
        first = tl.load(runs + run * 4 + 1).to(tl.int64)
        count = tl.load(runs + run * 4 + 2)
        first_slot = tl.load(runs + run * 4 + 3)
        place = block * H + head
        tl.store(outlier_count + place, after, mask=enough)
        # New chunk k of this (run, head) is the k-th below here on the stack.
        newest = spill_free + tl.load(scratch + 3 * total + 1) - 1 - tl.load(scratch + 2 * total + at)
        held = _chunks(before, BASE)
        new = tl.where(enough, _chunks(after, BASE) - held, 0)
        room = tl.where(enough, after, BASE)
        tail = tl.load(spill_head + place, mask=held > 0, other=0)
        for _link in range(1, held):
            tail = tl.load(spill_next + tail)

        # Marks in words, each of a part of a row, in the order of rows and channels.
        WORD: tl.constexpr = min(32, DP)
        WORDS: tl.constexpr = DP // WORD
        i = tl.arange(0, ROWS * WORDS)
        part = i % WORDS * WORD
        entries = before
        for start in range(0, count, ROWS):
            r = start + i // WORDS
            from_bytes = marks + ((first + r) * H + head) * (DP // 8) + part // 8
            if WORD == 32:
                left = tl.load(from_bytes.to(tl.pointer_type(tl.int32)), mask=r < count, other=0)
            elif WORD == 16:
                left = tl.load(from_bytes.to(tl.pointer_type(tl.int16)), mask=r < count, other=0).to(tl.int32)
                left = left & 0xFFFF
            else:
                left = tl.load(from_bytes, mask=r < count, other=0).to(tl.int32)
            number = sum_of_bytes(bits_of_bytes(left))
            entry = entries + tl.cumsum(number, 0) - number
            for _one in range(tl.max(number, 0)):
                channel = part + number_of_bit(left & -left)
                base, beyond = (left != 0) & (entry < BASE), (left != 0) & (entry >= BASE) & (entry < room)
                value = tl.load(keys + ((first + r) * H + head) * D + channel, mask=base | beyond, other=0.0)
                value = value.to(tl.float32).to(outlier_value.dtype.element_ty)
                index = ((first_slot + r) * D + channel).to(tl.int16)
                tl.store(outlier_index + place * BASE + entry, index, mask=base)
                tl.store(outlier_value + place * BASE + entry, value, mask=base)
                position = tl.maximum(entry - BASE, 0)
                ordinal = position // _CHUNK - held
                fresh = tl.load(newest - ordinal, mask=beyond & (ordinal >= 0), other=0)
                to = tl.where(ordinal >= 0, fresh, tail).to(tl.int64) * _CHUNK + position % _CHUNK
                tl.store(spill_index + to, index, mask=beyond)
                tl.store(spill_value + to, value, mask=beyond)
                entry += 1
                left &= left - 1
            entries += tl.sum(number, 0)

        for start in range(0, new, _LINKS):
            k = start + tl.arange(0, _LINKS)
            chunk = tl.load(newest - k, mask=k < new, other=0)
            previous = tl.load(newest - k + 1, mask=(k < new) & (k > 0), other=0)
            previous = tl.where(k > 0, previous, tail)
            tl.store(spill_next + previous, chunk, mask=(k < new) & ((k > 0) | (held > 0)))
            tl.store(spill_head + place + 0 * k, chunk, mask=(k < new) & (k == 0) & (held == 0))


def scratch_for(runs: Tensor, heads: int) -> Tensor:
    """An int32 tensor for what launches tell each other: by (run, head) new outliers, those before, the first chunk.

    After these three times R * H come whether chunks suffice and how many there were.
    """
    return torch.empty(3 * len(runs) * heads + 2, dtype=torch.int32, device=runs.device)


def store_outliers(
    keys: Tensor,
    marks: Tensor,
    runs: Tensor,
    scratch: Tensor,
    store: KeyStore,
    error: Tensor,
    *,
    most_rows: int,
) -> None:
    """Append the marked keys to their blocks' outliers.

    Args:
        keys: contiguous, [T, H, D].
        marks: a bit per channel, uint8 [T, H, DP / 8], DP the next power of two.
        runs: where the tokens go, int32 [R, 4].
        scratch: from :func:`scratch_for`, the first two parts set.
        store: the layer's keys in the pool.
        error: the pool's error word.
        most_rows: no run has more tokens.
    """
    _, H, D = keys.shape
    R, base = len(runs), store.outlier_index.shape[-1]
    options = {"num_warps": 4, "enable_fp_fusion": False}
    _hand_out_chunks[(1,)](
        scratch, store.spill_top, error, R * H, BASE=base, PIECE=1024 if R * H <= 1024 else 4096, **options
    )
    _store_outliers[(R, H)](
        keys,
        marks,
        runs,
        scratch,
        store.outlier_count,
        store.outlier_index,
        store.outlier_value,
        store.spill_head,
        store.spill_next,
        store.spill_index,
        store.spill_value,
        store.spill_free,
        H=H,
        D=D,
        DP=triton.next_power_of_2(D),
        BASE=base,
        ROWS=4 if most_rows <= 4 else 64,
        **options,
    )
