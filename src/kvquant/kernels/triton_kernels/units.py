"""One unit of a block's keys or values (lookup.py), from its words to its products with queries or weights."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.triton_kernels.fragments import (
    flat,
    key_side,
    load_words,
    query_side,
    turned,
    turned_once_rounded,
    two_words,
    value_side,
)
from kvquant.kernels.triton_kernels.lookup import key_words, value_words
from kvquant.kernels.triton_kernels.scratch import fetch_angles, fetch_keys, fetch_values, half_add


@triton.jit
def unit_scores(
    scores, word, third, tables, centroids, upper, x_affine, y_affine, x, y, turn, angle, differences,
    SHIFT: tl.constexpr, N: tl.constexpr, NG: tl.constexpr, BITS: tl.constexpr, ROTATED: tl.constexpr,
    HALF_QUERY: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """Scores of 16 N tokens, [16 N, GP], with one unit of their keys more: eight channels of each of four lanes.

    Keys are rotated by their place among these, the query is turned back by the angle of the first
    (:func:`unit_angle`); with more care if its own dtype is as fine as what it is turned in.
    """
    sx01, sx23, zx01, zx23 = x_affine
    sy01, sy23, zy01, zy23 = y_affine
    k01, k23, l01, l23 = key_words(
        word, third, tables, centroids, upper, sx01, sx23, zx01, zx23, sy01, sy23, zy01, zy23, SHIFT, BITS
    )  # fmt: skip
    if SCATTER:
        d01, d23, e01, e23 = fetch_keys(differences, N)
        k01 = half_add(k01, tl.reshape(d01, (64, N)))
        k23 = half_add(k23, tl.reshape(d23, (64, N)))
        l01 = half_add(l01, tl.reshape(e01, (64, N)))
        l23 = half_add(l23, tl.reshape(e23, (64, N)))
    x01, x23 = x
    y01, y23 = y
    if ROTATED:
        l01, l23, k01, k23 = turned(l01, l23, k01, k23, turn[0], turn[1], turn[2], turn[3])
        cos01, cos23, sin01, sin23 = angle
        if HALF_QUERY:
            x01, x23, y01, y23 = turned_once_rounded(x01, x23, y01, y23, cos01, cos23, sin01, sin23)
        else:
            x01, x23, y01, y23 = turned(x01, x23, y01, y23, cos01, cos23, sin01, sin23)
    scores = tl.dot(key_side(k01, k23, N), query_side(x01, x23, NG), scores)
    return tl.dot(key_side(l01, l23, N), query_side(y01, y23, NG), scores)


@triton.jit
def unit_angle(bases, staged, unit, lane, STAGED: tl.constexpr):
    """Words of a unit's cosines (2) and sines (2) at the first of some rows, [32, 1] each.

    From the scratch's address ``staged`` if STAGED, else straight from the table.
    """
    if STAGED:
        return fetch_angles(staged, unit, lane)
    else:
        base = bases.to(tl.pointer_type(tl.int64)) + unit * 8 + lane % 4
        cos01, cos23 = two_words(tl.load(base)[:, None])
        sin01, sin23 = two_words(tl.load(base + 4)[:, None])
        return cos01, cos23, sin01, sin23


@triton.jit
def unit_codes(
    codes, r, unit, W: tl.constexpr, ROW: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr, NP: tl.constexpr,
    BITS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Words of a unit of values and their third bits, of tokens 4r and 4r + 2 and so on, then of those behind each."""
    a, third_a = load_words(codes, r * 4, unit // NP, W, ROW, WORDS, MASKED, BITS, 2, 16, S)
    b, third_b = load_words(codes, r * 4 + 1, unit // NP, W, ROW, WORDS, MASKED, BITS, 2, 16, S)
    return flat(a, S), flat(b, S), flat(third_a, S), flat(third_b, S)


@triton.jit
def unit_sums(
    acc_x, acc_y, fade, codes, second, tables, centroids, upper, weighted, BITS: tl.constexpr, S: tl.constexpr
):
    """Add the two fields of a unit of values, weighted, to faded sums; ``second``: is it the second of its words?"""
    a, b, third_a, third_b = codes
    shift = (second * 2)[:, None]
    w0, w1, w2, w3 = value_words(a, b, third_a, third_b, shift, tables, centroids, upper, 0, BITS)
    acc_x = tl.dot(value_side(w0, w1, w2, w3, S), weighted, acc_x * fade)
    w0, w1, w2, w3 = value_words(a, b, third_a, third_b, shift, tables, centroids, upper, 1, BITS)
    return acc_x, tl.dot(value_side(w0, w1, w2, w3, S), weighted, acc_y * fade)


@triton.jit
def unit_differences(acc_x, acc_y, at, plain, S: tl.constexpr):
    """Add what the scratch holds for the two fields of a unit."""
    w0, w1, w2, w3 = fetch_values(at, S)
    acc_x = tl.dot(value_side(flat(w0, S), flat(w1, S), flat(w2, S), flat(w3, S), S), plain, acc_x)
    w0, w1, w2, w3 = fetch_values(at + S * 1024, S)
    return acc_x, tl.dot(value_side(flat(w0, S), flat(w1, S), flat(w2, S), flat(w3, S), S), plain, acc_y)
