"""Codes of elements and elements of codes: counting decision boundaries, exactly and in as few passes as it takes.

A code counts the boundaries zero + scale * midpoint strictly below an element, in fp32, each product and sum rounded
on its own; every backend gives identical codes. What makes it fast on a CPU, and why:

- A comparison that writes bool runs one element at a time in PyTorch; one that writes its inputs' own type is five
  times faster (AVX-512: 0.10 ns an element against 0.53).
- 16-bit elements are compared as 16-bit integers in the order of the floats, with boundaries rounded down to the
  element's own type: x > b exactly when x > floor(b). Half the bytes, and as exact.
- An operation on more than 32,768 elements wakes PyTorch's other threads, which costs 60 to 90 us when they sleep:
  more than the operation. Rows are worked on in chunks below that, which also stay in the first two cache levels.
- From 6 bits on a binary search per element takes fewer steps than a pass per boundary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Below at::internal::GRAIN_SIZE: up to here an operation stays on the calling thread.
SERIAL_ELEMENTS = (1 << 15) - 1
# Where PyTorch has one thread anyway, the second-level cache is the limit: three temporaries of this many bytes.
_CACHED_BYTES = 1 << 18
# Passes that counting may take; beyond, searchsorted.
_MOST_PASSES = 31
_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def row_chunks(x: Tensor, num_elements: int | None = None) -> Iterator[slice]:
    """Slices of dimension 0 of about `num_elements` elements each, far more off the CPU, where launches cost.

    By default as many as an operation gets through on this thread and in its cache.
    """
    if num_elements is None:
        num_elements = _CACHED_BYTES // x.element_size() if torch.get_num_threads() == 1 else SERIAL_ELEMENTS
    if x.device.type != "cpu":
        num_elements *= 2048
    num_rows = len(x)
    step = max(1, num_elements * num_rows // max(1, x.numel()))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def boundaries(zero: Tensor, scale: Tensor, codebook_midpoints: Tensor) -> Tensor:
    """Decision boundaries zero + scale * midpoint.

    Args:
        zero (Tensor): centre of the range, any shape, as stored.
        scale (Tensor): half width of the range, the same shape, as stored.
        codebook_midpoints (Tensor): `midpoints(codebook)`, [M], fp32, ascending.

    Returns:
        Tensor: [M, *shape of zero], fp32, ascending along the first dimension.
    """
    zero, scale = zero.float(), scale.float()
    mids = codebook_midpoints.float().to(zero.device).view(-1, *[1] * zero.dim())
    # Two operations on purpose: a fused multiply-add rounds once and moves boundaries.
    return (scale * mids).add_(zero)


class Scratch:
    """Arrays that a loop over chunks uses again and again: fresh ones would fault in their pages every time."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An array of the shape of `like`, its content arbitrary; valid until `name` is taken again."""
        held, dtype = self._held.get(name), like.dtype if dtype is None else dtype
        if held is None or held.numel() < like.numel() or held.dtype != dtype:
            held = self._held[name] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return held[: like.numel()].view(like.shape)


def ordered(x: Tensor, scratch: Scratch | None = None) -> Tensor:
    """What `x` is compared as: fp32 as it is; 16-bit floats as int16 of the same order, both zeros 0.

    NaN lies beyond infinity, on the side of its sign bit. Other types are cast to fp32. With `scratch`, the result
    is its array "ordered".
    """
    if x.dtype not in _SIXTEEN_BIT:
        return x.float()
    scratch = scratch or Scratch()
    bits = x.view(torch.int16)
    # Sign and magnitude to two's complement: ~bits of a negative is 0x7fff - magnitude.
    sign = torch.bitwise_right_shift(bits, 15, out=scratch.take("above", bits))
    flipped = torch.bitwise_xor(bits, sign, out=scratch.take("ordered", bits))
    return flipped.add_(sign, alpha=0x7FFF)


def ordered_floor(bound: Tensor, dtype: torch.dtype) -> Tensor:
    """Bounds for `ordered` elements of `dtype`: x > bound exactly when ordered(x) > ordered_floor(bound).

    Args:
        bound (Tensor): fp32.
        dtype (torch.dtype): of the elements that will be compared.
    """
    if dtype not in _SIXTEEN_BIT:
        return bound
    nearest = bound.to(dtype)
    return ordered(nearest) - (nearest.float() > bound).to(torch.int16)


def ordered_range(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Closed range for `ordered` elements of `dtype` that holds the finite ones of [lower, upper]; never NaN."""
    largest = torch.finfo(dtype).max
    lower, upper = lower.clamp(min=-largest), upper.clamp(max=largest)
    # The ceiling of x is minus the floor of -x, and the order is symmetric.
    low = lower if dtype not in _SIXTEEN_BIT else -ordered_floor(-lower, dtype)
    return low, ordered_floor(upper, dtype)


def count_below(x: Tensor, bounds: Tensor, scratch: Scratch | None = None) -> Tensor:
    """How many bounds lie strictly below each element.

    Args:
        x (Tensor): from `ordered`, [T, ...].
        bounds (Tensor): from `ordered_floor`, [M, ...], ascending; each broadcasts against x.
        scratch (Scratch | None): where to work; the arrays "above" and "total" are taken.

    Returns:
        Tensor: the shape of x, uint8.
    """
    count, scratch = len(bounds), scratch or Scratch()
    if count > _MOST_PASSES:
        return _search(x, bounds)
    if x.numel() * count <= SERIAL_ELEMENTS:
        # A token or two: three operations in all.
        lead = [1] * (x.dim() + 1 - bounds.dim())
        return (x > bounds.view(count, *lead, *bounds.shape[1:])).sum(0, dtype=torch.uint8)
    total = torch.gt(x, bounds[0], out=scratch.take("total", x))
    above = scratch.take("above", x)
    for bound in bounds[1:].unbind():
        total.add_(torch.gt(x, bound, out=above))
    if total.dtype == torch.float32:
        # Through int16, because fp32 to uint8 runs one element at a time.
        total = scratch.take("narrow", x, torch.int16).copy_(total)
    return total.to(torch.uint8)


def _search(x: Tensor, bounds: Tensor) -> Tensor:
    """`count_below` by binary search; bounds are one set for all, [M], or sets per channel or per token."""
    if bounds[0].numel() == 1:
        return torch.searchsorted(bounds.flatten(), x, out_int32=True).to(torch.uint8)
    table = bounds.flatten(1).t().contiguous()
    if bounds.dim() > x.dim():  # per token
        return torch.searchsorted(table, x.flatten(1), out_int32=True).to(torch.uint8).view(x.shape)
    per_channel = x.flatten(1).t().contiguous()
    found = torch.searchsorted(table, per_channel, out_int32=True).to(torch.uint8)
    return found.t().contiguous().view(x.shape)


def nonzero_flat(mask: Tensor) -> Tensor:
    """Flat indices, ascending, of the nonzero elements of a contiguous mask that holds few of them; int64 [K]."""
    flat = mask.view(-1)
    if flat.dtype == torch.float32:
        flat = flat.to(torch.int16)
    per_word = 8 // flat.element_size()
    if flat.numel() % per_word or flat.storage_offset() % per_word:
        return flat.nonzero().view(-1)
    # Empty words are passed over at once.
    words = flat.view(torch.int64).nonzero().view(-1)
    inner = flat.view(-1, per_word)[words].nonzero()
    return words[inner[:, 0]] * per_word + inner[:, 1]


def encode(x: Tensor, zero: Tensor, scale: Tensor, codebook_midpoints: Tensor) -> Tensor:
    """Codes: how many decision boundaries zero + scale * midpoint are strictly below each element.

    Args:
        x (Tensor): elements, [T, ...], floating point.
        zero (Tensor): centre of the range, broadcasts against x, as stored.
        scale (Tensor): half width of the range, the same shape as zero.
        codebook_midpoints (Tensor): `midpoints(codebook)`, [2**bits - 1], fp32.

    Returns:
        Tensor: the shape of x, uint8. Outliers get a code like any other element: overwrite it.
    """
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    per_row = zero.dim() == x.dim() and len(zero) > 1
    fixed = None if per_row else ordered_floor(boundaries(zero, scale, codebook_midpoints), x.dtype)
    scratch = Scratch()
    for rows in row_chunks(x):
        bounds = fixed
        if bounds is None:
            bounds = ordered_floor(boundaries(zero[rows], scale[rows], codebook_midpoints), x.dtype)
        codes[rows] = count_below(ordered(x[rows], scratch), bounds, scratch)
    return codes


def decode(codes: Tensor, zero: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """Invert `encode`: codebook[code] * scale + zero, product and sum rounded separately.

    Args:
        codes (Tensor): [T, ...], uint8.
        zero (Tensor): broadcasts against codes, as stored.
        scale (Tensor): the same.
        codebook (Tensor): centroids, [2**bits], fp32.

    Returns:
        Tensor: the shape of codes, fp32.
    """
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    zero, scale, codebook = zero.float(), scale.float(), codebook.float().to(codes.device)
    for rows in row_chunks(codes):
        part = out[rows]
        torch.index_select(codebook, 0, codes[rows].reshape(-1).int(), out=part.view(-1))
        part.mul_(_rows_of(scale, codes, rows)).add_(_rows_of(zero, codes, rows))
    return out


def _rows_of(tensor: Tensor, like: Tensor, rows: slice) -> Tensor:
    """The part of a tensor that broadcasts against `like[rows]`."""
    return tensor[rows] if tensor.dim() == like.dim() and len(tensor) > 1 else tensor
