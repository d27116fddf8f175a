"""Decode attention straight from packed blocks: one query per sequence, split over blocks, merged by log-sum-exp.

One program takes a run of blocks of one (sequence, KV head) and serves all its query heads, so that a tile of keys or
values is decoded once. Where the time goes, per element of K or V: 1.3 to 2.9 instructions for the look-up
(lookup.py), for keys one fp16 multiply-add of the channel's range and two for the rotation; the products run on tensor
cores. A value's range belongs to its token and is folded into the weights. Rows of a plane are strided (byte j holds
channels j, j + W, ...), so that every field is a tile of W neighbouring channels and RoPE partners are two such tiles:
nothing is permuted. Outliers are added as differences to what their code 0 decodes to: to the scores (times the
query turned back to the key's position) and to the output (times the weight), by products with 0/1 matrices, because
Triton has no scatter.

Numbers are fp16 inside, relative to the largest key and query of the head, so that bf16 ranges cannot overflow.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.triton_kernels.lookup import fields_2, fields_3, fields_4, table_word

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tables(centroids, BITS: tl.constexpr):
    """Words of the look-up tables; those a width has no use for are 0."""
    lo0 = table_word(centroids, 0, 0)
    hi0 = table_word(centroids, 0, 8)
    lo1 = lo0
    lo2 = lo0
    lo3 = lo0
    hi1 = hi0
    hi2 = hi0
    hi3 = hi0
    if BITS >= 3:
        lo1 = table_word(centroids, 4, 0)
        hi1 = table_word(centroids, 4, 8)
    if BITS == 4:
        lo2 = table_word(centroids, 8, 0)
        hi2 = table_word(centroids, 8, 8)
        lo3 = table_word(centroids, 12, 0)
        hi3 = table_word(centroids, 12, 8)
    return lo0, lo1, lo2, lo3, hi0, hi1, hi2, hi3


@triton.jit
def _load_codes(row, D: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, BITS: tl.constexpr):
    """Bytes of a block's rows [BS, WP] and, for 3 bits, of their 1-bit plane; ``row`` points to each row [BS, 1]."""
    col = tl.arange(0, WP)[None, :]
    inside = col < W
    codes = tl.load(row + col, mask=inside, other=0)
    high = codes
    if BITS == 3:
        W1: tl.constexpr = W // 2
        high = tl.load(row + W + (col % W1), mask=inside, other=0)
    return codes, high


@triton.jit
def _decode_fields(
    codes, high, t0, t1, t2, t3, t4, t5, t6, t7, centroids,
    W: tl.constexpr, WP: tl.constexpr, BITS: tl.constexpr, BS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Four tiles [BS, WP] of centroids; at 4 and 8 bits the first two count."""
    if BITS == 2:
        return fields_2(codes, t0, t4, centroids, INTERPRET)
    elif BITS == 3:
        col = tl.arange(0, WP)[None, :] + tl.zeros((BS, 1), tl.int32)
        upper = tl.where(col >= W // 2, 255, 0).to(tl.uint8)
        return fields_3(codes, high, upper, t0, t1, t4, t5, centroids, INTERPRET)
    else:
        x, y = fields_4(codes, t0, t1, t2, t3, t4, t5, t6, t7, centroids, INTERPRET)
        return x, y, x, y


@triton.jit
def _power_of_two(size):
    """The next power of two, 1 for 0: dividing by it rounds nothing, so that fp16 queries stay what they are."""
    return tl.exp2(tl.ceil(tl.log2(tl.where(size > 0, size, 1.0))))


@triton.jit
def _decode_kernel(
    # What is attended with: [B, Hq, D] fp32, rotated at its position
    query, block_table, kv_lengths,
    # Keys
    key_codes, key_count, key_index, key_value, spill_head, spill_next, spill_index, spill_value,
    key_zero, key_scale, key_centroids,
    # Values
    value_codes, value_zero, value_scale, value_index, value_value, value_end, value_centroids,
    # Rotary tables
    offset_cos, offset_sin, base_cos, base_sin,
    # Partial results [B, H, SPLITS, GP (, D)]
    part_best, part_total, part_out, part_out2,
    softmax_scale, softcap, window, sink_tokens, table_stride, base_entries, value_outliers,
    H, VG, bpt,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BS: tl.constexpr,
    KB: tl.constexpr, VB: tl.constexpr, KW: tl.constexpr, VW: tl.constexpr, KWP: tl.constexpr, VWP: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, KF: tl.constexpr, VF: tl.constexpr,
    SPLITS: tl.constexpr, EC: tl.constexpr, HAS_ROPE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_K_OUT: tl.constexpr, HAS_V_OUT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    split = tl.program_id(1)
    length = tl.load(kv_lengths + b)
    blocks = tl.cdiv(length, BS)
    first_visible = tl.zeros((), tl.int32) + sink_tokens
    if HAS_WINDOW:
        first_visible = tl.maximum(first_visible, length - window)
    start_block = first_visible // BS
    per_split = tl.cdiv(tl.maximum(blocks - start_block, 0), SPLITS)
    begin = start_block + split * per_split
    end = tl.minimum(begin + per_split, blocks)

    g = tl.arange(0, GP)
    slot = tl.arange(0, BS)
    kw = tl.arange(0, KWP)
    vw = tl.arange(0, VWP)
    entry = tl.arange(0, EC)
    lane32 = tl.arange(0, 32)
    HALF: tl.constexpr = D // 2

    # -- what stays the same over the loop ---------------------------------------------------------------------
    q_row = query + ((b * H + h) * G + g[:, None]) * D  # [GP, 1]
    q_mask = (g[:, None] < G) & (kw[None, :] < KW)
    zero_row = key_zero + h * D
    scale_row = key_scale + h * D
    d_all = tl.arange(0, 256)
    k_size = tl.max(tl.load(key_scale + h * D + d_all, mask=d_all < D, other=0.0), 0) * 1.5 + tl.max(
        tl.abs(tl.load(key_zero + h * D + d_all, mask=d_all < D, other=0.0)), 0
    )
    k_size = _power_of_two(k_size)
    q_all = tl.load(q_row + d_all[None, :], mask=(g[:, None] < G) & (d_all[None, :] < D), other=0.0)
    q_size = tl.max(tl.max(tl.abs(q_all), 1), 0) * 2.0
    q_size = _power_of_two(q_size)
    unit = softmax_scale * k_size * q_size

    # Fields f and f + KF/2 are RoPE partners. Tiles of the queries [GP, KWP] fp32, ranges [1, KWP] fp16.
    qa0 = tl.load(q_row + kw[None, :], mask=q_mask, other=0.0) / q_size
    qb0 = tl.load(q_row + HALF + kw[None, :], mask=q_mask, other=0.0) / q_size
    sa0 = (tl.load(scale_row + kw, mask=kw < KW, other=0.0) / k_size).to(tl.float16)[None, :]
    sb0 = (tl.load(scale_row + HALF + kw, mask=kw < KW, other=0.0) / k_size).to(tl.float16)[None, :]
    za0 = (tl.load(zero_row + kw, mask=kw < KW, other=0.0) / k_size).to(tl.float16)[None, :]
    zb0 = (tl.load(zero_row + HALF + kw, mask=kw < KW, other=0.0) / k_size).to(tl.float16)[None, :]
    if KF == 4:
        qa1 = tl.load(q_row + KW + kw[None, :], mask=q_mask, other=0.0) / q_size
        qb1 = tl.load(q_row + HALF + KW + kw[None, :], mask=q_mask, other=0.0) / q_size
        sa1 = (tl.load(scale_row + KW + kw, mask=kw < KW, other=0.0) / k_size).to(tl.float16)[None, :]
        sb1 = (tl.load(scale_row + HALF + KW + kw, mask=kw < KW, other=0.0) / k_size).to(tl.float16)[None, :]
        za1 = (tl.load(zero_row + KW + kw, mask=kw < KW, other=0.0) / k_size).to(tl.float16)[None, :]
        zb1 = (tl.load(zero_row + HALF + KW + kw, mask=kw < KW, other=0.0) / k_size).to(tl.float16)[None, :]
    if HAS_ROPE:
        rope_at = slot[:, None] * HALF + kw[None, :]
        rope_mask = (slot[:, None] < BS) & (kw[None, :] < KW)
        c0 = tl.load(offset_cos + rope_at, mask=rope_mask, other=0.0).to(tl.float16)
        s0 = tl.load(offset_sin + rope_at, mask=rope_mask, other=0.0).to(tl.float16)
        if KF == 4:
            c1 = tl.load(offset_cos + rope_at + KW, mask=rope_mask, other=0.0).to(tl.float16)
            s1 = tl.load(offset_sin + rope_at + KW, mask=rope_mask, other=0.0).to(tl.float16)

    kt0, kt1, kt2, kt3, kt4, kt5, kt6, kt7 = _tables(key_centroids, KB)
    vt0, vt1, vt2, vt3, vt4, vt5, vt6, vt7 = _tables(value_centroids, VB)
    k_first = tl.load(key_centroids)
    v_first = tl.load(value_centroids)
    group = h * VG // H

    best = tl.full((GP,), -float("inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    zeros = tl.zeros((GP,), tl.float32)
    acc0 = tl.zeros((GP, VWP), tl.float32)
    acc1 = tl.zeros((GP, VWP), tl.float32)
    acc2 = tl.zeros((GP, VWP), tl.float32)
    acc3 = tl.zeros((GP, VWP), tl.float32)
    DA: tl.constexpr = (D + 15) // 16
    DAP: tl.constexpr = 4 if DA <= 4 else (8 if DA <= 8 else 16)
    acc_out = tl.zeros((GP * DAP, 16), tl.float32)

    for column in range(begin, end):
        block = tl.load(block_table + b * table_stride + column).to(tl.int64)
        at = (block * H + h) * BS
        codes, high = _load_codes(key_codes + (at + slot[:, None]) * K_ROW, D, KW, KWP, KB)
        vcodes, vhigh = _load_codes(value_codes + (at + slot[:, None]) * V_ROW, D, VW, VWP, VB)
        position = column * BS + slot
        visible = (position < length) & (position >= first_visible)
        v_scale = tl.load(value_scale + (block * BS + slot) * VG + group, mask=visible, other=0.0).to(
            tl.float32
        )
        v_zero = tl.load(value_zero + (block * BS + slot) * VG + group, mask=visible, other=0.0).to(
            tl.float32
        )

        # -- the queries, turned back by the block's base --------------------------------------------------------
        if HAS_ROPE:
            tile_row = (column // bpt) * HALF
            off_row = (column % bpt) * BS * HALF
            j = tl.arange(0, KWP)
            jm = j < KW
            cb = tl.load(base_cos + tile_row + j, mask=jm, other=1.0)
            sb = tl.load(base_sin + tile_row + j, mask=jm, other=0.0)
            co = tl.load(offset_cos + off_row + j, mask=jm, other=1.0)
            so = tl.load(offset_sin + off_row + j, mask=jm, other=0.0)
            inv = tl.rsqrt(co * co + so * so)  # the offset table carries the model's attention scaling
            cc0 = ((cb * co - sb * so) * inv)[None, :]
            ss0 = ((sb * co + cb * so) * inv)[None, :]
            ra0 = (qa0 * cc0 + qb0 * ss0).to(tl.float16)
            rb0 = (qb0 * cc0 - qa0 * ss0).to(tl.float16)
            if KF == 4:
                cb1 = tl.load(base_cos + tile_row + KW + j, mask=jm, other=1.0)
                sb1_ = tl.load(base_sin + tile_row + KW + j, mask=jm, other=0.0)
                co1 = tl.load(offset_cos + off_row + KW + j, mask=jm, other=1.0)
                so1 = tl.load(offset_sin + off_row + KW + j, mask=jm, other=0.0)
                inv1 = tl.rsqrt(co1 * co1 + so1 * so1)
                cc1 = ((cb1 * co1 - sb1_ * so1) * inv1)[None, :]
                ss1 = ((sb1_ * co1 + cb1 * so1) * inv1)[None, :]
                ra1 = (qa1 * cc1 + qb1 * ss1).to(tl.float16)
                rb1 = (qb1 * cc1 - qa1 * ss1).to(tl.float16)
        else:
            ra0 = qa0.to(tl.float16)
            rb0 = qb0.to(tl.float16)
            if KF == 4:
                ra1 = qa1.to(tl.float16)
                rb1 = qb1.to(tl.float16)

        # -- scores ----------------------------------------------------------------------------------------------
        f0, f1, f2, f3 = _decode_fields(
            codes, high, kt0, kt1, kt2, kt3, kt4, kt5, kt6, kt7, key_centroids, KW, KWP, KB, BS, INTERPRET
        )
        if KF == 4:
            xa0 = f0 * sa0 + za0
            xb0 = f2 * sb0 + zb0
            xa1 = f1 * sa1 + za1
            xb1 = f3 * sb1 + zb1
        else:
            xa0 = f0 * sa0 + za0
            xb0 = f1 * sb0 + zb0
        if HAS_ROPE:
            ya0 = xa0 * c0 - xb0 * s0
            yb0 = xb0 * c0 + xa0 * s0
        else:
            ya0 = xa0
            yb0 = xb0
        scores = tl.dot(ra0, tl.trans(ya0))
        scores = tl.dot(rb0, tl.trans(yb0), scores)
        if KF == 4:
            if HAS_ROPE:
                ya1 = xa1 * c1 - xb1 * s1
                yb1 = xb1 * c1 + xa1 * s1
            else:
                ya1 = xa1
                yb1 = xb1
            scores = tl.dot(ra1, tl.trans(ya1), scores)
            scores = tl.dot(rb1, tl.trans(yb1), scores)
        scores = scores * unit
        if HAS_K_OUT:
            count = tl.load(key_count + block * H + h)
            stored = tl.minimum(count, base_entries)
            row = (block * H + h) * base_entries
            for e0 in range(0, stored, EC):
                e = e0 + entry
                live = e < stored
                number = tl.load(key_index + row + e, mask=live, other=0).to(tl.int32) & 0xFFFF
                kept = tl.load(key_value + row + e, mask=live, other=0.0).to(tl.float32)
                scores += _key_outliers(
                    number, kept, live, q_row, zero_row, scale_row, k_first, offset_cos, offset_sin, base_cos,
                    base_sin, column, bpt, softmax_scale, g, slot, G, GP, D, BS, EC, HAS_ROPE,
                )  # fmt: skip
            left = count - base_entries
            if left > 0:
                chunk = tl.load(spill_head + block * H + h).to(tl.int64)
                while left > 0:
                    live32 = lane32 < left
                    number32 = (
                        tl.load(spill_index + chunk * 32 + lane32, mask=live32, other=0).to(tl.int32) & 0xFFFF
                    )
                    kept32 = tl.load(spill_value + chunk * 32 + lane32, mask=live32, other=0.0).to(tl.float32)
                    scores += _key_outliers(
                        number32, kept32, live32, q_row, zero_row, scale_row, k_first, offset_cos, offset_sin,
                        base_cos, base_sin, column, bpt, softmax_scale, g, slot, G, GP, D, BS, 32, HAS_ROPE,
                    )  # fmt: skip
                    left -= 32
                    if left > 0:
                        chunk = tl.load(spill_next + chunk).to(tl.int64)
        if HAS_SOFTCAP:
            # tanh through exp, which keeps its sign at both ends
            decay = tl.exp2(tl.abs(scores / softcap) * (-2.0 * 1.4426950408889634))
            scores = tl.where(scores < 0, -1.0, 1.0) * softcap * (1.0 - decay) / (1.0 + decay)
        scores = tl.where(visible[None, :], scores * LOG2E, -float("inf"))

        # -- weights ---------------------------------------------------------------------------------------------
        new = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp2(scores - shift[:, None])  # [GP, BS]
        fade = tl.exp2(best - shift)
        best = new
        total = total * fade + tl.sum(weights, 1)
        zeros = zeros * fade + tl.sum(weights * v_zero[None, :], 1)

        # -- values: a token's range goes into its weight --------------------------------------------------------
        size = tl.max(v_scale, 0)
        size = tl.where(size > 0, size, 1.0)
        p = (weights * (v_scale / size)[None, :]).to(tl.float16)
        v0, v1, v2, v3 = _decode_fields(
            vcodes, vhigh, vt0, vt1, vt2, vt3, vt4, vt5, vt6, vt7, value_centroids, VW, VWP, VB, BS, INTERPRET
        )
        acc0 = acc0 * fade[:, None] + tl.dot(p, v0) * size
        acc1 = acc1 * fade[:, None] + tl.dot(p, v1) * size
        if VF == 4:
            acc2 = acc2 * fade[:, None] + tl.dot(p, v2) * size
            acc3 = acc3 * fade[:, None] + tl.dot(p, v3) * size
        if HAS_V_OUT:
            faded = tl.broadcast_to(fade[:, None], (GP, DAP))
            acc_out = acc_out * tl.reshape(faded, (GP * DAP,))[:, None]
            ends = value_end + block * H
            closed = tl.load(ends + H - 1) > 0
            # An open block lists all heads' entries token by token, a closed one those of each head together.
            e_first = 0
            if h > 0:
                e_first = tl.load(ends + h - 1)
            e_last = tl.where(
                closed, tl.load(ends + h), tl.minimum(length - column * BS, BS) * value_outliers
            )
            table = block * BS * value_outliers
            for e0 in range(e_first, e_last, EC):
                e = e0 + entry
                live = e < e_last
                number = tl.load(value_index + table + e, mask=live, other=0).to(tl.int32) & 0xFFFF
                kept = tl.load(value_value + table + e, mask=live, other=0.0).to(tl.float32)
                t = tl.where(closed, number // D, e // value_outliers)
                d = tl.where(closed, number % D, number - h * D)
                live = live & (d >= 0) & (d < D) & (t < BS)
                t = tl.where(live, t, 0)
                zero_e = tl.load(value_zero + (block * BS + t) * VG + group, mask=live, other=0.0).to(
                    tl.float32
                )
                scale_e = tl.load(value_scale + (block * BS + t) * VG + group, mask=live, other=0.0).to(
                    tl.float32
                )
                delta = kept - (zero_e + scale_e * v_first)
                w = tl.gather(weights, tl.broadcast_to(t[None, :], (GP, EC)), 1)
                w = tl.where(live[None, :] & (w > 0), w * delta[None, :], 0.0)  # [GP, EC]
                a = tl.arange(0, DAP)
                rows = tl.where((d // 16)[None, None, :] == a[None, :, None], w[:, None, :], 0.0)
                ones = tl.where((d % 16)[:, None] == tl.arange(0, 16)[None, :], 1.0, 0.0)
                acc_out += tl.dot(tl.reshape(rows, (GP * DAP, EC)), ones, input_precision="tf32")

    out = ((b * H + h) * SPLITS + split) * GP + g
    tl.store(part_best + out, best)
    tl.store(part_total + out, total)
    o_row = part_out + out[:, None] * D + vw[None, :]
    o_mask = (g[:, None] < G) & (vw[None, :] < VW)
    tl.store(o_row, acc0 + zeros[:, None], mask=o_mask)
    tl.store(o_row + VW, acc1 + zeros[:, None], mask=o_mask)
    if VF == 4:
        tl.store(o_row + 2 * VW, acc2 + zeros[:, None], mask=o_mask)
        tl.store(o_row + 3 * VW, acc3 + zeros[:, None], mask=o_mask)
    if HAS_V_OUT:
        r = tl.arange(0, GP * DAP)
        o2 = (((b * H + h) * SPLITS + split) * GP + r // DAP) * D + (r % DAP) * 16
        col = tl.arange(0, 16)
        ok = ((r % DAP) * 16)[:, None] + col[None, :] < D
        tl.store(part_out2 + o2[:, None] + col[None, :], acc_out, mask=ok)


@triton.jit
def _key_outliers(
    number, kept, live, q_row, zero_row, scale_row, k_first, offset_cos, offset_sin, base_cos, base_sin, column, bpt,
    softmax_scale, g, slot,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, EC: tl.constexpr, HAS_ROPE: tl.constexpr,
):  # fmt: skip
    """What the entries of one chunk add to the scores, [GP, BS] fp32."""
    HALF: tl.constexpr = D // 2
    t = number // D
    d = number % D
    delta = kept - (tl.load(zero_row + d) + tl.load(scale_row + d) * k_first)
    own = tl.load(q_row + d[None, :], mask=(g[:, None] < G) & live[None, :], other=0.0)  # [GP, EC]
    if HAS_ROPE:
        j = d % HALF
        tile = (column // bpt) * HALF + j
        offset = ((column % bpt) * BS + t) * HALF + j
        cb = tl.load(base_cos + tile)
        sb = tl.load(base_sin + tile)
        co = tl.load(offset_cos + offset)
        so = tl.load(offset_sin + offset)
        cos = cb * co - sb * so
        sin = tl.where(d < HALF, 1.0, -1.0) * (sb * co + cb * so)
        partner = tl.where(d < HALF, d + HALF, d - HALF)
        other = tl.load(q_row + partner[None, :], mask=(g[:, None] < G) & live[None, :], other=0.0)
        own = own * cos[None, :] + other * sin[None, :]
    w = own * tl.where(live, delta * softmax_scale, 0.0)[None, :]
    ones = tl.where((t[:, None] == slot[None, :]) & live[:, None], 1.0, 0.0)  # [EC, BS]
    return tl.dot(w, ones, input_precision="tf32")


@triton.jit
def _merge_kernel(
    part_best, part_total, part_out, part_out2, out, splits,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HAS_V_OUT: tl.constexpr,
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
        if HAS_V_OUT:
            acc += tl.load(part_out2 + row * D + d, mask=mask, other=0.0) * weight
    tl.store(out + head * D + d, (acc / total).to(out.dtype.element_ty), mask=mask)
