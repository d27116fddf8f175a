"""What the decode kernel needs of a call that depends on neither block nor token, and who takes which blocks
(shares.py), in one launch before it.

The decode kernel's threads read their queries, ranges and angles as words of two fp16 numbers, laid out here in the
order in which they want them: a unit n is (word c of a lane's share of the row, half of that word's fields), lane r of
four takes byte k = 0 to 3 of it, and both fields x and y of the byte, D/2 channels apart.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvquant.kernels.triton_kernels.lookup import load_tables
from kvquant.kernels.triton_kernels.shares import store_shares, store_tiers


@triton.jit
def _power_of_two(size):
    """The next power of two, 1 for 0: dividing by it rounds nothing, so that fp16 queries stay what they are."""
    return tl.exp2(tl.ceil(tl.log2(tl.where(size > 0, size, 1.0))))


@triton.jit
def _store_table(look_up, centroids, BITS: tl.constexpr):
    """Eight words of a look-up table, four times low and four times high bytes, twice each."""
    t = load_tables(centroids, BITS)
    for copy in tl.static_range(2):
        for k in tl.static_range(4):
            tl.store(look_up + copy * 4 + k, t[k])
            tl.store(look_up + 8 + copy * 4 + k, t[4 + k])


@triton.jit
def _least(scale, zero, centroids):
    """What a kernel's fp16 arithmetic makes of code 0: one product and one sum, rounded once."""
    first = tl.load(centroids).to(tl.float16).to(tl.float32)
    return (scale.to(tl.float16).to(tl.float32) * first + zero.to(tl.float16).to(tl.float32)).to(tl.float16)


@triton.jit
def _unit_angle(offset_cos, offset_sin, steps, channel, inside, HALF: tl.constexpr):
    """Cosine and sine of the angle of ``steps`` positions, without the model's attention scaling."""
    cos = tl.load(offset_cos + steps * HALF + channel, mask=inside, other=1.0)
    sin = tl.load(offset_sin + steps * HALF + channel, mask=inside, other=0.0)
    inverse = tl.rsqrt(cos * cos + sin * sin)
    return cos * inverse, sin * inverse


# Half of a model's pairs of channels often turn so slowly that from a block's middle to its ends, 32 tokens, a cosine is
# 1 and a sine a line: at an angle of 0.002 a token they miss 0.002 and 4e-5, about what bf16 and fp16 keep of them.
_SLOWEST = tl.constexpr(0.002)
_SLOPE_AT = tl.constexpr(28)  # tokens from the middle where the line meets the sine


@triton.jit
def _store_pair_angles(
    angles, slow, offset_cos, offset_sin, row, n, r, k, channel, inside,
    ROWS: tl.constexpr, HALF: tl.constexpr, UNITS: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """What the CUDA kernel keeps in shared memory of ``row``, which is so far from the middle of ROWS tokens.

    ``angles``: (cos, sin) pairs of all rows, four words of a lane after another (both tokens of a tile's row, of one
    pair of channels and of the next); which eight tokens lanes q have says token_of (layout.cuh). ``slow``, int32:
    (1, slope) of the pairs of units 1 and 3, and whether all are slow.
    """
    steps = row - ROWS // 2
    cos, sin = _unit_angle(offset_cos, offset_sin, tl.abs(steps), channel, inside, HALF)
    if KB == 4:
        q, i = row // 16 * 2 + row % 2, row // 2 % 8
    elif KB == 3:
        fourth = row // 2 % 4 ^ row // 32 * 2
        q, i = row // 32 * 4 + fourth % 2 * 2 + fourth // 2, row // 8 % 4 * 2 + row % 2
    else:
        q, i = row // 8, row % 8
    at = n * 1024 + (i // 2) * 256 + (k // 2) * 128 + q * 16 + r * 4 + (k % 2) * 2 + i % 2
    tl.store(angles + at * 2, cos.to(tl.float16), mask=n < UNITS)
    tl.store(angles + at * 2 + 1, tl.where(steps < 0, -sin, sin).to(tl.float16), mask=n < UNITS)
    if row == 0:
        upper = inside & (n % 2 == 1)
        cos, sin = _unit_angle(offset_cos, offset_sin, 1, channel, upper, HALF)
        is_slow = (cos > 0) & (tl.abs(sin) <= _SLOWEST) | (upper == 0)
        tl.store(slow + 32, tl.min(is_slow.to(tl.int32), 0))
        cos, sin = _unit_angle(offset_cos, offset_sin, _SLOPE_AT, channel, upper, HALF)
        slope = (sin * (ROWS / 2 / _SLOPE_AT)).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        tl.store(slow + (n // 2) * 16 + r * 4 + k, slope << 16 | 0x3C00, mask=upper)


@triton.jit(do_not_specialize=["programs", "at_once", "window", "sink_tokens"])
def _prepare_kernel(
    # [B, H, G, D]; [H, D] twice; centroids; rotary tables fp32 [>= BS, D/2] twice, [tiles, D/2] twice
    query, key_zero, key_scale, key_centroids, value_centroids, offset_cos, offset_sin, base_cos, base_sin, kv_lengths,
    # Results, fp16 unless said otherwise: [BH, units, (x, y), GP, 4 r, 4 k], [BH, D, GP],
    # [BH, units, 4 r, (scale x, zero x, scale y, zero y) * 4 k], fp32 [BH, D], fp32 [BH, 2],
    # [units, ROWS / 16, 64 threads, (cos, sin) * 4 k], [M, units, (cos, sin), 4 r, 4 k], fp32 [M, (cos, sin), D/2],
    # int32 [(keys, values), (low, high bytes), 2 copies, 4], shares and parts (shares.py); M counts ROWS tokens each.
    # With PAIRS, for the CUDA kernel: in the place of the first four, of each head GP rows of queries and one each of scales,
    # zeros and what code 0 means, (x, y) last; angles and the table in front of shares as of _store_pair_angles; bases
    # with (cos, sin) last.
    q_words, q_half, affine, floor, unit, angles, bases, wide_bases, look_up, shares, parts,
    heads, H, bpt, factor, programs, at_once, window, sink_tokens,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
    CPL: tl.constexpr, NP: tl.constexpr, PLACES: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, BS: tl.constexpr,
    SEQUENCES: tl.constexpr, FEWEST: tl.constexpr, HAS_WINDOW: tl.constexpr, PAIRS: tl.constexpr, TIERS: tl.constexpr,
    COUNT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program for each sequence, each (sequence, KV head), each of ROWS rows of the table of places, all ROWS tokens.

    The first ones share a sequence's blocks among the decode kernel's programs.

    Queries and keys are scaled by the head's largest so that fp16 holds them; ``unit[0]`` undoes that and carries
    ``factor`` (the softmax scale, times log2(e) where nothing comes between). The base of ROWS tokens is the angle
    of the first: queries are turned back by it, keys on by their place among these. With PAIRS it is the angle of the
    middle one, and has the model's attention scaling, which the angles of places have else.
    """
    if EARLY:  # the next kernel may start, and waits itself for what it needs of this one, as this one does
        gdc_launch_dependents()
        gdc_wait()
    HALF: tl.constexpr = D // 2
    UNITS: tl.constexpr = CPL * NP
    sequences = heads // H
    program = tl.program_id(0) - sequences
    place = tl.arange(0, PLACES)  # (n, r, k)
    n = place // 16
    r = (place // 4) % 4
    k = place % 4
    word = r * CPL + n // NP
    channel = (n % NP) * W + word * 4 + k
    if PAIRS and KB == 4:  # lanes exchange words: layout.cuh
        channel = (n % 2) * 32 + (r % 2) * 16 + (r // 2) * 8 + (n // 2) * 4 + k
    inside = (n < UNITS) & (word * 4 + k < W)
    if program < 0:
        b = program + sequences
        if COUNT > 0:
            store_tiers(
                b, kv_lengths, shares, parts, sequences, at_once, window, sink_tokens,
                BS, SEQUENCES, FEWEST, HAS_WINDOW, TIERS, COUNT,
            )  # fmt: skip
        else:
            store_shares(
                b, kv_lengths, shares, parts, sequences, programs, at_once, window, sink_tokens,
                BS, SEQUENCES, FEWEST, HAS_WINDOW,
            )  # fmt: skip
    elif program < heads:
        if program == 0 and not PAIRS:
            _store_table(look_up, key_centroids, KB)
            _store_table(look_up + 16, value_centroids, VB)
        h = program % H
        d = tl.arange(0, DP)
        zero = tl.load(key_zero + h * D + d, mask=d < D, other=0.0)
        scale = tl.load(key_scale + h * D + d, mask=d < D, other=0.0)
        k_size = tl.max(scale, 0) * 1.5 + tl.max(tl.abs(zero), 0)
        k_size = _power_of_two(k_size)
        g = tl.arange(0, GP)
        q_mask = (g[None, :] < G) & (d[:, None] < D)
        q = tl.load(query + (program * G + g[None, :]) * D + d[:, None], mask=q_mask, other=0.0).to(
            tl.float32
        )
        q_size = tl.max(tl.max(tl.abs(q), 1), 0) * 2.0
        q_size = _power_of_two(q_size)
        tl.store(unit + program * 2, factor * k_size * q_size)
        tl.store(unit + program * 2 + 1, 1.0 / k_size)
        if not PAIRS:
            tl.store(
                q_half + (program * D + d[:, None]) * GP + g[None, :],
                (q / q_size).to(tl.float16),
                mask=d[:, None] < D,
            )
            least = _least(scale / k_size, zero / k_size, key_centroids)
            tl.store(floor + program * D + d, least.to(tl.float32), mask=d < D)
        for side in tl.static_range(2):
            c = channel + side * HALF
            s = tl.load(key_scale + h * D + c, mask=inside, other=0.0) / k_size
            z = tl.load(key_zero + h * D + c, mask=inside, other=0.0) / k_size
            x = tl.load(
                query + (program * G + g[None, :]) * D + c[:, None],
                mask=(g[None, :] < G) & inside[:, None],
                other=0.0,
            ).to(tl.float32)
            if PAIRS:
                row = q_words + program * (GP + 3) * D
                at = place * 2 + side
                tl.store(
                    row + g[None, :] * D + at[:, None], (x / q_size).to(tl.float16), mask=(n < UNITS)[:, None]
                )
                tl.store(row + GP * D + at, s.to(tl.float16), mask=n < UNITS)
                tl.store(row + (GP + 1) * D + at, z.to(tl.float16), mask=n < UNITS)
                tl.store(row + (GP + 2) * D + at, _least(s, z, key_centroids), mask=n < UNITS)
            else:
                at = affine + ((program * UNITS + n) * 4 + r) * 16 + side * 8 + k
                tl.store(at, s.to(tl.float16), mask=n < UNITS)
                tl.store(at + 4, z.to(tl.float16), mask=n < UNITS)
                to = (((program * UNITS + n) * 2 + side)[:, None] * GP + g[None, :]) * 16 + (r * 4 + k)[
                    :, None
                ]
                tl.store(q_words + to, (x / q_size).to(tl.float16), mask=(n < UNITS)[:, None])
    elif program < heads + ROWS:
        row = program - heads
        if PAIRS:
            _store_pair_angles(
                angles,
                look_up,
                offset_cos,
                offset_sin,
                row,
                n,
                r,
                k,
                channel,
                inside,
                ROWS,
                HALF,
                UNITS,
                KB,
            )
        else:
            cos = tl.load(offset_cos + row * HALF + channel, mask=inside, other=0.0)
            sin = tl.load(offset_sin + row * HALF + channel, mask=inside, other=0.0)
            thread = ((row // 16) % 2) * 32 + (row % 8) * 4 + r
            at = angles + ((n * (ROWS // 16) + (row // 32) * 2 + (row // 8) % 2) * 64 + thread) * 8 + k
            tl.store(at, cos.to(tl.float16), mask=n < UNITS)
            tl.store(at + 4, sin.to(tl.float16), mask=n < UNITS)
    else:
        column = program - heads - ROWS
        tile = (column // bpt) * HALF + channel
        offset = ((column % bpt) * ROWS + (ROWS // 2 if PAIRS else 0)) * HALF + channel
        cb = tl.load(base_cos + tile, mask=inside, other=1.0)
        sb = tl.load(base_sin + tile, mask=inside, other=0.0)
        co = tl.load(offset_cos + offset, mask=inside, other=1.0)
        so = tl.load(offset_sin + offset, mask=inside, other=0.0)
        # The offset table carries the model's attention scaling, the base must not.
        inverse = 1.0 if PAIRS else tl.rsqrt(co * co + so * so)
        cos = (cb * co - sb * so) * inverse
        sin = (sb * co + cb * so) * inverse
        at = bases + (column * UNITS + n) * 32 + (r * 4 + k) * (2 if PAIRS else 1)
        tl.store(at, cos.to(tl.float16), mask=n < UNITS)
        tl.store(at + (1 if PAIRS else 16), sin.to(tl.float16), mask=n < UNITS)
        tl.store(wide_bases + column * D + channel, cos, mask=inside)
        tl.store(wide_bases + column * D + HALF + channel, sin, mask=inside)
