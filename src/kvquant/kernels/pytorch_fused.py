"""The CPU default: every operation vectorised over sequences, heads and tokens in plain PyTorch.

Counts of outliers are data, so this backend reads a few integers back from tensors (``nonzero`` and the chunk chain's
depth). That is free on a CPU; on a GPU the triton backend exists so that nothing waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant import nuq
from kvquant.kernels import (
    ERROR_KEY_NOT_FINITE,
    ERROR_OUT_OF_SPILL,
    ERROR_VALUE_NOT_FINITE,
    SPILL_ENTRIES,
    ExactStore,
    KeyStore,
    LayerConstants,
    ValueStore,
)
from kvquant.kernels.tiled_attention import attend_tiled
from kvquant.packing import pack, unpack

# Elements worked on at once when encoding: 1 MiB of fp32 stays in the second-level cache through all compares.
_ENCODE_ELEMENTS = 1 << 18


def write_exact(x: Tensor, store: ExactStore, slot_block: Tensor, slot_offset: Tensor) -> None:
    """Store keys or values as they are.

    Args:
        x: [T, H, D] in the store's dtype.
        store: the layer's side of the pool.
        slot_block: block of each token, int64 [T].
        slot_offset: slot within the block, int64 [T].
    """
    store.data[slot_block, :, slot_offset] = x.to(store.data.dtype)


def write_keys(
    keys: Tensor,
    store: KeyStore,
    constants: LayerConstants,
    slot_block: Tensor,
    slot_offset: Tensor,
    skip: Tensor | None,
    error: Tensor,
    *,
    bits: int,
) -> None:
    """Quantize, pack and store keys, and append their outliers (design: static thresholds per channel).

    Args:
        keys: pre-RoPE keys, [T, H, D]; tokens of a (block, head) in rising slot order.
        store: the layer's keys in the pool, written in place.
        constants: thresholds and midpoints of the layer.
        slot_block: block of each token, int64 [T].
        slot_offset: slot within the block, int64 [T].
        skip: sink tokens, stored elsewhere, bool [T], or None.
        error: the pool's error word, int64 [2]; set on NaN, infinity or exhausted spill chunks.
        bits: width of a code.
    """
    T, H, D = keys.shape
    rows_per_chunk = max(1, _ENCODE_ELEMENTS // (H * D))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, T, rows_per_chunk):
        rows = slice(first, first + rows_per_chunk)
        x = keys[rows].float()
        codes = nuq.encode(x, constants.key_zero, constants.key_scale, constants.key_midpoints)
        outlier = (x < constants.key_lower) | (x > constants.key_upper)
        exempt = outlier
        if skip is not None:
            outlier = outlier & ~skip[rows, None, None]
            exempt = outlier | skip[rows, None, None]
        codes.masked_fill_(exempt, 0)
        store.codes[slot_block[rows], :, slot_offset[rows]] = pack(codes, bits)
        # One pass that a NaN or an infinity always survives, in place of a mask over every element.
        _flag_not_finite(x.sum(dim=0).flatten(), ERROR_KEY_NOT_FINITE, error)
        token, head, channel = outlier.nonzero(as_tuple=True)
        if token.numel():
            found.append(((token + first) * H + head, channel, x[token, head, channel]))
    if found:
        row, channel, kept = (torch.cat(parts) for parts in zip(*found, strict=True))
        token, head = torch.div(row, H, rounding_mode="floor"), row % H
        kept = kept.to(store.outlier_value.dtype)
        _flag_overflow(kept, head * D + channel, ERROR_KEY_NOT_FINITE, error)
        _append_key_outliers(
            slot_block[token] * H + head, slot_offset[token] * D + channel, kept, store, error
        )


def _append_key_outliers(
    group: Tensor, index: Tensor, values: Tensor, store: KeyStore, error: Tensor
) -> None:
    """Append entries to their (block, head) rows, into spill chunks past the base capacity.

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
    stored = torch.ones_like(in_base)
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
            _set_error(error, ERROR_OUT_OF_SPILL, 0)
            stored = in_base
    count.index_add_(0, group, stored.to(count.dtype))


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


def write_values(
    values: Tensor,
    store: ValueStore,
    constants: LayerConstants,
    slot_block: Tensor,
    slot_offset: Tensor,
    skip: Tensor | None,
    error: Tensor,
    *,
    bits: int,
) -> None:
    """Quantize, pack and store values with each token's own range and its 2n outliers per group.

    Args:
        values: [T, H, D].
        store: the layer's values in the pool, written in place.
        constants: midpoints of the layer's codebook.
        slot_block: block of each token, int64 [T].
        slot_offset: slot within the block, int64 [T].
        skip: sink tokens, stored elsewhere, bool [T], or None.
        error: the pool's error word, int64 [2].
        bits: width of a code.
    """
    T, H, D = values.shape
    C, VG = H * D, store.zero.shape[-1]
    group, side = C // VG, store.zero.dtype
    per_end = store.outlier_index.shape[-1] // VG // 2
    group_base = torch.arange(VG, device=values.device, dtype=torch.int32).view(1, VG, 1) * group
    rows_per_chunk = max(1, _ENCODE_ELEMENTS // C)
    for first in range(0, T, rows_per_chunk):
        rows = slice(first, first + rows_per_chunk)
        x = values[rows].float().reshape(-1, group)  # [T*VG, Cg]
        _flag_not_finite(x.view(-1, C).sum(dim=0), ERROR_VALUE_NOT_FINITE, error)
        index, lowest, highest = nuq.split_value_outliers(x, per_end)
        zero, scale = nuq.zero_and_scale(lowest, highest)
        zero, scale = zero.to(side), scale.to(side)
        codes = nuq.encode(x, zero.float()[:, None], scale.float()[:, None], constants.value_midpoints)
        codes.scatter_(1, index.long(), 0)
        codes = codes.view(-1, H, D)
        if skip is not None:
            codes.masked_fill_(skip[rows, None, None], 0)
        block, slot = slot_block[rows], slot_offset[rows]
        store.codes[block, :, slot] = pack(codes, bits)
        store.zero[block, slot] = zero.view(-1, VG)
        store.scale[block, slot] = scale.view(-1, VG)
        # What a sink token leaves here is never read, whether it fits or not.
        exempt = None if skip is None else skip[rows].repeat_interleave(VG)
        if per_end:
            kept = x.gather(1, index.long()).to(side)
            channel = index.view(-1, VG, 2 * per_end) + group_base
            store.outlier_index[block, slot] = channel.reshape(-1, VG * 2 * per_end).to(torch.int16)
            store.outlier_value[block, slot] = kept.view(-1, VG * 2 * per_end)
            checked = kept if exempt is None else kept.masked_fill(exempt[:, None], 0)
            _flag_overflow(checked.flatten(), channel.flatten(), ERROR_VALUE_NOT_FINITE, error)
        else:
            _flag_range_overflow(x, zero, scale, exempt, error, VG)


def read_exact(store: ExactStore, block_ids: Tensor) -> Tensor:
    """Return stored tiles in fp32, [S, H, P*BS, D], of the blocks ``block_ids`` [S, P]."""
    S, P = block_ids.shape
    _, H, BS, D = store.data.shape
    return store.data[block_ids].permute(0, 2, 1, 3, 4).reshape(S, H, P * BS, D).float()


def read_keys(
    store: KeyStore, constants: LayerConstants, block_ids: Tensor, *, bits: int, head_dim: int
) -> Tensor:
    """Dequantize blocks of keys to tiles, outliers restored exactly.

    Args:
        store: the layer's keys in the pool.
        constants: codebook, zero and scale of the layer.
        block_ids: P consecutive blocks for each of S sequences, int64 [S, P].
        bits: width of a code.
        head_dim: D.

    Returns:
        pre-RoPE keys, fp32 [S, H, P*BS, D]. Slots never written hold arbitrary finite numbers.
    """
    S, P = block_ids.shape
    _, H, BS, _ = store.codes.shape
    flat, tile = _channel_major_tile(S, H, P * BS, head_dim, store.codes.device)
    _lookup(store.codes, constants.key_centroids, block_ids, bits, tile)
    tile.mul_(constants.key_scale[:, :, None]).add_(constants.key_zero[:, :, None])

    sequence = torch.arange(S, device=block_ids.device).view(S, 1, 1)
    head = torch.arange(H, device=block_ids.device)
    block = torch.arange(P, device=block_ids.device).view(1, P, 1)
    origin = (sequence * H + head) * (head_dim * P * BS) + block * BS  # [S, P, H] of slot 0, channel 0

    def restore(index: Tensor, values: Tensor, count: Tensor) -> None:
        """Put entries [S, P, H, K] back; those past ``count`` [S, P, H] are absent and land behind the tile."""
        present = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        index = index.to(torch.int64).bitwise_and_(0xFFFF)
        slot = torch.div(index, head_dim, rounding_mode="floor")
        where = origin[..., None] + (index - slot * head_dim) * (P * BS) + slot
        flat[torch.where(present, where, flat.numel() - 1)] = values.float()

    count = store.outlier_count[block_ids]  # [S, P, H]
    base = store.outlier_index.shape[-1]
    if base:
        restore(store.outlier_index[block_ids], store.outlier_value[block_ids], count)
    left = count - base
    chunk = store.spill_head[block_ids].to(torch.int64)
    for _ in range(-(-int(left.max()) // SPILL_ENTRIES)):
        # Groups whose chain has ended have nothing left: their (stale) chunk is read and thrown away.
        restore(store.spill_index[chunk], store.spill_value[chunk], left)
        left = left - SPILL_ENTRIES
        chunk = store.spill_next[chunk].to(torch.int64)
    return tile.transpose(-1, -2)


def read_values(
    store: ValueStore, constants: LayerConstants, block_ids: Tensor, *, bits: int, head_dim: int
) -> Tensor:
    """Dequantize blocks of values to tiles, outliers restored exactly; shapes as in :func:`read_keys`."""
    S, P = block_ids.shape
    _, H, BS, _ = store.codes.shape
    VG, tokens = store.zero.shape[-1], P * BS
    flat, tile = _channel_major_tile(S, H, tokens, head_dim, store.codes.device)
    _lookup(store.codes, constants.value_centroids, block_ids, bits, tile)
    # Groups are runs of channels of the layer, which is how a channel-major tile lies in memory.
    by_group = tile.view(S, VG, -1, tokens)
    by_group.mul_(store.scale[block_ids].float().view(S, tokens, VG).transpose(1, 2)[:, :, None])
    by_group.add_(store.zero[block_ids].float().view(S, tokens, VG).transpose(1, 2)[:, :, None])
    if store.outlier_index.shape[-1]:
        channel = store.outlier_index[block_ids].to(torch.int64).bitwise_and_(0xFFFF).view(S, tokens, -1)
        token = torch.arange(tokens, device=block_ids.device).view(1, -1, 1)
        sequence = torch.arange(S, device=block_ids.device).view(-1, 1, 1)
        where = (sequence * (H * head_dim) + channel) * tokens + token
        flat[where] = store.outlier_value[block_ids].float().view_as(where)
    return tile.transpose(-1, -2)


def _channel_major_tile(S: int, H: int, tokens: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A tile [S, H, D, tokens] and its flat form, which has one element more: absent entries are written there.

    Channels lie outermost because heads are narrow and tiles long: every operation then runs over whole tokens.
    """
    size = S * H * tokens * D
    flat = torch.empty(size + 1, device=device)
    return flat, flat[:size].view(S, H, D, tokens)


def _lookup(codes: Tensor, centroids: Tensor, block_ids: Tensor, bits: int, out: Tensor) -> None:
    """Gather blocks of codes, channel-major, and replace each code by its centroid in ``out`` [S, H, D, tokens]."""
    S, H, D, tokens = out.shape
    # Turned while still packed: a fraction of the bytes that turning the numbers would move.
    rows = codes[block_ids].permute(0, 2, 4, 1, 3).reshape(S, H, codes.shape[-1], tokens)
    unpacked = unpack(rows.transpose(-1, -2), bits, D).transpose(-1, -2)
    # A one-dimensional index_select with 32-bit indices was 5x faster than indexing on CPUs.
    torch.index_select(centroids, 0, unpacked.reshape(-1).to(torch.int32), out=out.view(-1))


def _flag_not_finite(per_channel: Tensor, kind: int, error: Tensor) -> None:
    bad = ~torch.isfinite(per_channel)
    channel = bad.to(torch.uint8).argmax()
    _set_error_if(error, bad.any(), kind, channel)


def _flag_overflow(stored: Tensor, channel: Tensor, kind: int, error: Tensor) -> None:
    """An outlier that was finite in the model's dtype may not fit the 16-bit storage."""
    bad = ~torch.isfinite(stored)
    _set_error_if(error, bad.any(), kind, channel[bad.to(torch.uint8).argmax()])


def _flag_range_overflow(
    x: Tensor, zero: Tensor, scale: Tensor, exempt: Tensor | None, error: Tensor, VG: int
) -> None:
    """Without outliers a value's range must fit the 16-bit storage (with them, an outlier overflows first)."""
    bad = ~torch.isfinite(torch.maximum(zero.abs(), scale))
    if exempt is not None:
        bad &= ~exempt
    row = bad.to(torch.uint8).argmax()
    channel = row % VG * x.shape[1] + x[row].abs().argmax()
    _set_error_if(error, bad.any(), ERROR_VALUE_NOT_FINITE, channel)


def _set_error_if(error: Tensor, condition: Tensor, kind: int, channel: Tensor) -> None:
    """Record the first error without asking the device for it."""
    record = torch.stack([torch.full_like(channel, kind), channel]).to(error.dtype)
    error.copy_(torch.where(condition & (error[0] == 0), record, error))


def _set_error(error: Tensor, kind: int, channel: int) -> None:
    if int(error[0]) == 0:
        error.copy_(torch.tensor([kind, channel], dtype=error.dtype))


attend = attend_tiled
