"""Decode attention: one query per sequence over stored blocks, a few blocks at a time, merged by log-sum-exp.

Work is cut into pieces: some sequences times some consecutive blocks, small enough that what is dequantized stays in
the second-level cache and is never more than a few blocks, whatever the history. Pieces are independent, so that each
worker thread takes a share of them with a running state of its own; the states are merged at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvquant.kernels import Rope
from kvquant.kernels.workers import map_rows
from kvquant.ragged import RaggedStep

# Numbers dequantized at once: 1 MiB in fp32 for keys and for values each.
_PIECE_ELEMENTS = 1 << 18


class _Piece(NamedTuple):
    """Consecutive blocks of some sequences, all inside one key tile."""

    tile: int  # number of the key tile
    first_block: int  # columns of the block table
    last_block: int
    sequences: Tensor | None  # [S] indices into the batch; None: all
    has_unwritten: bool  # whether some sequence ends inside
    has_passed: bool  # whether some sequence's window begins inside


@functools.lru_cache(maxsize=8)
def _pieces(
    kv_lengths: tuple[int, ...],
    block_size: int,
    blocks_per_tile: int,
    block_elements: int,
    window: int | None,
    device: torch.device,
) -> tuple[_Piece, ...]:
    """Cut a call into pieces from host lengths; kept so that only the first layer pays."""
    B = len(kv_lengths)
    at_once = max(1, min(B, _PIECE_ELEMENTS // block_elements))  # sequences
    width = max(1, min(blocks_per_tile, _PIECE_ELEMENTS // (block_elements * at_once)))  # blocks
    pieces = []
    for group in range(0, B, at_once):
        members = range(group, min(group + at_once, B))
        num_blocks = -(-max(kv_lengths[s] for s in members) // block_size)
        first = 0
        while first < num_blocks:
            tile = first // blocks_per_tile
            last = min(first + width, (tile + 1) * blocks_per_tile, num_blocks)
            low, high = first * block_size, last * block_size
            present = [
                s
                for s in members
                if kv_lengths[s] > low and (window is None or kv_lengths[s] - window < high)
            ]
            if present:
                piece = _Piece(
                    tile,
                    first,
                    last,
                    None if len(present) == B else torch.tensor(present).to(device),
                    min(kv_lengths[s] for s in present) < high,
                    window is not None and max(kv_lengths[s] for s in present) - window > low,
                )
                pieces.append(piece)
            first = last
    return tuple(pieces)


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
    # There are at most as many key heads as query heads.
    pieces = _pieces(step.kv_lengths, block_size, blocks_per_tile, Hq * block_size * D, window, device)
    queries = query.float() * softmax_scale
    length = torch.tensor(step.kv_lengths, device=device)
    table = step.block_table.to(torch.int64)

    def attend(run: slice) -> tuple[Tensor, Tensor, Tensor]:
        best = torch.full((B, Hq, 1), -torch.inf, device=device)
        total, output = torch.zeros_like(best), torch.zeros_like(queries)
        turned, turned_for = queries, None
        for piece in pieces[run]:
            if rope is not None and turned_for != piece.tile:
                turned, turned_for = (
                    rotate(queries, rope.base_cos[piece.tile], -rope.base_sin[piece.tile]),
                    piece.tile,
                )
            mine = slice(None) if piece.sequences is None else piece.sequences
            keys, values = read_tile(table[mine, piece.first_block : piece.last_block])
            start, (S, H, tokens, _) = piece.first_block * block_size, keys.shape
            if sinks is not None and start < sinks[0].shape[1]:
                overlay_sinks(keys, values, sinks, mine, start)
            if rope is not None:
                offset = start - piece.tile * blocks_per_tile * block_size
                keys = rotate(
                    keys, rope.offset_cos[offset : offset + tokens], rope.offset_sin[offset : offset + tokens]
                )
            grouped = turned[mine].view(S, H, Hq // H, D)
            scores = (grouped @ keys.transpose(-1, -2)).view(S, Hq, tokens)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if piece.has_unwritten or piece.has_passed:
                position = torch.arange(start, start + tokens, device=device)
                end = length[mine, None]
                hidden = position >= end
                if window is not None:
                    hidden |= position < end - window
                # A weight of zero does not silence a NaN that a slot never committed, or given back, may hold.
                values.masked_fill_(hidden[:, None, :, None], 0.0)
                scores.masked_fill_(hidden[:, None], -torch.inf)
            old = best[mine]
            new = torch.maximum(old, scores.amax(-1, keepdim=True))
            weights = scores.sub_(new).exp_()
            fade = torch.exp(old - new)
            best[mine] = new
            total[mine] = total[mine] * fade + weights.sum(-1, keepdim=True)
            product = weights.view(S, H, Hq // H, tokens) @ values
            output[mine] = output[mine] * fade + product.view(S, Hq, D)
        return best, total, output

    row_elements = step.block_table.numel() * block_size * Hq * D // len(pieces)
    runs = (
        map_rows(attend, len(pieces), row_elements)
        if device.type == "cpu"
        else [attend(slice(0, len(pieces)))]
    )
    _, total, output = runs[0]
    if len(runs) > 1:
        bests, totals, outputs = (torch.stack(parts) for parts in zip(*runs, strict=True))
        # A worker that saw nothing of a sequence has weight exp(-inf - best) = 0.
        fade = torch.exp(bests - bests.amax(0))
        total, output = (totals * fade).sum(0), (outputs * fade).sum(0)
    return (output / total).to(query.dtype)


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


def overlay_sinks(
    keys: Tensor, values: Tensor, sinks: tuple[Tensor, Tensor], sequences: Tensor | slice, start: int
) -> None:
    """Put the exact first tokens back into a tile that begins at position ``start``."""
    count = min(sinks[0].shape[1] - start, keys.shape[2])
    for tile, kept in ((keys, sinks[0]), (values, sinks[1])):
        tile[:, :, :count] = kept[sequences, start : start + count].transpose(1, 2).to(tile.dtype)
