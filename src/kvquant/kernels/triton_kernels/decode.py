"""Decode attention straight from packed blocks: one query per sequence, its blocks shared, merged by log-sum-exp.

One program of two warps takes a run of blocks (shares.py) of one (sequence, KV head) and serves all its query heads,
so that a tile of keys or values is decoded once. Tokens and channels are the rows of the products (scores of a block
[BS, G], output [D, G]): with few query heads a tensor core's other side, eight columns, is the smaller waste.

Per element of K or V that is 1.3 to 3.2 instructions for the look-up and, for keys, 1.5 for the channel's range and the
rotation (lookup.py). Nothing is left for moving decoded tiles through shared memory, so every thread decodes just what
the tensor core wants from it: tensors here are [64 threads, registers], loaded at addresses made for that, and the
reshapes before a product only rename them to its rows and columns. Lane 4q + r of warp w holds rows 16w + q (+ 8) of
every 32, and columns 4r to 4r + 3 of every 16. Which channel is column k of a product is free, as long as
keys and query agree; which is row m of the output as well, as long as the store knows.

A value's range belongs to its token and is folded into the weights. Outliers are added as differences to what their
code 0 decodes to, through a matrix in shared memory that threads scatter them into (scratch.py). Numbers are fp16
inside, relative to the largest key and query of the head, so that bf16 ranges cannot overflow; what depends on neither
block nor token is prepared once per call (prepare.py).

What a block would wait for is asked for before: its number two blocks ahead; one ahead, into registers, codes and
outliers of its keys, where its outliers of values begin, and angles, which go on through shared memory. Codes come
from memory by a prefetch before that, into the L2 cache: those of keys two blocks ahead, those of values one.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.triton_kernels.fragments import (
    all_rows,
    any_row,
    column_of,
    four_columns,
    load_words,
    over_rows,
    row_groups,
    rows_of,
    score_side,
    stack,
    two_words,
)
from kvquant.kernels.triton_kernels.merge import store_part
from kvquant.kernels.triton_kernels.outlier_entries import (
    key_chain,
    key_counts,
    key_pair,
    key_row,
    value_ends,
    value_pair,
    value_rest,
    value_row,
)
from kvquant.kernels.triton_kernels.outlier_products import key_products, value_products
from kvquant.kernels.triton_kernels.scratch import (
    ahead,
    allocate,
    divergent_zero,
    fetch_tables,
    put,
    put_angles,
)
from kvquant.kernels.triton_kernels.units import (
    unit_angle,
    unit_codes,
    unit_differences,
    unit_scores,
    unit_sums,
)

LOG2E = tl.constexpr(1.4426950408889634)
WEIGHT_BITS = tl.constexpr(10.0)  # weights are at most 2^10: fp16 holds smaller ones so
WARPS = 2  # the tensors of 64 threads are made for it


@triton.jit
def _larger_of_both(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit(
    do_not_specialize=["sink_tokens", "window", "table_stride"],
    # Of a layer of a pool with an odd number of blocks these begin anywhere: one kernel for all.
    do_not_specialize_on_alignment=["key_count", "spill_head", "spill_next", "value_end"],
)
def _decode_kernel(
    # Prepared for this call
    q_words, q_half, affine, floor, unit, angles, bases, wide_bases, look_up, shares, memory,
    offset_cos, offset_sin, block_table, kv_lengths,
    # Keys
    key_codes, key_count, key_index, key_value, spill_head, spill_next, spill_index, spill_value, key_centroids,
    # Values
    value_codes, value_zero, value_scale, value_index, value_value, value_end, value_centroids,
    # Partial results [programs, H, GP (, D)]
    part_best, part_total, part_out,
    softcap, window, sink_tokens, table_stride,
    H, VG, upper,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    KW: tl.constexpr, VW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    K_BASE: tl.constexpr, K_PLACES: tl.constexpr, V_ENTRIES: tl.constexpr, ROTATED: tl.constexpr,
    HALF_QUERY: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    SCRATCH: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = BS // 16  # registers of a thread for the rows of a block
    # Keys are rotated by their place among as many tokens, the query turned back by the place of these.
    ROWS: tl.constexpr = min(BS, 64)
    N: tl.constexpr = ROWS // 16
    J: tl.constexpr = BS // ROWS
    NG: tl.constexpr = GP // 8
    K_WORDS: tl.constexpr = (KW + 3) // 4
    CPL: tl.constexpr = (K_WORDS + 3) // 4  # words of a row that one of its four lanes decodes
    CPLP: tl.constexpr = 1 if CPL == 1 else (2 if CPL == 2 else (4 if CPL <= 4 else 8))
    KNP: tl.constexpr = 1 if KB == 4 else 2  # units of a word
    UNITS: tl.constexpr = CPL * KNP
    V_WORDS: tl.constexpr = (VW + 3) // 4
    VNP: tl.constexpr = 1 if VB == 4 else 2
    UPG: tl.constexpr = 1 if D <= 128 else 2  # units of a row that one of its sixteen groups of lanes decodes
    S: tl.constexpr = BS // 8
    KEPT: tl.constexpr = key_value.dtype.element_ty
    K_SCATTER: tl.constexpr = K_BASE > 0 and MATRIX > 0
    V_SCATTER: tl.constexpr = V_ENTRIES > 0 and MATRIX > 0
    # Of a block's codes, lines of 128 bytes, as a prefetch brings.
    K_LINES: tl.constexpr = 64 * ((BS * K_ROW + 8191) // 8192)
    V_LINES: tl.constexpr = 64 * ((BS * V_ROW + 8191) // 8192)
    PLACES: tl.constexpr = 128  # outliers of values at once: two of a thread
    STAGED: tl.constexpr = K_SCATTER and ROTATED
    ANGLE_WORDS: tl.constexpr = J * UNITS * 16
    ANGLE_PLACES: tl.constexpr = 64 if ANGLE_WORDS <= 64 else (128 if ANGLE_WORDS <= 128 else 256)

    h = tl.program_id(0)
    program = tl.program_id(1)
    b = tl.load(shares + program * 4)
    begin = tl.load(shares + program * 4 + 1)
    end = tl.load(shares + program * 4 + 2)
    bh = b * H + h
    length = tl.load(kv_lengths + b)
    first_visible = tl.zeros((), tl.int32) + sink_tokens
    if HAS_WINDOW:
        first_visible = tl.maximum(first_visible, length - window)

    slot = tl.arange(0, BS)
    g = tl.arange(0, GP)
    thread = tl.arange(0, 64)
    lane = tl.arange(0, 32)
    four = tl.arange(0, 4)[None, :]
    pair = tl.arange(0, PLACES // 2)
    k_pair = tl.arange(0, K_PLACES // 2)
    k_line = tl.minimum(tl.arange(0, K_LINES) * 128, BS * K_ROW - 1)
    v_line = tl.minimum(tl.arange(0, V_LINES) * 128, BS * V_ROW - 1)
    angle_word = tl.arange(0, ANGLE_PLACES)
    r = thread % 4
    first_row = (thread // 32) * 16 + (thread % 32) // 4  # a thread's first row of every 32
    key_word = (r * CPL)[:, None] + tl.arange(0, CPLP)[None, :]  # [64, CPLP]
    key_inside: tl.constexpr = K_WORDS == 4 * CPL and CPLP == CPL
    if not key_inside:
        key_word = tl.where(tl.arange(0, CPLP)[None, :] < CPL, key_word, K_WORDS)
    group_unit = ((thread // 32) * 8 + (thread % 32) // 4) * UPG

    q_words = q_words.to(tl.pointer_type(tl.int64)) + bh * (UNITS * GP * 8)
    q_half += bh * D * GP
    floor += bh * D
    affine = affine.to(tl.pointer_type(tl.int32)) + bh * (UNITS * 32)
    angle_words = angles.to(tl.pointer_type(tl.int32))
    base_words = bases.to(tl.pointer_type(tl.int32))
    score_unit = tl.load(unit + bh * 2)
    inverse_size = tl.load(unit + bh * 2 + 1)
    v_first = tl.load(value_centroids)
    value_group = h * VG // H
    tables = allocate(SCRATCH, MATRIX, look_up, memory)
    scratch = tables + 128
    angles_at = scratch + MATRIX

    best = tl.full((GP,), -float("inf"), tl.float32)
    # Over the rows of a thread in the loop, over the threads after it.
    total = tl.zeros((2, 8, GP), tl.float32)
    zeros = total
    size = tl.full((GP,), 1.0, tl.float32)
    acc0 = tl.zeros((64, GP), tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    table_row = block_table + b * table_stride
    # Numbers of blocks are read two ahead: ``block``, ``coming`` and in the loop ``after``.
    block = tl.load(table_row + begin, mask=begin < end, other=0).to(tl.int64)
    coming = tl.load(table_row + tl.minimum(begin + 1, end - 1), mask=begin < end, other=0).to(tl.int64)
    apart = divergent_zero(upper)
    if K_SCATTER:
        k_count, k_chunk = key_counts(key_count, spill_head, block * H + h + apart)
        k_number, k_kept = key_row(
            key_index, key_value, spill_index, spill_value, block * H + h, k_chunk, k_pair, k_count, K_BASE
        )
        k_at0, k_at1, k_delta0, k_delta1 = key_pair(
            k_number, k_kept, k_pair, k_count, floor, inverse_size, scratch, KEPT, D, KW, CPL, KNP, R
        )
    if STAGED:
        own_angles = base_words + begin * ANGLE_WORDS + angle_word
        own_angles = tl.load(own_angles, mask=angle_word < ANGLE_WORDS, other=0)
        put_angles(angles_at, angle_word, own_angles, ANGLE_WORDS)
    if V_ENTRIES > 0:
        coming_begin, coming_end, coming_closed = value_ends(value_end, block * H + apart, h, H)
    codes, third = load_words(
        key_codes + (block * H + h) * (BS * K_ROW), first_row[:, None], key_word, KW, K_ROW, K_WORDS,
        not key_inside, KB, 8, 32, R,
    )  # fmt: skip

    for column in range(begin, end):
        after = tl.load(table_row + tl.minimum(column + 2, end - 1)).to(tl.int64)
        at = block * H + h
        first_slot = first_visible - column * BS
        end_slot = length - column * BS
        ranges = block * BS * VG + value_group
        v_scale = score_side(rows_of(value_scale + ranges, VG, first_row, first_slot, end_slot - 1, R), R, GP)
        v_zero = score_side(rows_of(value_zero + ranges, VG, first_row, first_slot, end_slot - 1, R), R, GP)
        if V_ENTRIES > 0:
            # An open block lists all heads' entries token by token, a closed one those of each head together.
            closed = coming_closed > 0
            v_begin = coming_begin
            v_end = tl.where(closed, coming_end, tl.minimum(end_slot, BS) * V_ENTRIES)
            entries = block * (BS * V_ENTRIES)
            coming_begin, coming_end, coming_closed = value_ends(value_end, coming * H + apart, h, H)
        if V_SCATTER:
            v_number, v_kept = value_row(
                value_index + entries, value_value + entries, v_begin // 2 + pair, BS * V_ENTRIES
            )
        if K_SCATTER:
            coming_count, coming_chunk = key_counts(key_count, spill_head, coming * H + h + apart)
        base = base_words + column * ANGLE_WORDS

        # -- scores [BS, GP], in units of the largest key times the largest query ---------------------------------
        if K_SCATTER:
            k_there = tl.minimum(k_count, K_BASE + 32)
            put(k_at0, k_delta0, 2 * k_pair < k_there)
            put(k_at1, k_delta1, 2 * k_pair + 1 < k_there)
            if k_count > K_BASE + 32:
                key_chain(
                    k_count - K_BASE - 32, k_chunk, spill_next, spill_index, spill_value, floor,
                    inverse_size, scratch, D, KW, CPL, KNP, R, False,
                )  # fmt: skip
            tl.debug_barrier()
        k_tables = fetch_tables(tables)
        s0 = tl.zeros((ROWS, GP), tl.float32)
        s1 = s0
        for c in tl.static_range(CPL):
            words = row_groups(column_of(codes, c, CPLP, R, 64), J)
            thirds = row_groups(column_of(third, c, CPLP, R, 64), J)
            for half in tl.static_range(KNP):
                n = c * KNP + half
                own = affine + ((n * 4 + r) * 8)[:, None] + four
                x_affine = four_columns(tl.load(own), 1, 64)
                y_affine = four_columns(tl.load(own + 4), 1, 64)
                q = q_words + (n * 2 * GP + lane // 4) * 4 + lane % 4
                x = two_words(tl.reshape(stack(q, True, 32, 64, NG, False), (32, NG)))
                y = two_words(tl.reshape(stack(q + 4 * GP, True, 32, 64, NG, False), (32, NG)))
                turn = words[0], words[0], words[0], words[0]
                if ROTATED:
                    t = angle_words + (n * (N * 256) + thread * 4)[:, None] + four
                    turn = four_columns(stack(t, True, 256, 512, N, False), N, 64)
                angle = turn
                further = turn
                if ROTATED:
                    angle = unit_angle(base, angles_at, n, lane, STAGED)
                    if J == 2:
                        further = unit_angle(base, angles_at, UNITS + n, lane, STAGED)
                place_n = scratch + (n * R) * 1024 + thread * 16
                s0 = unit_scores(
                    s0, words[0], thirds[0], k_tables, key_centroids, upper, x_affine, y_affine, x, y, turn,
                    angle, place_n, 2 * half, N, NG, KB, ROTATED, HALF_QUERY, K_SCATTER,
                )  # fmt: skip
                if J == 2:
                    s1 = unit_scores(
                        s1, words[1], thirds[1], k_tables, key_centroids, upper, x_affine, y_affine, x, y, turn,
                        further, place_n + 4096, 2 * half, N, NG, KB, ROTATED, HALF_QUERY, K_SCATTER,
                    )  # fmt: skip
        scores = all_rows(s0, s1, J, GP)
        if K_SCATTER:
            tl.debug_barrier()
            put(k_at0, tl.zeros_like(k_delta0), 2 * k_pair < k_there)
            put(k_at1, tl.zeros_like(k_delta1), 2 * k_pair + 1 < k_there)
            if k_count > K_BASE + 32:
                key_chain(
                    k_count - K_BASE - 32, k_chunk, spill_next, spill_index, spill_value, floor,
                    inverse_size, scratch, D, KW, CPL, KNP, R, True,
                )  # fmt: skip
            if not V_SCATTER:
                tl.debug_barrier()
        elif K_BASE > 0:
            scores = key_products(
                scores, key_count, key_index, key_value, spill_head, spill_next, spill_index, spill_value, at, q_half,
                floor, inverse_size, offset_cos, offset_sin, wide_bases + column * (J * D), GP, D, K_BASE, ROTATED, R,
            )  # fmt: skip
        v_codes = value_codes + at * (BS * V_ROW)
        words_of_unit = unit_codes(v_codes, r, group_unit, VW, V_ROW, V_WORDS, D != 128, VNP, VB, S)
        scores = scores * score_unit  # times log2(e), unless a cap comes first
        if HAS_SOFTCAP:
            # tanh through exp, which keeps its sign at both ends
            decay = tl.exp2(tl.abs(scores / softcap) * (-2.0 * 1.4426950408889634))
            scores = tl.where(scores < 0, -LOG2E, LOG2E) * softcap * (1.0 - decay) / (1.0 + decay)
        if (first_slot > 0) | (end_slot < BS):
            visible = (slot >= first_slot) & (slot < end_slot)
            scores = tl.where(visible[:, None], scores, -float("inf"))

        # -- weights, times 2^10 against fp16's smallest, and the largest range of a value -------------------------
        new, new_size = tl.reduce((scores, v_scale), 0, _larger_of_both)
        new = tl.maximum(best, new)
        new_size = tl.where(new_size > 0, new_size, size)
        shift = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp2(scores - (shift - WEIGHT_BITS)[None, :])  # [BS, GP]
        fade = tl.exp2(best - shift)
        best = new
        fades = any_row(tl.broadcast_to(fade[None, :], (BS, GP)), BS, GP)
        total = total * fades + over_rows(weights, BS, GP)
        zeros = zeros * fades + over_rows(weights * v_zero, BS, GP)
        inverse = 1.0 / new_size
        weighted = (weights * (v_scale * inverse[None, :])).to(tl.float16)
        plain = weights.to(tl.float16)
        fade = (fade * (size * inverse))[None, :]
        size = new_size

        # -- values: a token's range goes into its weight --------------------------------------------------------
        if V_SCATTER:
            block_inverse = tl.max(inverse, 0)
            tl.debug_barrier()
            v_at0, v_at1, v_delta0, v_delta1, v_live0, v_live1 = value_pair(
                v_number, v_kept, (v_begin // 2) * 2 + 2 * pair, v_begin, v_end, closed, value_zero + ranges,
                value_scale + ranges, VG, v_first, block_inverse, scratch, KEPT, D, VW, VNP, UPG, S,
            )  # fmt: skip
            put(v_at0, v_delta0, v_live0)
            put(v_at1, v_delta1, v_live1)
            v_rest = tl.where(closed, (v_begin // 2) * 2 + PLACES, 0)
            if v_rest < v_end:
                value_rest(
                    value_index + entries, value_value + entries, v_rest, v_end, closed, h * D, value_zero + ranges,
                    value_scale + ranges, VG, v_first, block_inverse, scratch, D, VW, VNP, UPG, S, V_ENTRIES, False,
                )  # fmt: skip
        # Of the coming block, what its first steps would wait for.
        if K_SCATTER:
            k_count, k_chunk = coming_count, coming_chunk
            k_number, k_kept = key_row(
                key_index, key_value, spill_index, spill_value, coming * H + h, k_chunk, k_pair, k_count, K_BASE
            )  # fmt: skip
        if STAGED:
            coming_angles = base_words + tl.minimum(column + 1, end - 1) * ANGLE_WORDS + angle_word
            coming_angles = tl.load(coming_angles, mask=angle_word < ANGLE_WORDS, other=0)
        codes, third = load_words(
            key_codes + (coming * H + h) * (BS * K_ROW), first_row[:, None], key_word, KW, K_ROW, K_WORDS,
            not key_inside, KB, 8, 32, R,
        )  # fmt: skip
        v_tables = fetch_tables(tables + 64)
        acc0, acc1 = unit_sums(
            acc0, acc1, fade, words_of_unit, group_unit % VNP, v_tables, value_centroids, upper, weighted, VB, S
        )  # fmt: skip
        if UPG == 2:
            words_of_unit = unit_codes(v_codes, r, group_unit + 1, VW, V_ROW, V_WORDS, D != 256, VNP, VB, S)
            acc2, acc3 = unit_sums(
                acc2, acc3, fade, words_of_unit, (group_unit + 1) % VNP, v_tables, value_centroids, upper, weighted,
                VB, S,
            )  # fmt: skip
        if V_SCATTER:
            tl.debug_barrier()
            acc0, acc1 = unit_differences(acc0, acc1, scratch + thread * 16, plain, S)
            if UPG == 2:
                acc2, acc3 = unit_differences(acc2, acc3, scratch + 2 * S * 1024 + thread * 16, plain, S)
            tl.debug_barrier()
            put(v_at0, tl.zeros_like(v_delta0), v_live0)
            put(v_at1, tl.zeros_like(v_delta1), v_live1)
            if v_rest < v_end:
                value_rest(
                    value_index + entries, value_value + entries, v_rest, v_end, closed, h * D, value_zero + ranges,
                    value_scale + ranges, VG, v_first, block_inverse, scratch, D, VW, VNP, UPG, S, V_ENTRIES, True,
                )  # fmt: skip
            tl.debug_barrier()
        elif V_ENTRIES > 0:
            acc0, acc1, acc2, acc3 = value_products(
                acc0, acc1, acc2, acc3, plain, value_index + entries, value_value + entries, v_begin, v_end, closed,
                h * D, value_zero + ranges, value_scale + ranges, VG, v_first, tl.max(inverse, 0),
                D, VW, VNP, UPG, BS, V_ENTRIES,
            )  # fmt: skip
        if K_SCATTER:
            k_at0, k_at1, k_delta0, k_delta1 = key_pair(
                k_number, k_kept, k_pair, k_count, floor, inverse_size, scratch, KEPT, D, KW, CPL, KNP, R
            )
        if STAGED:
            put_angles(angles_at, angle_word, coming_angles, ANGLE_WORDS)
        ahead(key_codes + (after * H + h) * (BS * K_ROW) + k_line)
        ahead(value_codes + (coming * H + h) * (BS * V_ROW) + v_line)
        block = coming
        coming = after

    at_part = (program * H + h) * GP + g
    tl.store(part_best + at_part, best)
    UNIT: tl.constexpr = 2.0**-10
    tl.store(part_total + at_part, tl.sum(tl.sum(total, 0), 0) * UNIT)
    zero_sum = tl.sum(tl.sum(zeros, 0), 0)[None, :] * UNIT
    size = size[None, :] * UNIT
    store_part(part_out, at_part, acc0 * size + zero_sum, G, GP, 0, D, VW, UPG, VNP)
    store_part(part_out, at_part, acc1 * size + zero_sum, G, GP, 1, D, VW, UPG, VNP)
    if UPG == 2:
        store_part(part_out, at_part, acc2 * size + zero_sum, G, GP, 2, D, VW, UPG, VNP)
        store_part(part_out, at_part, acc3 * size + zero_sum, G, GP, 3, D, VW, UPG, VNP)
