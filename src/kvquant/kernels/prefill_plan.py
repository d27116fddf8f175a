"""How a call's attention over stored history is cut into segments that fit a workspace of bounded size.

A piece is a run of one sequence's keys. Every sequence has a last piece, which holds the call's own tokens and as much
of the history as there is room for, and is seen causally; what lies before comes in pieces that every query of the
sequence sees whole. Pieces of neighbouring sequences share a segment, one product of ragged batches. So a short
history takes a single product, and a long one takes memory that does not grow with it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvquant.ragged import cumulative_lengths


class Segment(NamedTuple):
    """Some queries and the keys they see at once; all tensors int32 on the device."""

    queries: slice  # tokens of the call
    cu_queries: Tensor  # [S + 1] offsets of the sequences in these queries
    cu_keys: Tensor  # [S + 1] and in the segment's keys; a sequence may have none
    max_queries: int
    max_keys: int
    num_keys: int
    is_last: bool  # whether the segment ends in the call's own tokens: seen causally, from the end
    blocks: Tensor  # [n, 4] (sequence, column of its block table, first row, slots that are read)
    own: Tensor  # [m, 3] (token of the call, row, position) of those that are read exactly
    sinks: Tensor  # [m, 3] (sequence * sink tokens + position, row, position)


class _Piece(NamedTuple):
    sequence: int
    start: int  # first key, a multiple of the block size
    end: int


@functools.lru_cache(maxsize=8)
def plan_prefill(
    past: tuple[int, ...],
    lengths: tuple[int, ...],
    *,
    block_size: int,
    workspace_tokens: int,
    own_exact: bool,
    window: int | None,
    sink_tokens: int,
    device: torch.device,
) -> tuple[Segment, ...]:
    """Cut a call into segments; kept so that only the first layer pays.

    Args:
        past: tokens stored before the call, per sequence.
        lengths: new tokens, per sequence.
        block_size: tokens of a block.
        workspace_tokens: keys of a segment at most, as far as the call's own tokens and the window leave a choice.
        own_exact: whether sequences with several new tokens read these as they came, not as stored.
        window: a query sees only keys less than this many positions back, or None.
        sink_tokens: leading tokens of each sequence that are kept apart.
        device: where the index tensors go.
    """
    ends = [p + n for p, n in zip(past, lengths, strict=True)]
    if window is not None and max(ends) <= window:
        window = None
    starts = [_last_start(p, sum(ends), sum(lengths), len(past), block_size, workspace_tokens) for p in past]
    if window is not None:
        # The first query of a sequence looks back furthest. All that is seen is one piece: windows are short.
        starts = [max(0, p + 1 - window) // block_size * block_size for p in past]
    history = [] if window is not None else _history(starts, block_size, workspace_tokens)
    last = _group(
        [_Piece(s, start, end) for s, (start, end) in enumerate(zip(starts, ends, strict=True))],
        workspace_tokens,
    )
    build = functools.partial(
        _segment,
        past=past,
        lengths=lengths,
        block_size=block_size,
        own_exact=own_exact,
        sink_tokens=sink_tokens,
        device=device,
    )
    return tuple(
        [build(pieces, is_last=False) for pieces in history]
        + [build(pieces, is_last=True) for pieces in last]
    )


def _last_start(past: int, all_keys: int, new: int, sequences: int, block_size: int, room: int) -> int:
    """Where a sequence's last piece begins: at its start if everything fits, else by an equal share of what is left."""
    if all_keys <= room:
        return 0
    share = max(0, room - new) // sequences
    return max(0, past - share) // block_size * block_size


def _history(starts: list[int], block_size: int, workspace_tokens: int) -> list[list[_Piece]]:
    """What lies before the last pieces, in segments filled one after the other."""
    size = max(block_size, workspace_tokens // block_size * block_size)
    segments: list[list[_Piece]] = []
    room = 0
    for s, end in enumerate(starts):
        begin = 0
        while begin < end:
            if room == 0:
                segments.append([])
                room = size
            stop = min(end, begin + room)
            segments[-1].append(_Piece(s, begin, stop))
            room -= stop - begin
            begin = stop
    return segments


def _group(pieces: list[_Piece], workspace_tokens: int) -> list[list[_Piece]]:
    """Neighbouring last pieces together while they fit."""
    segments: list[list[_Piece]] = []
    held = 0
    for piece in pieces:
        size = piece.end - piece.start
        if not segments or held + size > workspace_tokens:
            segments.append([])
            held = 0
        segments[-1].append(piece)
        held += size
    return segments


def _segment(
    pieces: list[_Piece],
    *,
    is_last: bool,
    past: tuple[int, ...],
    lengths: tuple[int, ...],
    block_size: int,
    own_exact: bool,
    sink_tokens: int,
    device: torch.device,
) -> Segment:
    """Say for every row of a segment's keys where it comes from."""
    first, last = pieces[0].sequence, pieces[-1].sequence
    token = cumulative_lengths(lengths)
    keys = [0] * (last - first + 1)
    blocks, own, sinks = [], [], []
    row = 0
    for s, start, end in pieces:
        keys[s - first] = end - start
        exact_from = past[s] if own_exact and lengths[s] > 1 else end
        for begin in range(start, min(end, exact_from), block_size):
            blocks.append(
                (s, begin // block_size, row + begin - start, min(block_size, min(end, exact_from) - begin))
            )
        if exact_from < end:
            count = torch.arange(end - exact_from, dtype=torch.int32)
            own.append(
                torch.stack([token[s] + count, row + exact_from - start + count, exact_from + count], 1)
            )
        sinks += [(s * sink_tokens + p, row + p - start, p) for p in range(start, min(end, sink_tokens))]
        row += end - start
    chosen = lengths[first : last + 1]

    def on_device(rows: Sequence[int | tuple[int, ...]], width: int | None = None) -> Tensor:
        flat = torch.tensor(rows, dtype=torch.int32)
        return (flat if width is None else flat.view(-1, width)).to(device, non_blocking=True)

    return Segment(
        queries=slice(token[first], token[last + 1]),
        cu_queries=on_device(cumulative_lengths(chosen)),
        cu_keys=on_device(cumulative_lengths(keys)),
        max_queries=max(chosen),
        max_keys=max(keys),
        num_keys=row,
        is_last=is_last,
        blocks=on_device(blocks, 4),
        own=torch.cat([torch.empty(0, 3, dtype=torch.int32), *own]).to(device, non_blocking=True),
        sinks=on_device(sinks, 3),
    )
