"""Each token's smallest and largest values, found without sorting the token.

Split a token's channels into groups: of the groups' maxima, the (n+1)-th largest is a bound that at least n + 1
channels reach, and with some three times as many groups as that, hardly a quarter more do. Those few are sorted, all
tokens of a chunk at once, by (token, value, channel), so that ties are exact by construction.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvquant.compiled import can_compile, in_parts, magnitude_mask, raw
from kvquant.encoding import SERIAL_ELEMENTS, Scratch, nonzero_flat, ordered, row_chunks

# Elements near the ends that are sorted at once, of as many tokens as that makes: enough to be worth the calls.
_SORTED_TOGETHER = 1 << 13


def split_value_outliers(values: Tensor, num_outliers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find each token's n smallest and n largest values, and the range of the rest; exact on ties.

    Ties go to the lowest channel among the smallest and to the highest channel among the largest; -0.0 equals
    0.0. Input must be finite: where NaN ranks is not defined (and stays within its token).

    Args:
        values (Tensor): [T, C], floating point.
        num_outliers (int): n, outliers at each end, as `value_outlier_count` gives it.

    Returns:
        tuple[Tensor, Tensor, Tensor]: outlier channels, ascending, [T, 2n], int32; lowest and highest of the
        remaining values, each [T], fp32.

    Raises:
        ValueError: values is not [T, C] with C <= 65536, or 2n >= C.
    """
    if values.dim() != 2 or values.shape[1] > 1 << 16:
        raise ValueError(f"values must be [tokens, at most 65536 channels], got shape {list(values.shape)}")
    num_tokens, num_channels = values.shape
    n = num_outliers
    if not 0 <= 2 * n < num_channels:
        raise ValueError(
            f"num_outliers at each end must be at least 0 and below half of the {num_channels} channels, got {n}; "
            "use value_outlier_count"
        )
    if n == 0:
        lowest, highest = (end.float() + 0.0 for end in values.aminmax(dim=1))
        return values.new_empty((num_tokens, 0), dtype=torch.int32), lowest, highest
    indices = values.new_empty((num_tokens, 2 * n), dtype=torch.int32)
    ranges = values.new_empty((2, num_tokens), dtype=torch.float32)
    if can_compile(values):
        _split_compiled(values.contiguous(), n, indices, ranges)
        return indices, ranges[0], ranges[1]
    channel_bits = (1 << 16) - 1
    step = max(1, _SORTED_TOGETHER // (2 * n + 2))
    for first in range(0, num_tokens, step):
        rows = slice(first, first + step)
        x = values[rows]
        keys, start, end = _few_tokens(x, n + 1) if x.numel() <= SERIAL_ELEMENTS else _many_tokens(x, n + 1)
        rank = torch.arange(n + 1, device=x.device)
        # Keys ascend within each token: n + 1 from its start, n + 1 back from its end.
        channels = torch.cat([keys[start[:, None] + rank], keys[end[:, None] - 1 - rank]], 1) & channel_bits
        # The (n+1)-th at either end belongs to the rest: its extreme comes for free.
        inner = channels[:, [n, 2 * n + 1]]
        outer = torch.cat([channels[:, :n], channels[:, n + 1 : 2 * n + 1]], 1)
        indices[rows] = outer.int().sort(dim=1).values
        ranges[:, rows] = x.gather(1, inner).t().float() + 0.0
    return indices, ranges[0], ranges[1]


def _split_compiled(values: Tensor, n: int, indices: Tensor, ranges: Tensor) -> None:
    """Fill indices [T, 2n] and ranges [2, T] by compiled loops over the tokens."""
    from kvquant.compiled.select_loops import split_rows

    T, C = values.shape
    x, ends = raw(values), [values.new_empty(T) for _ in range(2)]
    arguments = (x, magnitude_mask(x), n, _num_groups(C, n + 1), raw(indices), *map(raw, ends))
    in_parts(T, x.size, lambda first, last: split_rows(*arguments, first, last))
    ranges.copy_(torch.stack(ends))
    ranges += 0.0  # -0.0 becomes 0.0


def _keys(x: Tensor, channel: Tensor) -> Tensor:
    """One integer per element that orders by value, then by channel, from `ordered` elements; int64."""
    if x.dtype == torch.float32:
        bits = (x + 0.0).view(torch.int32)  # -0.0 becomes 0.0
        # Flipping the lower bits of negatives makes fp32 bits sort as floats.
        x = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return x.long().mul_(1 << 16).add_(channel)


def _few_tokens(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of [R, C] of which each token's ends are sorted, and where tokens start and end: two plain selections."""
    R, C = x.shape
    keys = _keys(ordered(x), torch.arange(C, device=x.device))
    ends = [keys.topk(count, largest=False).values, keys.topk(count).values.flip(1)]
    start = torch.arange(R, device=x.device) * (2 * count)
    return torch.cat(ends, 1).view(-1), start, start + 2 * count


def _many_tokens(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of those elements of [R, C] that can be among the ends, sorted, and where tokens start and end."""
    R, C = x.shape
    groups = _num_groups(C, count)
    found, kept, scratch = [], [], Scratch()
    for rows in row_chunks(x):
        part = ordered(x[rows], scratch)
        by_group = part.view(-1, C // groups, groups)  # strided groups: extremes are taken lane by lane
        low = by_group.amin(1).topk(count, largest=False, sorted=False).values.amax(1, keepdim=True)
        high = by_group.amax(1).topk(count, sorted=False).values.amin(1, keepdim=True)
        inside = torch.gt(part, low, out=scratch.take("above", part))
        inside.mul_(torch.lt(part, high, out=scratch.take("total", part)))
        at = nonzero_flat(inside.eq_(0))
        found.append(at + rows.start * C)
        kept.append(part.view(-1)[at])
    index = torch.cat(found)
    token = torch.div(index, C, rounding_mode="floor")
    keys = _keys(torch.cat(kept), index - token * C)
    end = torch.bincount(token, minlength=R).cumsum(0)
    # The token on top: a sorted token stays in its place.
    order = keys.add_(token << 49).sort().values
    return order, torch.cat([end.new_zeros(1), end[:-1]]), end


@functools.lru_cache(maxsize=64)
def _num_groups(num_channels: int, count: int) -> int:
    """The fewest equal groups of the channels that are at least 2.5 times `count`; each channel one if there are none."""
    return next(
        g
        for g in range(1, num_channels + 1)
        if num_channels % g == 0 and 2 * g >= min(5 * count, 2 * num_channels)
    )
