"""Attention of one token of each sequence over its dequantized history, dense: the truth in fp64, or as a model does it.

The measure of a kernel is the second one's error: the same numbers, rounded to the input's dtype, rotated in it as
transformers' models do, with products of that dtype summed in fp32 and weights rounded to it, as
scaled_dot_product_attention does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dense_decode(
    query: Tensor,
    block_table: Tensor,
    kv_lengths: tuple[int, ...],
    layer: Any,
    rope: Any,
    sinks: tuple[Tensor, Tensor] | None,
    *,
    block_size: int,
    blocks_per_tile: int,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[B, Hq, D] in ``dtype``; arguments as of the decode kernels, lengths on the host."""
    out = []
    for b, n in enumerate(kv_lengths):
        ids = block_table[b : b + 1, : -(-n // block_size)].long()
        keys, values = (x[0, :, :n].clone() for x in layer(ids))  # [H, n, D]
        if sinks is not None:
            for side, kept in zip((keys, values), sinks, strict=True):
                count = min(n, kept.shape[1])
                side[:, :count] = kept[b, :count].transpose(0, 1).to(side.dtype)
        keys, values = keys.to(dtype), values.to(dtype)
        if rope is not None:
            keys = _rotate(
                keys, *(table.to(dtype) for table in _angles(rope, n, block_size * blocks_per_tile))
            )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        H, _, D = keys.shape
        grouped = query[b].to(dtype).to(wide).view(H, -1, D)
        scores = grouped @ keys.to(wide).transpose(-1, -2) * softmax_scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if window is not None:
            scores[..., : max(0, n - window)] = -torch.inf
        weights = scores.softmax(-1).to(dtype)
        out.append((weights.to(wide) @ values.to(wide)).view(-1, D).to(dtype))
    return torch.stack(out)


def _angles(rope: Any, tokens: int, tile: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to tokens - 1, the model's scaling in them, fp64 [tokens, R/2] each."""
    position = torch.arange(tokens, device=rope.offset_cos.device)
    at, within = torch.div(position, tile, rounding_mode="floor"), position % tile
    offset_cos, offset_sin, base_cos, base_sin = (table.double() for table in rope)
    cos, sin = base_cos[at] * offset_cos[within], base_sin[at] * offset_cos[within]
    return cos - base_sin[at] * offset_sin[within], sin + base_cos[at] * offset_sin[within]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
