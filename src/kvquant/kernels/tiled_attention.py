"""Attention of a ragged batch over stored blocks, tile by tile, merged by log-sum-exp.

Work items are tiles of queries of one sequence; all items advance over the keys together, one key tile per step, so
the loop runs over tiles of the longest history and never over tokens or sequences, and no more than one tile of the
history is ever dequantized.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvquant.kernels import Rope
from kvquant.kernels.compiled_decode import attend_decode_compiled, decodes_compiled
from kvquant.kernels.decode_attention import attend_decode, rotate
from kvquant.ragged import RaggedStep, cumulative_lengths

QUERY_TILE = 128
# Score elements of one batched product, 64 MiB in fp32: bounds the peak whatever the batch.
_MAX_SCORES = 1 << 24


class _Step(NamedTuple):
    """One key tile: which sequences hold it and which items look at it."""

    sequences: Tensor  # [S] indices into the batch
    items: Tensor  # [I] indices of work items
    item_sequence: Tensor  # [I] index into ``sequences``
    has_unwritten: bool  # whether some sequence ends inside the tile
    has_passed: bool  # whether some sequence's window begins inside the tile
    is_own: bool  # whether all that is written in the tile belongs to prompts of this call


class _Schedule(NamedTuple):
    """All index tensors of one forward call; the same for every layer."""

    rows: Tensor  # [I, QT] token of each query of an item, clamped
    valid: Tensor  # [I, QT] whether that query exists
    position: Tensor  # [I, QT] its position in its sequence
    kv_lengths: Tensor  # [B]
    past: Tensor  # [B]
    first_token: Tensor  # [B] index of each sequence's first new token
    steps: tuple[tuple[int, _Step], ...]  # (key tile, step)


@functools.lru_cache(maxsize=8)
def _schedule(
    lengths: tuple[int, ...], past: tuple[int, ...], tile: int, window: int | None, device: torch.device
) -> _Schedule:
    """Plan the products of one call from host lengths; kept so that only the first layer pays."""
    query_tile = min(QUERY_TILE, max(lengths))
    starts = cumulative_lengths(lengths)
    items = [(s, i) for s, n in enumerate(lengths) for i in range(0, n, query_tile)]
    sequence = torch.tensor([s for s, _ in items])
    offset = torch.tensor([i for _, i in items])[:, None] + torch.arange(query_tile)
    length_t, past_t, start_t = (torch.tensor(x) for x in (lengths, past, starts[:-1]))
    valid = offset < length_t[sequence][:, None]
    clamped = torch.minimum(offset, length_t[sequence][:, None] - 1)
    position = clamped + past_t[sequence][:, None]
    first_position, last_position = position.amin(1).tolist(), position.amax(1).tolist()

    steps = []
    for k in range(-(-max(p + n for p, n in zip(past, lengths, strict=True)) // tile)):
        lo, hi = k * tile, (k + 1) * tile - 1
        active = [
            i
            for i in range(len(items))
            if last_position[i] >= lo and (window is None or first_position[i] - window < hi)
        ]
        if not active:
            continue
        present = sorted({items[i][0] for i in active})
        where = {s: j for j, s in enumerate(present)}
        step = _Step(
            torch.tensor(present).to(device),
            torch.tensor(active).to(device),
            torch.tensor([where[items[i][0]] for i in active]).to(device),
            min(past[s] + lengths[s] for s in present) <= hi,
            window is not None and max(past[s] for s in present) - window >= lo,
            max(past[s] for s in present) <= lo and min(lengths[s] for s in present) > 1,
        )
        steps.append((k, step))
    return _Schedule(
        rows=(start_t[sequence][:, None] + clamped).to(device),
        valid=valid.to(device),
        position=position.to(device),
        kv_lengths=(length_t + past_t).to(device),
        past=past_t.to(device),
        first_token=start_t.to(device),
        steps=tuple(steps),
    )


def attend_tiled(
    query: Tensor,
    step: RaggedStep,
    read_tile: Callable[[Tensor], tuple[Tensor, Tensor]],
    rope: Rope | None,
    exact: tuple[Tensor, Tensor] | None,
    sinks: tuple[Tensor, Tensor] | None,
    *,
    block_size: int,
    blocks_per_tile: int,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of new queries over the stored history and the chunk itself.

    Args:
        query: rotated at their positions, [T, Hq, D].
        step: layout of the call; the chunk's own keys and values are stored already.
        read_tile: (block ids [S, P]) -> (pre-RoPE keys, values), fp32 [S, H, P*BS, D] each.
        rope: tables for tiles of ``blocks_per_tile * block_size`` tokens, or None if keys are not rotated.
        exact: this call's own keys and values, [T, H, D] each, to be read in place of their stored form
            (``prefill_reads=exact``), or None.
        sinks: exact keys and values of the first tokens of each sequence of the batch, [B, sink_tokens, H, D]
            each, or None.
        block_size: tokens in a block.
        blocks_per_tile: blocks dequantized at once for each sequence.
        softmax_scale: factor of the scores.
        window: a query sees only keys less than this many positions back, or None.
        softcap: scores become softcap * tanh(score / softcap), or None.

    Returns:
        [T, Hq, D] in the query's dtype. Source of the merge: Milakov and Gimelshein 2018, online softmax.
    """
    _, Hq, D = query.shape
    if exact is None and max(step.lengths) == 1:
        settings: dict[str, Any] = {
            "block_size": block_size,
            "blocks_per_tile": blocks_per_tile,
            "softmax_scale": softmax_scale,
            "window": window,
            "softcap": softcap,
        }
        if decodes_compiled(read_tile, query):
            return attend_decode_compiled(query, step, read_tile, rope, sinks, **settings)
        return attend_decode(query, step, read_tile, rope, sinks, **settings)
    tile = block_size * blocks_per_tile
    plan = _schedule(step.lengths, step.past, tile, window, query.device)
    num_items, query_tile = plan.rows.shape
    queries = query.float()[plan.rows] * softmax_scale  # [I, QT, Hq, D]
    state: tuple[Tensor, Tensor, Tensor] | None = None
    for k, active in plan.steps:
        table = step.block_table[active.sequences, k * blocks_per_tile : (k + 1) * blocks_per_tile]
        position = torch.arange(k * tile, k * tile + table.shape[1] * block_size, device=query.device)
        if exact is not None and active.is_own:
            # Nothing that is stored would be seen: it is not even dequantized.
            token, _ = _own_tokens(plan, active.sequences, position)
            keys, values = (new[token].transpose(1, 2).contiguous().float() for new in exact)
        else:
            keys, values = read_tile(table.to(torch.int64))
            if sinks is not None and k * tile < sinks[0].shape[1]:
                _overlay_sinks(keys, values, sinks, active.sequences, k * tile)
            if exact is not None:
                _overlay_exact(keys, values, exact, plan, active.sequences, position)
        _, H, tokens, _ = keys.shape
        if active.has_unwritten:
            # A weight of zero does not silence a NaN that a failed call left in a slot never committed.
            unwritten = position >= plan.kv_lengths[active.sequences][:, None]  # [S, KT]
            values.masked_fill_(unwritten[:, None, :, None], 0.0)
        if window is not None and active.has_passed:
            # Nor one that stands in for a block which the window has passed and which was given back.
            passed = position <= plan.past[active.sequences][:, None] - window  # [S, KT]
            values.masked_fill_(passed[:, None, :, None], 0.0)
        turned = queries
        if rope is not None:
            keys = rotate(keys, rope.offset_cos[:tokens], rope.offset_sin[:tokens])
            turned = rotate(queries, rope.base_cos[k], -rope.base_sin[k])
        if state is None:
            state = (
                torch.full((num_items, Hq, query_tile, 1), -torch.inf, device=query.device),
                torch.zeros(num_items, Hq, query_tile, 1, device=query.device),
                torch.zeros(num_items, Hq, query_tile, D, device=query.device),
            )
        budget = max(1, _MAX_SCORES // (Hq * query_tile * tokens))
        for items, owner in zip(active.items.split(budget), active.item_sequence.split(budget), strict=True):
            grouped = turned[items].view(-1, query_tile, H, Hq // H, D).permute(0, 2, 3, 1, 4)
            scores = grouped.reshape(len(items), H, -1, D) @ keys[owner].transpose(-1, -2)
            scores = scores.view(len(items), Hq, query_tile, tokens)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            at = plan.position[items][:, :, None]  # [I, QT, 1]
            visible = position <= at
            if window is not None:
                visible &= position > at - window
            scores.masked_fill_(~visible[:, None], -torch.inf)
            _merge(state, items, scores, values[owner], H)
    assert state is not None  # every sequence has at least one token
    out = (state[2] / state[1]).permute(0, 2, 1, 3)  # [I, QT, Hq, D]
    result = torch.empty_like(query)
    result[plan.rows[plan.valid]] = out[plan.valid].to(query.dtype)
    return result


def _merge(
    state: tuple[Tensor, Tensor, Tensor], items: Tensor, scores: Tensor, values: Tensor, H: int
) -> None:
    """Fold one tile of scores [I, Hq, QT, KT] and values [I, H, KT, D] into the running (max, sum, output)."""
    best, total, output = state
    num_items, Hq, QT, KT = scores.shape
    old = best[items]
    new = torch.maximum(old, scores.amax(-1, keepdim=True))
    # A query that has seen no key yet (a window that starts later) keeps -inf: shift by 0 there, not by -inf.
    shift = new.masked_fill(new == -torch.inf, 0.0)
    weights = scores.sub_(shift).exp_()
    fade = torch.exp(old - shift)
    best[items] = new
    total[items] = total[items] * fade + weights.sum(-1, keepdim=True)
    product = weights.view(num_items, H, -1, KT) @ values
    output[items] = output[items] * fade + product.view(num_items, Hq, QT, -1)


def _overlay_sinks(
    keys: Tensor, values: Tensor, sinks: tuple[Tensor, Tensor], sequences: Tensor, start: int
) -> None:
    """Put the exact first tokens back into a tile that begins at position ``start``."""
    count = min(sinks[0].shape[1] - start, keys.shape[2])
    for tile, kept in ((keys, sinks[0]), (values, sinks[1])):
        tile[:, :, :count] = kept[sequences, start : start + count].transpose(1, 2).to(tile.dtype)


def _overlay_exact(
    keys: Tensor,
    values: Tensor,
    exact: tuple[Tensor, Tensor],
    plan: _Schedule,
    sequences: Tensor,
    position: Tensor,
) -> None:
    """Replace the tokens of prompts in a tile by the exact keys and values they came from.

    A sequence with one new token decodes, whatever the others of the call do: it reads its own token as stored.
    """
    token, own = _own_tokens(plan, sequences, position)
    for tile, new in ((keys, exact[0]), (values, exact[1])):
        chosen = new[token].transpose(1, 2).to(tile.dtype)  # [S, H, KT, D]
        torch.where(own[:, None, :, None], chosen, tile, out=tile)


def _own_tokens(plan: _Schedule, sequences: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the call's tokens stands at each position [KT] of some sequences, and whether one does; [S, KT] each."""
    past = plan.past[sequences][:, None]
    end = plan.kv_lengths[sequences][:, None]
    own = (position >= past) & (position < end) & (end - past > 1)
    return torch.where(own, plan.first_token[sequences][:, None] + position - past, 0), own
