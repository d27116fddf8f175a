"""Appending key outliers to the rows and spill chains of their (block, head)s."""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant.compiled import can_compile, raw
from kvquant.kernels import SPILL_ENTRIES, KeyStore


def append_key_outliers(
    found: Tensor,
    values: Tensor,
    store: KeyStore,
    slot_block: Tensor,
    slot_offset: Tensor,
    shape: tuple[int, int, int],
) -> bool:
    """Append a call's outliers to their (block, head) rows, into spill chunks past the base capacity.

    Nothing is sorted: the tokens of a block stand together and in order, so that an entry's rank within its (block,
    head) is a difference of running totals.

    Args:
        found: flat indices of the outliers in the call's keys, ascending, int64 [K].
        values: [K] in the stored dtype.
        store: the layer's keys in the pool, written in place.
        slot_block: block of each token, int64 [T].
        slot_offset: slot within the block, int64 [T].
        shape: (T, H, D) of the keys.

    Returns:
        False, with none of the entries counted, when spill chunks run out.
    """
    T, H, D = shape
    if can_compile(values):
        from kvquant.compiled.append_loops import append_outliers

        return append_outliers(
            raw(found),
            raw(values),
            D,
            raw(slot_block.contiguous()),
            raw(slot_offset.contiguous()),
            *(raw(tensor) for tensor in store[1:]),
        )
    row = _divided(found, D)  # token * H + head
    token = _divided(row, H)
    per_row = torch.bincount(row, minlength=T * H)
    up_to_row = per_row.cumsum(0)
    by_head = per_row.view(T, H).cumsum(0)
    earlier = by_head - per_row.view(T, H)  # of the call's earlier tokens, in each head
    opens = torch.ones_like(slot_block, dtype=torch.bool)
    opens[1:] = slot_block[1:] != slot_block[:-1]
    starts = opens.nonzero().view(-1)
    segment = opens.cumsum(0) - 1
    in_block = earlier - earlier[starts[segment]]
    rank = torch.arange(found.numel(), device=found.device) + (in_block.view(-1) + per_row - up_to_row)[row]

    group = slot_block[token] * H + row - token * H
    before = store.outlier_count.view(-1)[group].to(torch.int64)
    entry = before + rank
    index = (slot_offset[token] * D + found - row * D).to(torch.int16)
    base = store.outlier_index.shape[-1]
    in_base = entry < base
    spilled = (~in_base).nonzero().view(-1)
    if base:
        if spilled.numel():
            inside = in_base.nonzero().view(-1)
            place = group[inside] * base + entry[inside]
            store.outlier_index.view(-1)[place] = index[inside]
            store.outlier_value.view(-1)[place] = values[inside]
        else:
            place = group * base + entry
            store.outlier_index.view(-1)[place] = index
            store.outlier_value.view(-1)[place] = values
    if spilled.numel():
        # Chunks are handed out by (block, head), in every backend.
        spilled = spilled[torch.argsort(group[spilled], stable=True)]
        position, held = entry[spilled] - base, before[spilled] - base
        if not _append_spill(group[spilled], position, held, index[spilled], values[spilled], store):
            return False
    last = torch.cat([starts[1:], starts.new_tensor([T])]) - 1
    store.outlier_count[slot_block[starts]] += (by_head[last] - earlier[starts]).to(torch.int32)
    return True


def _divided(x: Tensor, n: int) -> Tensor:
    """Integers, none of them negative, by ``n``, rounded down; a shift where it can be, which is ten times faster."""
    if n & (n - 1) == 0:
        return x >> (n.bit_length() - 1)
    return torch.div(x, n, rounding_mode="floor")


def _append_spill(
    group: Tensor, position: Tensor, before: Tensor, index: Tensor, values: Tensor, store: KeyStore
) -> bool:
    """Write entries past the base capacity; returns False, with nothing written, when chunks run out.

    Args:
        group: (block, head) of every entry, ascending, int64 [K].
        position: position of the entry in its spill chain, int64 [K].
        before: entries the chain held before this call (negative: the base row still had room), int64 [K].
    """
    head, free, top = store.spill_head.view(-1), store.spill_free, store.spill_top
    ordinal, lane = torch.div(position, SPILL_ENTRIES, rounding_mode="floor"), position % SPILL_ENTRIES
    opens = lane == 0  # entries arrive in order, so the first lane of a chunk is always new
    num_new = int(opens.sum())
    if num_new > int(top):
        return False
    new_rank = torch.cumsum(opens, 0) - 1
    new_chunks = free[int(top) - num_new : int(top)].flip(0).to(torch.int64)
    top -= num_new

    tail = head[group].to(torch.int64)  # last chunk that a chain had before this call
    tail_ordinal = torch.div(before - 1, SPILL_ENTRIES, rounding_mode="floor")
    for level in range(int(tail_ordinal.max())):
        tail = torch.where(level < tail_ordinal, store.spill_next[tail].to(torch.int64), tail)

    opened_here = torch.cummax(
        torch.where(opens, torch.arange(group.numel(), device=group.device), -1), 0
    ).values
    same_group = (opened_here >= 0) & (group[opened_here.clamp(min=0)] == group)
    padded = torch.cat([new_chunks, new_chunks.new_zeros(1)])
    chunk = torch.where(same_group, padded[new_rank], tail)

    store.spill_index[chunk, lane] = index
    store.spill_value[chunk, lane] = values

    # Link each new chunk: from the head row if it is the chain's first, else from the chunk before it.
    starts = opens.nonzero().flatten()
    chain_first = ordinal[starts] == 0
    head[group[starts[chain_first]]] = new_chunks[chain_first].to(torch.int32)
    later = starts[~chain_first]
    if later.numel():
        previous_same = (later > 0) & (group[(later - 1).clamp(min=0)] == group[later])
        previous = torch.where(previous_same, chunk[(later - 1).clamp(min=0)], tail[later])
        store.spill_next[previous] = chunk[later].to(torch.int32)
    return True
