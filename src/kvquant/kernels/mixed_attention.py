"""Attention in which each query reads its last tokens exactly and older ones quantized.

A key that one query of a call sees exactly another, later one sees quantized, so a tile has two faces and every query
chooses per key. Plain PyTorch on any device, one sequence after the other: for methods whose quality is in question,
not their speed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvquant.kernels import RecentStore, Rope
from kvquant.ragged import RaggedStep, cumulative_lengths

_QUERY_CHUNK = 256


def attend_mixed(
    query: Tensor,
    step: RaggedStep,
    read_tile: Callable[[Tensor], tuple[Tensor, Tensor]],
    rope: Rope | None,
    own: tuple[Tensor, Tensor],
    sinks: tuple[Tensor, Tensor] | None,
    recent: RecentStore | None,
    recent_start: tuple[Tensor, Tensor],
    *,
    key_noise: Tensor | None,
    own_exact: bool,
    block_size: int,
    blocks_per_tile: int,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention; arguments as of :func:`kvquant.kernels.tiled_attention.attend_tiled` but for those below.

    Args:
        step: layout of the call; its tokens are quantized already, and not yet among the recent ones.
        own: this call's own keys and values, [T, H, D] each.
        recent: exact last tokens that earlier calls left, or None.
        recent_start: first position that each query reads exactly, of keys and of values, int64 [T] each.
        key_noise: variance of quantized keys, [H, D]: half of what it adds to a logit is subtracted; or None.
        own_exact: whether tokens of prompts, several new ones in a sequence, are exact for every query of the call
            (``prefill_reads=exact``).

    Returns:
        [T, Hq, D] in the query's dtype.
    """
    T, Hq, D = query.shape
    H = own[0].shape[1]
    tile = block_size * blocks_per_tile
    starts = cumulative_lengths(step.lengths)
    bias = (
        query.new_zeros(T, Hq) if key_noise is None else _half_variance(query, key_noise, rope, softmax_scale)
    )
    out = torch.empty_like(query)
    for b, (past, length) in enumerate(zip(step.past, step.lengths, strict=True)):
        tokens = slice(starts[b], starts[b + 1])
        first_exact = [start[tokens] for start in recent_start]
        if own_exact and length > 1:
            first_exact = [start.clamp(max=past) for start in first_exact]
        q = (query[tokens].float() * softmax_scale).view(length, H, Hq // H, D)
        at = step.positions[tokens]
        best = torch.full((H, Hq // H, length, 1), -torch.inf, device=query.device)
        total, result = torch.zeros_like(best), torch.zeros(H, Hq // H, length, D, device=query.device)
        begin = 0 if window is None else max(0, past - window + 1) // tile
        for k in range(begin, -(-(past + length) // tile)):
            ids = step.block_table[b : b + 1, k * blocks_per_tile : (k + 1) * blocks_per_tile].to(torch.int64)
            stored = [x[0] for x in read_tile(ids)]  # [H, KT, D]
            position = torch.arange(k * tile, k * tile + stored[0].shape[1], device=query.device)
            written = position < past + length
            stored[1] = stored[1].masked_fill(~written[:, None], 0.0)
            exact, available, is_sink = _exact_face(
                stored, position, b, past, length, tokens, own, sinks, recent, step
            )
            turned = q
            if rope is not None:
                n = len(position)
                stored[0] = _turned(stored[0], rope.offset_cos[:n], rope.offset_sin[:n])
                exact[0] = _turned(exact[0], rope.offset_cos[:n], rope.offset_sin[:n])
                turned = _turned(q, rope.base_cos[k], -rope.base_sin[k])
            for first in range(0, length, _QUERY_CHUNK):
                rows = slice(first, min(first + _QUERY_CHUNK, length))
                if k * tile >= past + rows.stop:
                    continue  # every key lies behind every query
                here = at[rows, None]  # [Q, 1]
                visible = (position <= here) & written
                if window is not None:
                    visible &= position > here - window
                choose = [available & (is_sink | (position >= start[rows, None])) for start in first_exact]
                x = turned[rows].permute(1, 2, 0, 3)  # [H, G, Q, D]
                shift = bias[tokens][rows].view(-1, H, Hq // H).permute(1, 2, 0)[..., None]
                scores = x @ stored[0][:, None].transpose(-1, -2) - shift
                # Most tiles lie before every query's window: they have one face.
                has_exact = [bool(c.any()) for c in choose]
                if has_exact[0]:
                    scores = torch.where(choose[0], x @ exact[0][:, None].transpose(-1, -2), scores)
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                scores = scores.masked_fill(~visible, -torch.inf)
                new = torch.maximum(best[:, :, rows], scores.amax(-1, keepdim=True))
                safe = new.masked_fill(new == -torch.inf, 0.0)
                weights = torch.exp(scores - safe)
                fade = torch.exp(best[:, :, rows] - safe)
                best[:, :, rows] = new
                total[:, :, rows] = total[:, :, rows] * fade + weights.sum(-1, keepdim=True)
                product = weights @ stored[1][:, None]
                if has_exact[1]:
                    product += (weights * choose[1]) @ (exact[1] - stored[1])[:, None]
                result[:, :, rows] = result[:, :, rows] * fade + product
        out[tokens] = (result / total).permute(2, 0, 1, 3).reshape(length, Hq, D).to(query.dtype)
    return out


def _exact_face(
    stored: list[Tensor],
    position: Tensor,
    b: int,
    past: int,
    length: int,
    tokens: slice,
    own: tuple[Tensor, Tensor],
    sinks: tuple[Tensor, Tensor] | None,
    recent: RecentStore | None,
    step: RaggedStep,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The exact keys and values of a tile [H, KT, D], which of them exist, and which are sinks (bool [KT])."""
    faces = [x.clone() for x in stored]
    is_own = (position >= past) & (position < past + length)
    available = is_own.clone()
    is_sink = torch.zeros_like(available)
    own_index = (position - past).clamp(0, length - 1)
    for face, new in zip(faces, own, strict=True):
        chosen = new[tokens][own_index].transpose(0, 1).to(face.dtype)
        torch.where(is_own[:, None], chosen, face, out=face)
    if recent is not None:
        row, place = step.rows[b], position % recent.position.shape[1]
        # After a crop a place may hold a token that is gone, where an older one is asked for: a tag tells.
        held = (recent.position[row, place] == position) & (position < past)
        for face, kept in zip(faces, (recent.keys, recent.values), strict=True):
            torch.where(held[:, None], kept[row, place].transpose(0, 1).to(face.dtype), face, out=face)
        available |= held
    if sinks is not None and int(position[0]) < sinks[0].shape[1]:
        count = min(sinks[0].shape[1] - int(position[0]), len(position))
        first = int(position[0])
        for face, kept in zip(faces, sinks, strict=True):
            face[:, :count] = kept[b, first : first + count].transpose(0, 1).to(face.dtype)
        is_sink[:count] = True
        available |= is_sink
    return faces, available, is_sink


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of [..., D] by half-split tables broadcast over [..., R/2] (Su et al. 2021)."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _half_variance(query: Tensor, key_noise: Tensor, rope: Rope | None, softmax_scale: float) -> Tensor:
    """Half the variance of a query's logits under independent noise of the key channels, [T, Hq].

    E[exp(q.(k + d))] = exp(q.k) exp(var / 2): noise alone makes a key weigh more. A rotation mixes the noise of a
    pair of channels, so that both count with their mean.
    """
    T, Hq, D = query.shape
    H = key_noise.shape[0]
    noise = key_noise.clone()
    if rope is not None:
        half = rope.offset_cos.shape[-1]
        mean = (noise[:, :half] + noise[:, half : 2 * half]) / 2
        noise[:, :half] = noise[:, half : 2 * half] = mean
    squared = (query.float() * softmax_scale).square().view(T, H, Hq // H, D)
    return 0.5 * torch.einsum("thgd,hd->thg", squared, noise).reshape(T, Hq)
