"""What writing keys and values share: codes of a tile, and codes folded into the bytes of their planes.

Planes (``kvquant.packing``) differ in width, so a head's channels are worked on in subfields of U = D * w / 8 channels,
w the narrowest plane: subfield u is channels u*U to u*U + U - 1, and every byte of a plane 2**k times as wide lies in
one of 2**k runs of U bytes. All runs of a row come to U * (bits / w) bytes, the planes in their order; a tile of words
holds one byte of each run.
"""

# Kernels take tensors of pointers and constants, which have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def count_codes(x, zero, scale, midpoints, COUNT: tl.constexpr):
    """How many of the boundaries zero + scale * midpoint lie strictly below each element of the fp32 tile ``x``.

    Launch with ``enable_fp_fusion=False``: product and sum are rounded on their own.
    """
    code = (x > scale * tl.load(midpoints) + zero).to(tl.int32)
    if COUNT <= 16:
        for m in tl.static_range(1, COUNT):
            code += (x > scale * tl.load(midpoints + m) + zero).to(tl.int32)
    else:
        for m in range(1, COUNT):
            code += (x > scale * tl.load(midpoints + m) + zero).to(tl.int32)
    return code


@triton.jit
def _fold_plane(words, code, SUBFIELD: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    # A width of b bits has the planes that b is written with in binary, the widest first and lowest.
    if BITS & WIDTH:
        NARROWEST: tl.constexpr = BITS & -BITS
        BELOW: tl.constexpr = BITS // (2 * WIDTH) * (2 * WIDTH)
        RUNS: tl.constexpr = WIDTH // NARROWEST
        BYTE: tl.constexpr = BELOW // NARROWEST + SUBFIELD % RUNS
        field = (code >> BELOW) & ((1 << WIDTH) - 1)
        words |= field.to(words.dtype) << (8 * BYTE + SUBFIELD // RUNS * WIDTH)
    return words


@triton.jit
def fold(words, code, SUBFIELD: tl.constexpr, BITS: tl.constexpr):
    """Put the codes of one subfield into their place in a tile of words."""
    words = _fold_plane(words, code, SUBFIELD, BITS, 8)
    words = _fold_plane(words, code, SUBFIELD, BITS, 4)
    words = _fold_plane(words, code, SUBFIELD, BITS, 2)
    return _fold_plane(words, code, SUBFIELD, BITS, 1)


@triton.jit
def no_words(ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """An empty tile of words: 32 bits where they hold a byte of every run, 64 for 5 and 7 bits."""
    if BITS // (BITS & -BITS) <= 3:
        return tl.zeros((ROWS, COLUMNS), tl.int32)
    else:
        return tl.zeros((ROWS, COLUMNS), tl.int64)


@triton.jit
def store_words(words, at, mask, U: tl.constexpr, BITS: tl.constexpr):
    """Store a tile of words as the bytes of packed rows; ``at`` points to each word's byte of the first run."""
    for k in tl.static_range(BITS // (BITS & -BITS)):
        tl.store(at + k * U, ((words >> (8 * k)) & 255).to(tl.uint8), mask=mask)


@triton.jit
def is_finite(x):
    """Whether elements are neither NaN nor infinite."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def report(error, kind, channel, NO_CHANNEL: tl.constexpr):
    """Set the error word if ``channel`` is one and no error came before; programs of one launch report one kind."""
    set_it = (channel < NO_CHANNEL) & (tl.load(error) == 0)
    tl.store(error + 1, channel.to(tl.int64), mask=set_it)
    tl.store(error, kind, mask=set_it)


def subfield_width(head_dim: int, bits: int) -> int:
    """U, the channels of a subfield.

    Raises:
        ValueError: the planes of a row do not fill whole bytes.
    """
    per_byte = 8 // (bits & -bits)
    if head_dim % per_byte:
        raise ValueError(
            f"kernel=triton packs head_dim in multiples of {per_byte} at {bits} bits, got {head_dim}; "
            "use kernel=pytorch_fused"
        )
    return head_dim // per_byte


def tile_rows(most: int) -> int:
    """Rows of a tile for up to ``most`` of them: few sizes, so that few kernels are compiled."""
    return 4 if most <= 4 else 16


def as_bytes(skip: Tensor | None, other: Tensor) -> Tensor:
    """A mask as bytes; without one, a tensor that stands in for it and is not read."""
    return other if skip is None else skip.view(torch.uint8)
