"""Appending key outliers to the rows and spill chains of their (block, head)s."""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant.kernels import SPILL_ENTRIES, KeyStore


def append_key_outliers(group: Tensor, index: Tensor, values: Tensor, store: KeyStore) -> bool:
    """Append entries to their (block, head) rows, into spill chunks past the base capacity.

    Returns False, with none of the spilled entries counted, when spill chunks run out.

    Args:
        group: block * H + head of every entry, int64 [K].
        index: slot * D + channel, int64 [K].
        values: [K] in the stored dtype.
    """
    order = torch.argsort(group, stable=True)
    group, index, values = group[order], index[order].to(torch.int16), values[order]
    arange = torch.arange(group.numel(), device=group.device)
    is_first = torch.ones_like(group, dtype=torch.bool)
    is_first[1:] = group[1:] != group[:-1]
    rank = arange - torch.cummax(torch.where(is_first, arange, 0), 0).values
    count = store.outlier_count.view(-1)
    before = count[group].to(torch.int64)
    entry = before + rank

    base = store.outlier_index.shape[-1]
    in_base = entry < base
    if base:
        row = group[in_base] * base + entry[in_base]
        store.outlier_index.view(-1)[row] = index[in_base]
        store.outlier_value.view(-1)[row] = values[in_base]
    spilled = ~in_base
    stored, fits = torch.ones_like(in_base), True
    if bool(spilled.any()):
        fits = _append_spill(
            group[spilled],
            (entry - base)[spilled],
            (before - base)[spilled],
            index[spilled],
            values[spilled],
            store,
        )
        if not fits:
            stored = in_base
    count.index_add_(0, group, stored.to(count.dtype))
    return fits


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
