"""Decode attention: one query per sequence over stored blocks, a few blocks at a time, merged by log-sum-exp.

The blocks of all sequences form one list, whatever the sequences' lengths, and are taken in pieces small enough that
what is dequantized stays in the second-level cache and is never more than a few blocks, whatever the history. Every
block gives a result of its own, which is folded into the running one of its sequence (Milakov and Gimelshein 2018,
online softmax).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvquant.kernels import Rope
from kvquant.one_thread import one_thread
from kvquant.ragged import RaggedStep

# Numbers dequantized at once: 1 MiB in fp32 for keys and for values each.
_PIECE_ELEMENTS = 1 << 18
# On a GPU launches cost more than memory: 64 MiB each.
_PIECE_ELEMENTS_GPU = 1 << 24


class _Blocks(NamedTuple):
    """The visible blocks of all sequences of a call; the same for every layer."""

    sequence: Tensor  # [N] index into the batch
    column: Tensor  # [N] number of the block in its sequence
    last: Tensor  # [N] slot of the newest token, counted from the block's start; BS - 1 or more: all written
    owner: tuple[int, ...]  # the same as sequence, on the host; ascending
    has_edge: tuple[bool, ...]  # whether the block has slots beyond the newest token or before the window


class _State(NamedTuple):
    """Attention so far: the highest score, the sum of weights relative to it, the weighted values."""

    best: Tensor  # [B, Hq, 1]
    total: Tensor  # [B, Hq, 1]
    output: Tensor  # [B, Hq, D]


@functools.lru_cache(maxsize=8)
def _blocks(
    kv_lengths: tuple[int, ...], block_size: int, window: int | None, device: torch.device
) -> _Blocks:
    """List the blocks from host lengths; kept so that only the first layer pays."""
    found = []
    for s, length in enumerate(kv_lengths):
        first = 0 if window is None else max(0, length - window)
        for column in range(first // block_size, -(-length // block_size)):
            start = column * block_size
            found.append((s, column, length - 1 - start, start < first or start + block_size > length))
    table = torch.tensor([entry[:3] for entry in found]).to(device)
    owner, _, _, has_edge = zip(*found, strict=True)
    return _Blocks(table[:, 0], table[:, 1], table[:, 2], owner, has_edge)


@one_thread()
def attend_decode(
    query: Tensor,
    step: RaggedStep,
    read_tile: Callable[[Tensor], tuple[Tensor, Tensor]],
    rope: Rope | None,
    sinks: tuple[Tensor, Tensor] | None,
    *,
    block_size: int,
    blocks_per_tile: int,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one new token of each sequence over its stored history and itself.

    Args:
        query: rotated at their positions, [B, Hq, D].
        step, read_tile, rope, sinks, block_size, blocks_per_tile, softmax_scale, window, softcap: as of
            :func:`kvquant.kernels.tiled_attention.attend_tiled`.

    Returns:
        [B, Hq, D] in the query's dtype.
    """
    B, Hq, D = query.shape
    device = query.device
    blocks = _blocks(step.kv_lengths, block_size, window, device)
    queries = query.float() * softmax_scale
    ids = step.block_table[blocks.sequence, blocks.column].to(torch.int64)
    slot = torch.arange(block_size, device=device)

    def attend_piece(part: slice) -> tuple[_State, int]:
        """One result per block, [n, ...] in place of [B, ...], and the number of KV heads."""
        sequence, column = blocks.sequence[part], blocks.column[part]
        turned = queries[sequence]  # [n, Hq, D]
        if rope is not None:
            turned = _turn_to_block(turned, rope, column, block_size, blocks_per_tile)
        keys, values = read_tile(ids[part, None])  # [n, H, BS, D]
        n, H, _, _ = keys.shape
        if sinks is not None and bool((column * block_size < sinks[0].shape[1]).any()):
            _overlay_sinks(keys, values, sinks, sequence, column * block_size + slot[:, None])
        if rope is not None:
            keys = rotate(keys, rope.offset_cos[:block_size], rope.offset_sin[:block_size])
        scores = (turned.view(n, H, Hq // H, D) @ keys.transpose(-1, -2)).view(n, Hq, block_size)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        edges = [i for i, has_edge in enumerate(blocks.has_edge[part]) if has_edge]
        if edges:
            last = blocks.last[part][edges, None]
            hidden = slot > last
            if window is not None:
                hidden |= slot <= last - window
            # A weight of zero does not silence a NaN that a slot never committed, or given back, may hold.
            values[edges] = values[edges].masked_fill_(hidden[:, None, :, None], 0.0)
            scores[edges] = scores[edges].masked_fill_(hidden[:, None], -torch.inf)
        best = scores.amax(-1, keepdim=True)  # every block has a visible slot
        weights = scores.sub_(best).exp_()
        output = weights.view(n, H, Hq // H, block_size) @ values
        return _State(best, weights.sum(-1, keepdim=True), output.view(n, Hq, D)), H

    state = _State(
        torch.full((B, Hq, 1), -torch.inf, device=device),
        torch.zeros(B, Hq, 1, device=device),
        torch.zeros(B, Hq, D, device=device),
    )
    # There are at most as many key heads as query heads; the first piece tells how many.
    elements = _PIECE_ELEMENTS if device.type == "cpu" else _PIECE_ELEMENTS_GPU
    start, heads = 0, Hq
    while start < len(blocks.owner):
        at_once = max(1, elements // (heads * block_size * D))
        part = slice(start, min(start + at_once, len(blocks.owner)))
        first, last = blocks.owner[part.start], blocks.owner[part.stop - 1]
        mine = _State(*(tensor[first : last + 1] for tensor in state))
        found, heads = attend_piece(part)
        _fold(mine, blocks.sequence[part] - first, found)
        start = part.stop
    return (state.output / state.total).to(query.dtype)


def _fold(state: _State, sequence: Tensor, part: _State) -> None:
    """Fold partial results [n, ...] of sequences ``sequence`` [n] into a running one, in place."""
    index = sequence[:, None, None].expand_as(part.best)
    best = state.best.clone().scatter_reduce_(0, index, part.best, "amax")
    # Finite: every block has a visible slot, and every sequence of ``state`` a block in ``part``.
    old, new = torch.exp(state.best - best), torch.exp(part.best - best[sequence])
    state.total.mul_(old).index_add_(0, sequence, part.total * new)
    state.output.mul_(old).index_add_(0, sequence, part.output * new)
    state.best.copy_(best)


def _turn_to_block(
    queries: Tensor, rope: Rope, column: Tensor, block_size: int, blocks_per_tile: int
) -> Tensor:
    """Rotate queries [n, Hq, D] back by the first position of their blocks."""
    tile = torch.div(column, blocks_per_tile, rounding_mode="floor")
    queries = rotate(queries, rope.base_cos[tile, None], -rope.base_sin[tile, None])
    offset = (column - tile * blocks_per_tile) * block_size
    # The tables of offsets carry the model's attention scaling, which is the keys' to apply.
    scaling = rope.offset_cos[0, 0]
    return rotate(
        queries, (rope.offset_cos[offset] / scaling)[:, None], -(rope.offset_sin[offset] / scaling)[:, None]
    )


def _overlay_sinks(
    keys: Tensor, values: Tensor, sinks: tuple[Tensor, Tensor], sequence: Tensor, position: Tensor
) -> None:
    """Put the exact first tokens back into blocks [n, H, BS, D] whose slots stand at ``position`` [BS, n]."""
    count = sinks[0].shape[1]
    slot, block = (position < count).nonzero(as_tuple=True)
    for tile, kept in ((keys, sinks[0]), (values, sinks[1])):
        tile[block, :, slot] = kept[sequence[block], position[slot, block]].to(tile.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of [..., D] by half-split tables broadcast over [..., R/2] (Su et al. 2021)."""
    half = cos.shape[-1]
    if cos.dim() > 1 and x.stride(-2) == 1:
        cos, sin = (table.t().contiguous().t() for table in (cos, sin))  # channel-major like the tile
    first, second = x[..., :half], x[..., half : 2 * half]
    out = torch.empty_like(x)  # keeps the memory order of a channel-major tile, which cat would not
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
