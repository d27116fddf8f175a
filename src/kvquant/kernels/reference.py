"""The truth: design.md section 3 and 5 spelled out with loops over tokens, to compare the other backends with.

Slow on purpose. Every function has the signature and the meaning of its twin in ``pytorch_fused``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvquant.kernels import (
    ERROR_KEY_NOT_FINITE,
    ERROR_OUT_OF_SPILL,
    ERROR_VALUE_NOT_FINITE,
    SPILL_ENTRIES,
    ExactStore,
    KeyStore,
    LayerConstants,
    Rope,
    ValueStore,
)
from kvquant.packing import pack, unpack
from kvquant.ragged import RaggedStep, cumulative_lengths


def rotate_tokens(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotate the first R channels of tokens to their positions, in fp32 (Su et al. 2021, half-split form).

    Args:
        x: [T, H, D].
        cos: of every token, fp32 [T, R]; both halves are alike.
        sin: likewise.
        dtype: of the result, to which it is rounded once.

    Returns:
        [T, H, D], contiguous.
    """
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = [(first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)]
    return torch.cat([*turned, rest.to(dtype)], dim=-1)


def write_exact(
    x: Tensor, store: ExactStore, slot_block: Tensor, slot_offset: Tensor, kind: int, error: Tensor
) -> None:
    """Store keys or values [T, H, D] as they are; ``kind`` goes into the error word if one is not finite."""
    for t, (block, slot) in enumerate(zip(slot_block.tolist(), slot_offset.tolist(), strict=True)):
        store.data[block, :, slot] = x[t].to(store.data.dtype)
    bad = (~x.flatten(1).isfinite().all(0)).nonzero()
    if len(bad) and not error[0]:
        error.copy_(torch.tensor([kind, int(bad[0])]))


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
    """Quantize and store keys [T, H, D]: one code per element, one list of outliers per (block, head)."""
    T, H, D = keys.shape
    entries = []
    for t in range(T):
        block, slot = int(slot_block[t]), int(slot_offset[t])
        x = keys[t].float()
        _check_finite(x, ERROR_KEY_NOT_FINITE, error)
        outlier = (x < constants.key_lower) | (x > constants.key_upper)
        if skip is not None and bool(skip[t]):
            outlier[:] = False
            codes = torch.zeros(H, D, dtype=torch.uint8)
        else:
            boundaries = constants.key_zero + constants.key_scale * constants.key_midpoints[:, None, None]
            codes = (x > boundaries).sum(0).to(torch.uint8)
            codes[outlier] = 0
        store.codes[block, :, slot] = pack(codes, bits)
        entries += [(block, h, slot * D + d, x[h, d], h * D + d) for h, d in outlier.nonzero().tolist()]
    # By (block, head), in token order within each: so every backend takes the same spill chunks.
    for block, h, index, value, channel in sorted(entries, key=lambda entry: entry[:2]):
        _append_outlier(store, block, h, index, value, error, channel)


def _append_outlier(
    store: KeyStore, block: int, head: int, index: int, value: Tensor, error: Tensor, channel: int
) -> None:
    """Put one entry behind the last one of its (block, head)."""
    index = index - 65536 if index > 32767 else index  # an unsigned number in an int16
    kept = value.to(store.outlier_value.dtype)
    _check_finite(kept, ERROR_KEY_NOT_FINITE, error, channel)
    entry, base = int(store.outlier_count[block, head]), store.outlier_index.shape[-1]
    if entry < base:
        store.outlier_index[block, head, entry] = index
        store.outlier_value[block, head, entry] = kept
    else:
        ordinal, lane = divmod(entry - base, SPILL_ENTRIES)
        if lane == 0:
            if int(store.spill_top) == 0:
                _set_error(error, ERROR_OUT_OF_SPILL, 0)
                return
            store.spill_top.sub_(1)
            chunk = int(store.spill_free[int(store.spill_top)])
            if ordinal == 0:
                store.spill_head[block, head] = chunk
            else:
                store.spill_next[_chunk_at(store, block, head, ordinal - 1)] = chunk
        chunk = _chunk_at(store, block, head, ordinal)
        store.spill_index[chunk, lane] = index
        store.spill_value[chunk, lane] = kept
    store.outlier_count[block, head].add_(1)


def _chunk_at(store: KeyStore, block: int, head: int, ordinal: int) -> int:
    chunk = int(store.spill_head[block, head])
    for _ in range(ordinal):
        chunk = int(store.spill_next[chunk])
    return chunk


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
    """Quantize and store values [T, H, D]: per token and group, 2n exact outliers and a range for the rest."""
    T, H, D = values.shape
    C, VG = H * D, store.zero.shape[-1]
    group = C // VG
    per_end = store.outlier_index.shape[-1] // VG // 2
    for t in range(T):
        block, slot = int(slot_block[t]), int(slot_offset[t])
        is_sink = skip is not None and bool(skip[t])
        x = values[t].float().flatten()
        _check_finite(x, ERROR_VALUE_NOT_FINITE, error)
        codes = torch.zeros(C, dtype=torch.uint8)
        for g in range(VG):
            part = x[g * group : (g + 1) * group]
            # Ascending by (value, channel): ties at the low end keep the lowest channels, at the high end the highest.
            order = [c for _, c in sorted((float(x), c) for c, x in enumerate(part))]
            outliers = sorted(order[:per_end] + order[group - per_end :])
            rest = part[[c for c in range(group) if c not in set(outliers)]]
            zero = ((rest.max() + rest.min()) / 2).to(store.zero.dtype)
            scale = ((rest.max() - rest.min()) / 2).to(store.scale.dtype)
            boundaries = zero.float() + scale.float() * constants.value_midpoints
            own = (part > boundaries[:, None]).sum(0).to(torch.uint8)
            own[outliers] = 0
            codes[g * group : (g + 1) * group] = own
            store.zero[block, slot, g], store.scale[block, slot, g] = zero, scale
            if not per_end and not is_sink and not bool(torch.isfinite(torch.stack([zero, scale])).all()):
                _set_error(error, ERROR_VALUE_NOT_FINITE, g * group + int(part.abs().argmax()))
            for k, c in enumerate(outliers):
                at, channel = g * 2 * per_end + k, g * group + c
                kept = part[c].to(store.outlier_value.dtype)
                if not is_sink:
                    _check_finite(kept, ERROR_VALUE_NOT_FINITE, error, channel)
                store.outlier_index[block, slot, at] = channel - 65536 if channel > 32767 else channel
                store.outlier_value[block, slot, at] = kept
        if is_sink:
            codes[:] = 0
        store.codes[block, :, slot] = pack(codes.view(H, D), bits)


def close_values(index: Tensor, value: Tensor, end: Tensor, blocks: Tensor, *, head_dim: int) -> None:
    """Order the value outliers of full blocks by head, then token; see ``ValueStore``."""
    for layer in range(index.shape[0]):
        for block in blocks.tolist():
            rows = [
                (c // head_dim, slot, c % head_dim, value[layer, block, slot, k].clone())
                for slot in range(index.shape[2])
                for k, c in enumerate((index[layer, block, slot].to(torch.int32) & 0xFFFF).tolist())
            ]
            rows.sort(key=lambda row: row[:3])
            for place, (_, slot, channel, kept) in enumerate(rows):
                number = slot * head_dim + channel
                index[layer, block].view(-1)[place] = number - 65536 if number > 32767 else number
                value[layer, block].view(-1)[place] = kept
            for h in range(end.shape[-1]):
                end[layer, block, h] = sum(row[0] <= h for row in rows)


def read_exact(store: ExactStore, block_ids: Tensor) -> Tensor:
    """Return fp32 [S, H, P*BS, D] of the blocks ``block_ids`` [S, P]."""
    return torch.stack([torch.cat([store.data[int(b)].float() for b in row], dim=1) for row in block_ids])


def read_keys(
    store: KeyStore, constants: LayerConstants, block_ids: Tensor, *, bits: int, head_dim: int
) -> Tensor:
    """Dequantize blocks of keys to fp32 [S, H, P*BS, D]."""
    return torch.stack(
        [
            torch.cat([_key_block(store, constants, int(b), bits, head_dim) for b in row], 1)
            for row in block_ids
        ]
    )


def _key_block(store: KeyStore, constants: LayerConstants, block: int, bits: int, D: int) -> Tensor:
    codes = unpack(store.codes[block], bits, D).long()  # [H, BS, D]
    x = constants.key_centroids[codes] * constants.key_scale[:, None] + constants.key_zero[:, None]
    base = store.outlier_index.shape[-1]
    for h in range(x.shape[0]):
        for entry in range(int(store.outlier_count[block, h])):
            if entry < base:
                index, value = store.outlier_index[block, h, entry], store.outlier_value[block, h, entry]
            else:
                ordinal, lane = divmod(entry - base, SPILL_ENTRIES)
                chunk = _chunk_at(store, block, h, ordinal)
                index, value = store.spill_index[chunk, lane], store.spill_value[chunk, lane]
            slot, d = divmod(int(index) & 0xFFFF, D)
            x[h, slot, d] = value.float()
    return x


def read_values(
    store: ValueStore, constants: LayerConstants, block_ids: Tensor, *, bits: int, head_dim: int
) -> Tensor:
    """Dequantize blocks of values to fp32 [S, H, P*BS, D]."""
    return torch.stack(
        [
            torch.cat([_value_block(store, constants, int(b), bits, head_dim) for b in row], 1)
            for row in block_ids
        ]
    )


def _value_block(store: ValueStore, constants: LayerConstants, block: int, bits: int, D: int) -> Tensor:
    codes = unpack(store.codes[block], bits, D).long()  # [H, BS, D]
    H, BS, _ = codes.shape
    VG = store.zero.shape[-1]
    out = torch.empty(H, BS, D)
    for slot in range(BS):
        flat = constants.value_centroids[codes[:, slot].flatten()].view(VG, -1)
        flat = flat * store.scale[block, slot].float()[:, None] + store.zero[block, slot].float()[:, None]
        out[:, slot] = flat.view(H, D)
    index = (store.outlier_index[block].to(torch.int32) & 0xFFFF).flatten().tolist()
    kept = store.outlier_value[block].float().flatten()
    ends = store.outlier_end[block].tolist()
    for place, number in enumerate(index):
        if ends[-1]:  # closed: by head, numbered slot * D + channel of the head
            h = sum(end <= place for end in ends)
            slot, d = divmod(number, D)
        else:  # open: row t is token t, numbered by the layer's channel
            slot, (h, d) = place // store.outlier_index.shape[-1], divmod(number, D)
            if h >= H:  # a slot not yet written, with a number from when the block was closed last
                continue
        out[h, slot, d] = kept[place]
    return out


def attend(
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
    """Attend one sequence at a time over its whole dequantized history; see ``attend_tiled`` for the arguments."""
    _, Hq, _ = query.shape
    out = torch.empty_like(query)
    tile = block_size * blocks_per_tile
    for s, start in enumerate(cumulative_lengths(step.lengths)[:-1]):
        past, new = step.past[s], step.lengths[s]
        length = past + new
        keys, values = read_tile(step.block_table[s : s + 1, : -(-length // block_size)].long())
        keys, values = keys[0, :, :length].clone(), values[0, :, :length].clone()  # [H, length, D]
        if sinks is not None:
            count = min(sinks[0].shape[1], length)
            keys[:, :count] = sinks[0][s, :count].transpose(0, 1).float()
            values[:, :count] = sinks[1][s, :count].transpose(0, 1).float()
        if exact is not None and new > 1:
            keys[:, past:] = exact[0][start : start + new].transpose(0, 1).float()
            values[:, past:] = exact[1][start : start + new].transpose(0, 1).float()
        if rope is not None:
            for p in range(length):
                base, offset = divmod(p, tile)
                turned = _turn(keys[:, p], rope.offset_cos[offset], rope.offset_sin[offset])
                keys[:, p] = _turn(turned, rope.base_cos[base], rope.base_sin[base])
        for t in range(new):
            last = past + t
            first = 0 if window is None else max(0, last - window + 1)
            for head in range(Hq):
                kv = head // (Hq // keys.shape[0])
                scores = keys[kv, first : last + 1] @ query[start + t, head].float() * softmax_scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[start + t, head] = (scores.softmax(0) @ values[kv, first : last + 1]).to(out.dtype)
    return out


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of [..., D] by one angle per pair."""
    half = cos.shape[-1]
    out = x.clone()
    out[..., :half] = x[..., :half] * cos - x[..., half : 2 * half] * sin
    out[..., half : 2 * half] = x[..., half : 2 * half] * cos + x[..., :half] * sin
    return out


def _check_finite(x: Tensor, kind: int, error: Tensor, channel: int = 0) -> None:
    bad = (~torch.isfinite(x)).flatten().nonzero().flatten().tolist()
    if bad:
        _set_error(error, kind, channel + bad[0])


def _set_error(error: Tensor, kind: int, channel: int) -> None:
    if int(error[0]) == 0:
        error.copy_(torch.tensor([kind, channel]))
