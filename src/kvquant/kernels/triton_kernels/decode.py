"""Decode attention straight from packed blocks: one query per sequence, split over blocks, merged by log-sum-exp.

One program of two warps takes a run of blocks of one (sequence, KV head) and serves all its query heads, so that a tile
of keys or values is decoded once. Tokens and channels are the rows of the products (scores of a block [BS, G], output
[D, G]): with few query heads a tensor core's other side, eight columns, is the smaller waste.

Per element of K or V that is 1.3 to 3.2 instructions for the look-up and, for keys, 1.5 for the channel's range and the
rotation (lookup.py). Nothing is left for moving decoded tiles through shared memory, so every thread decodes just what
the tensor core wants from it: tensors here are [64 threads, registers], loaded at addresses made for that, and the
reshapes before a product only rename them to its rows and columns. Lane 4q + r of warp w holds rows 16w + q (+ 8) of
every 32, and columns 4r to 4r + 3 of every 16. Which channel is column k of a product is free, as long as
keys and query agree; which is row m of the output as well, as long as the store knows.

A value's range belongs to its token and is folded into the weights. Outliers are added as differences to what their
code 0 decodes to: to the scores (times the query turned back to the key's position) and to the output (times the
weight), by products with 0/1 matrices made in registers, because Triton has no scatter and atomics would add in any
order. Numbers are fp16 inside, relative to the largest key and query of the head, so that bf16 ranges cannot overflow;
what depends on neither block nor token is prepared once per call (prepare.py).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.triton_kernels.fragments import (
    column_of,
    flat,
    four_columns,
    key_side,
    load_words,
    query_side,
    row_of,
    rows_equal,
    stack,
    tokens_equal,
    turned_back,
    value_tile,
)
from kvquant.kernels.triton_kernels.lookup import key_words, load_tables

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(
    32000.0
)  # of a difference: queries are at most a half, fp16 holds the sum of two products
WEIGHT_SCALE = tl.constexpr(
    16384.0
)  # small weights, which large outliers may have, would be subnormal in fp16
WARPS = 2  # the tensors of 64 threads are made for it


@triton.jit
def _key_differences(
    number, kept, live, q_half, floor, inverse_size, offset_cos, offset_sin, base,
    GP: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """What each of 32 outliers adds to its token's scores, [32, GP] fp32: an outlier weighs too much to be rounded."""
    HALF: tl.constexpr = D // 2
    t = number // D
    d = number % D
    g = tl.arange(0, GP)[None, :]
    delta = kept * inverse_size - tl.load(floor + d, mask=live, other=0.0)
    delta = tl.where(live, tl.minimum(tl.maximum(delta, -LARGEST), LARGEST), 0.0)
    own = tl.load(q_half + d[:, None] * GP + g).to(tl.float32)
    if ROTATED:
        j = d % HALF
        cb = tl.load(base + j)
        sb = tl.load(base + HALF + j)
        co = tl.load(offset_cos + t * HALF + j)
        so = tl.load(offset_sin + t * HALF + j)
        side = tl.where(d < HALF, delta, -delta)
        other = tl.load(q_half + tl.where(d < HALF, d + HALF, j)[:, None] * GP + g).to(tl.float32)
        return own * ((cb * co - sb * so) * delta)[:, None] + other * ((sb * co + cb * so) * side)[:, None]
    else:
        return own * delta[:, None]


@triton.jit
def _channel_of_row(
    row, PART: tl.constexpr, D: tl.constexpr, W: tl.constexpr, UPG: tl.constexpr, NP: tl.constexpr
):
    """Channel in row 0 to 63 of an output tile; PART is its unit of the group, times two, plus its field."""
    unit = (((row // 16) % 2) * 8 + row % 8) * UPG + PART // 2
    byte = (unit // NP) * 4 + (row // 32) * 2 + (row // 8) % 2
    return tl.where(unit < D // 8, (unit % NP) * W + byte + (PART % 2) * (D // 2), D)


@triton.jit
def _store_part(
    part_out, at_part, acc, G: tl.constexpr, GP: tl.constexpr, PART: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    UPG: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    channels = _channel_of_row(tl.arange(0, 64), PART, D, W, UPG, NP)[:, None]
    inside = (tl.arange(0, GP)[None, :] < G) & (channels < D)
    tl.store(part_out + at_part[None, :] * D + channels, acc, mask=inside)


@triton.jit
def _decode_kernel(
    # Prepared for this call
    q_words, q_half, affine, floor, unit, angles, bases, wide_bases,
    offset_cos, offset_sin, block_table, kv_lengths,
    # Keys
    key_codes, key_count, key_index, key_value, spill_head, spill_next, spill_index, spill_value, key_centroids,
    # Values
    value_codes, value_zero, value_scale, value_index, value_value, value_end, value_centroids,
    # Partial results [B, H, SPLITS, GP (, D)]
    part_best, part_total, part_out,
    softcap, window, sink_tokens, table_stride,
    H, VG, splits,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    KW: tl.constexpr, VW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    K_BASE: tl.constexpr, V_ENTRIES: tl.constexpr, ROTATED: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = BS // 16  # registers of a thread for the rows of a block
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

    bh = tl.program_id(0)
    b = bh // H
    h = bh % H
    split = tl.program_id(1)
    length = tl.load(kv_lengths + b)
    blocks = tl.cdiv(length, BS)
    first_visible = tl.zeros((), tl.int32) + sink_tokens
    if HAS_WINDOW:
        first_visible = tl.maximum(first_visible, length - window)
    start_block = first_visible // BS
    per_split = tl.cdiv(tl.maximum(blocks - start_block, 0), splits)
    begin = start_block + split * per_split
    end = tl.minimum(begin + per_split, blocks)

    slot = tl.arange(0, BS)
    g = tl.arange(0, GP)
    thread = tl.arange(0, 64)
    lane = tl.arange(0, 32)
    four = tl.arange(0, 4)[None, :]
    r = thread % 4
    first_row = (thread // 32) * 16 + (thread % 32) // 4  # a thread's first row of every 32
    key_word = (r * CPL)[:, None] + tl.arange(0, CPLP)[None, :]  # [64, CPLP]
    key_inside: tl.constexpr = K_WORDS == 4 * CPL and CPLP == CPL
    if not key_inside:
        key_word = tl.where(tl.arange(0, CPLP)[None, :] < CPL, key_word, K_WORDS)
    group_unit = ((thread // 32) * 8 + (thread % 32) // 4) * UPG

    q_words = q_words.to(tl.pointer_type(tl.int32)) + bh * (UNITS * GP * 16)
    q_half += bh * D * GP
    floor += bh * D
    affine = affine.to(tl.pointer_type(tl.int32)) + bh * (UNITS * 32)
    angle_words = angles.to(tl.pointer_type(tl.int32))
    base_words = bases.to(tl.pointer_type(tl.int32))
    score_unit = tl.load(unit + bh * 2)
    inverse_size = tl.load(unit + bh * 2 + 1)
    kt0, kt1, kt2, kt3, kt4, kt5, kt6, kt7 = load_tables(key_centroids, KB)
    vt0, vt1, vt2, vt3, vt4, vt5, vt6, vt7 = load_tables(value_centroids, VB)
    v_first = tl.load(value_centroids)
    value_group = h * VG // H
    entry = tl.arange(0, 32)

    best = tl.full((GP,), -float("inf"), tl.float32)
    total = tl.zeros((8, GP), tl.float32)  # over the registers in the loop, over the lanes after it
    zeros = total
    acc0 = tl.zeros((64, GP), tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0

    for column in range(begin, end):
        block = tl.load(block_table + b * table_stride + column).to(tl.int64)
        row0 = (block * H + h) * BS
        codes, third = load_words(
            key_codes + row0 * K_ROW,
            first_row[:, None],
            key_word,
            KW,
            K_ROW,
            K_WORDS,
            not key_inside,
            KB,
            8,
            32,
            R,
        )
        position = column * BS + slot
        visible = (position < length) & (position >= first_visible)
        range_at = (block * BS + slot) * VG + value_group
        v_scale = tl.load(value_scale + range_at, mask=visible, other=0.0).to(tl.float32)
        v_zero = tl.load(value_zero + range_at, mask=visible, other=0.0).to(tl.float32)

        # -- scores [BS, GP], in units of the largest key times the largest query ---------------------------------
        scores = tl.zeros((BS, GP), tl.float32)
        for c in tl.static_range(CPL):
            word = column_of(codes, c, CPLP, R, 64)
            bits3 = column_of(third, c, CPLP, R, 64)
            for half in tl.static_range(KNP):
                n = c * KNP + half
                ranges = affine + ((n * 4 + r) * 8)[:, None] + four
                sx01, sx23, zx01, zx23 = four_columns(tl.load(ranges), 1, 64)
                sy01, sy23, zy01, zy23 = four_columns(tl.load(ranges + 4), 1, 64)
                at = q_words + ((n * GP + lane // 4) * 4 + lane % 4) * 4
                x01 = tl.reshape(stack(at, True, 128, 256, NG, False), (32, NG))
                x23 = tl.reshape(stack(at + 1, True, 128, 256, NG, False), (32, NG))
                y01 = tl.reshape(stack(at + 2, True, 128, 256, NG, False), (32, NG))
                y23 = tl.reshape(stack(at + 3, True, 128, 256, NG, False), (32, NG))
                if ROTATED:
                    t = angle_words + ((first_row * UNITS * 4 + r) * 4 + n * 16)[:, None] + four
                    c01, c23, s01, s23 = four_columns(
                        stack(t, True, UNITS * 128, UNITS * 512, R, False), R, 64
                    )
                    o = base_words + ((column * UNITS + n) * 4 + lane % 4) * 4
                    x01, x23, y01, y23 = turned_back(
                        x01, x23, y01, y23, tl.load(o)[:, None], tl.load(o + 1)[:, None], tl.load(o + 2)[:, None],
                        tl.load(o + 3)[:, None], INTERPRET,
                    )  # fmt: skip
                else:
                    c01, c23, s01, s23 = word, word, word, word
                k01, k23, l01, l23 = key_words(
                    word, bits3, kt0, kt1, kt2, kt3, kt4, kt5, kt6, kt7, key_centroids,
                    sx01, sx23, zx01, zx23, sy01, sy23, zy01, zy23,
                    c01, c23, s01, s23, 2 * half, KB, ROTATED, INTERPRET,
                )  # fmt: skip
                scores = tl.dot(key_side(k01, k23, R), query_side(x01, x23, NG), scores)
                scores = tl.dot(key_side(l01, l23, R), query_side(y01, y23, NG), scores)
        if K_BASE > 0:
            count = tl.load(key_count + block * H + h)
            stored = tl.minimum(count, K_BASE)
            index = key_index + (block * H + h) * K_BASE
            kept_row = key_value + (block * H + h) * K_BASE
            base = wide_bases + column * D
            own_chunks = tl.cdiv(stored, 32)
            chunk = tl.zeros((), tl.int64)
            if count > K_BASE:
                chunk = tl.load(spill_head + block * H + h).to(tl.int64)
            for i in range(own_chunks + tl.cdiv(count - stored, 32)):
                # The block's own row first, then the chain of spilled chunks.
                left = stored - i * 32
                numbers = index + i * 32
                kepts = kept_row + i * 32
                if i >= own_chunks:
                    left = count - K_BASE - (i - own_chunks) * 32
                    numbers = spill_index + chunk * 32
                    kepts = spill_value + chunk * 32
                    if left > 32:
                        chunk = tl.load(spill_next + chunk).to(tl.int64)
                live = entry < left
                number = tl.load(numbers + entry, mask=live, other=0).to(tl.int32) & 0xFFFF
                kept = tl.load(kepts + entry, mask=live, other=0.0).to(tl.float32)
                w = _key_differences(
                    number,
                    kept,
                    live,
                    q_half,
                    floor,
                    inverse_size,
                    offset_cos,
                    offset_sin,
                    base,
                    GP,
                    D,
                    ROTATED,
                )
                one = rows_equal(row_of(R), numbers, left, 0, D, True, R, INTERPRET)
                high = w.to(tl.float16)
                scores = tl.dot(one, high, scores)
                scores = tl.dot(one, (w - high.to(tl.float32)).to(tl.float16), scores)
        scores = scores * score_unit  # times log2(e), unless a cap comes first
        if HAS_SOFTCAP:
            # tanh through exp, which keeps its sign at both ends
            decay = tl.exp2(tl.abs(scores / softcap) * (-2.0 * 1.4426950408889634))
            scores = tl.where(scores < 0, -LOG2E, LOG2E) * softcap * (1.0 - decay) / (1.0 + decay)
        scores = tl.where(visible[:, None], scores, -float("inf"))

        # -- weights ---------------------------------------------------------------------------------------------
        new = tl.maximum(best, tl.max(scores, 0))
        shift = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp2(scores - shift[None, :])  # [BS, GP]
        fade = tl.exp2(best - shift)[None, :]
        best = new
        total = total * fade + tl.sum(tl.reshape(weights, (BS // 8, 8, GP)), 0)
        zeros = zeros * fade + tl.sum(tl.reshape(weights * v_zero[:, None], (BS // 8, 8, GP)), 0)

        # -- values: a token's range goes into its weight --------------------------------------------------------
        size = tl.max(v_scale, 0)
        size = tl.where(size > 0, size, 1.0)
        weighted = (weights * (v_scale / size)[:, None]).to(tl.float16)
        plain = (weights * WEIGHT_SCALE).to(tl.float16)
        v_codes = value_codes + row0 * V_ROW
        a0, ta0 = load_words(v_codes, r * 4, group_unit // VNP, VW, V_ROW, V_WORDS, D != 128, VB, 2, 16, S)
        b0, tb0 = load_words(
            v_codes, r * 4 + 1, group_unit // VNP, VW, V_ROW, V_WORDS, D != 128, VB, 2, 16, S
        )
        a0, b0, ta0, tb0 = flat(a0, S), flat(b0, S), flat(ta0, S), flat(tb0, S)
        shift0 = ((group_unit % VNP) * 2)[:, None]
        tile = value_tile(
            a0,
            b0,
            ta0,
            tb0,
            shift0,
            vt0,
            vt1,
            vt2,
            vt3,
            vt4,
            vt5,
            vt6,
            vt7,
            value_centroids,
            0,
            S,
            VB,
            INTERPRET,
        )
        out0 = tl.dot(tile, weighted)
        tile = value_tile(
            a0,
            b0,
            ta0,
            tb0,
            shift0,
            vt0,
            vt1,
            vt2,
            vt3,
            vt4,
            vt5,
            vt6,
            vt7,
            value_centroids,
            1,
            S,
            VB,
            INTERPRET,
        )
        out1 = tl.dot(tile, weighted)
        out2 = out0
        out3 = out1
        if UPG == 2:
            unit1 = group_unit + 1
            a1, ta1 = load_words(v_codes, r * 4, unit1 // VNP, VW, V_ROW, V_WORDS, D != 256, VB, 2, 16, S)
            b1, tb1 = load_words(v_codes, r * 4 + 1, unit1 // VNP, VW, V_ROW, V_WORDS, D != 256, VB, 2, 16, S)
            a1, b1, ta1, tb1 = flat(a1, S), flat(b1, S), flat(ta1, S), flat(tb1, S)
            shift1 = ((unit1 % VNP) * 2)[:, None]
            tile = value_tile(
                a1,
                b1,
                ta1,
                tb1,
                shift1,
                vt0,
                vt1,
                vt2,
                vt3,
                vt4,
                vt5,
                vt6,
                vt7,
                value_centroids,
                0,
                S,
                VB,
                INTERPRET,
            )
            out2 = tl.dot(tile, weighted)
            tile = value_tile(
                a1,
                b1,
                ta1,
                tb1,
                shift1,
                vt0,
                vt1,
                vt2,
                vt3,
                vt4,
                vt5,
                vt6,
                vt7,
                value_centroids,
                1,
                S,
                VB,
                INTERPRET,
            )
            out3 = tl.dot(tile, weighted)
        if V_ENTRIES > 0:
            ends = value_end + block * H
            closed = tl.load(ends + H - 1) > 0
            # An open block lists all heads' entries token by token, a closed one those of each head together.
            e_first = 0
            if h > 0:
                e_first = tl.load(ends + h - 1)
            e_last = tl.where(closed, tl.load(ends + h), tl.minimum(length - column * BS, BS) * V_ENTRIES)
            entries = block * BS * V_ENTRIES
            for e1 in range((e_first // 4) * 4, e_last, 32):
                one = tokens_equal(
                    value_index + entries, e1, e_first, e_last, closed, D, BS, V_ENTRIES, INTERPRET
                )
                picked = tl.dot(one, plain)  # [32, GP]: the weights of the entries' tokens
                ve = e1 + entry
                v_live = (ve >= e_first) & (ve < e_last)
                v_number = tl.load(value_index + entries + ve, mask=v_live, other=0).to(tl.int32) & 0xFFFF
                v_kept = tl.load(value_value + entries + ve, mask=v_live, other=0.0).to(tl.float32)
                v_token = tl.where(closed, v_number // D, ve // V_ENTRIES) & (BS - 1)
                v_channel = tl.where(closed, v_number % D, v_number - h * D)
                v_live = v_live & (v_channel >= 0) & (v_channel < D)
                range_e = (block * BS + v_token) * VG + value_group
                zero_e = tl.load(value_zero + range_e).to(tl.float32)
                scale_e = tl.load(value_scale + range_e).to(tl.float32)
                delta = (v_kept - (zero_e + scale_e * v_first)) / size
                delta = tl.where(v_live, delta, 0.0)
                ew = tl.minimum(tl.maximum(picked * (delta / WEIGHT_SCALE)[:, None], -LARGEST), LARGEST).to(
                    tl.float16
                )
                numbers = value_index + entries + e1
                last = e_last - e1
                origin = tl.where(closed, -1, h * D)
                c0 = _channel_of_row(row_of(4), 0, D, VW, UPG, VNP)
                c1 = _channel_of_row(row_of(4), 1, D, VW, UPG, VNP)
                out0 = tl.dot(rows_equal(c0, numbers, last, origin, D, False, 4, INTERPRET), ew, out0)
                out1 = tl.dot(rows_equal(c1, numbers, last, origin, D, False, 4, INTERPRET), ew, out1)
                if UPG == 2:
                    c2 = _channel_of_row(row_of(4), 2, D, VW, UPG, VNP)
                    c3 = _channel_of_row(row_of(4), 3, D, VW, UPG, VNP)
                    out2 = tl.dot(rows_equal(c2, numbers, last, origin, D, False, 4, INTERPRET), ew, out2)
                    out3 = tl.dot(rows_equal(c3, numbers, last, origin, D, False, 4, INTERPRET), ew, out3)
        acc0 = acc0 * fade + out0 * size
        acc1 = acc1 * fade + out1 * size
        if UPG == 2:
            acc2 = acc2 * fade + out2 * size
            acc3 = acc3 * fade + out3 * size

    at_part = (bh * splits + split) * GP + g
    tl.store(part_best + at_part, best)
    tl.store(part_total + at_part, tl.sum(total, 0))
    zero_sum = tl.sum(zeros, 0)[None, :]
    _store_part(part_out, at_part, acc0 + zero_sum, G, GP, 0, D, VW, UPG, VNP)
    _store_part(part_out, at_part, acc1 + zero_sum, G, GP, 1, D, VW, UPG, VNP)
    if UPG == 2:
        _store_part(part_out, at_part, acc2 + zero_sum, G, GP, 2, D, VW, UPG, VNP)
        _store_part(part_out, at_part, acc3 + zero_sum, G, GP, 3, D, VW, UPG, VNP)


@triton.jit
def _merge_kernel(
    part_best, part_total, part_out, out, splits,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Fold the splits of one query head; a split that saw nothing has -inf and counts for nothing."""
    head = tl.program_id(0)
    bh = head // G
    g = head % G
    d = tl.arange(0, DP)
    mask = d < D
    best = -float("inf")
    for s in range(splits):
        best = tl.maximum(best, tl.load(part_best + (bh * splits + s) * GP + g))
    total = 0.0
    acc = tl.zeros((DP,), tl.float32)
    for s in range(splits):
        row = (bh * splits + s) * GP + g
        weight = tl.exp2(tl.load(part_best + row) - best)
        total += tl.load(part_total + row) * weight
        acc += tl.load(part_out + row * D + d, mask=mask, other=0.0) * weight
    tl.store(out + head * D + d, (acc / total).to(out.dtype.element_ty), mask=mask)
