"""Quantizing, packing and storing, vectorised in PyTorch; the loops over elements compiled by numba where that can be.

What is left to PyTorch takes few passes, each over a chunk that stays in the cache. Counts of outliers are data, so
this reads a few integers back from tensors (``nonzero``, whether all is finite). That is free on a CPU; on a GPU the
triton backend exists so that nothing waits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvquant import nuq
from kvquant.compiled import byte_ones, can_compile, in_parts, magnitude_mask, ordered_bounds, raw
from kvquant.encoding import (
    Scratch,
    boundaries,
    count_below,
    nonzero_flat,
    ordered,
    ordered_floor,
    ordered_range,
    row_chunks,
)
from kvquant.kernels import (
    ERROR_KEY_NOT_FINITE,
    ERROR_OUT_OF_SPILL,
    ERROR_VALUE_NOT_FINITE,
    ExactStore,
    KeyStore,
    LayerConstants,
    ValueStore,
)
from kvquant.kernels.outlier_append import append_key_outliers
from kvquant.not_finite import flag_not_finite
from kvquant.one_thread import one_thread
from kvquant.packing import pack, plane_widths

# Codes that compiled loops count one boundary at a time; beyond, a binary search takes fewer steps.
_MOST_COUNTED_BITS = 5
# The widest integer first: rows are then copied in as few moves as they allow.
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16))


def write_exact(
    x: Tensor, store: ExactStore, slot_block: Tensor, slot_offset: Tensor, kind: int, error: Tensor
) -> None:
    """Store keys or values as they are.

    Args:
        x: [T, H, D] in the store's dtype.
        store: the layer's side of the pool.
        slot_block: block of each token, int64 [T].
        slot_offset: slot within the block, int64 [T].
        kind: what the error word shall say of NaN and infinity, ``ERROR_KEY_NOT_FINITE`` or ``ERROR_VALUE_NOT_FINITE``.
        error: the pool's error word, int64 [2].
    """
    store.data[slot_block, :, slot_offset] = x.to(store.data.dtype)
    flag_not_finite(x, kind, error)


@one_thread()
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
        error: the pool's error word, int64 [2]; set on NaN, infinity or exhausted spill chunks, and then nothing
            that was written counts.
        bits: width of a code.
    """
    T, H, D = keys.shape
    C = H * D
    keys = keys.contiguous()
    bounds = ordered_floor(
        boundaries(constants.key_zero, constants.key_scale, constants.key_midpoints), keys.dtype
    )
    # What is not finite lies outside whatever the thresholds are, so that looking at outliers finds it.
    inside = ordered_range(constants.key_lower, constants.key_upper, keys.dtype)
    code = _code_keys_compiled if can_compile(keys) and bits <= _MOST_COUNTED_BITS else _code_keys
    at = code(keys, bounds, inside, _Target(store.codes, slot_block, slot_offset, skip, bits))
    if skip is not None:
        _check_finite(keys[skip].flatten(), ERROR_KEY_NOT_FINITE, error, C)
    if not at.numel():
        return
    kept = keys.view(-1)[at].to(store.outlier_value.dtype)
    if not _check_finite(kept, ERROR_KEY_NOT_FINITE, error, C, at):
        return
    if not append_key_outliers(at, kept, store, slot_block, slot_offset, (T, H, D)):
        _set_error(error, ERROR_OUT_OF_SPILL, 0)


@one_thread()
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
        slot_block, slot_offset, skip, error, bits: as of :func:`write_keys`.
    """
    T, H, D = values.shape
    C, VG = H * D, store.zero.shape[-1]
    group, side = C // VG, store.zero.dtype
    per_end = store.outlier_index.shape[-1] // VG // 2
    values = values.contiguous()
    x = values.view(T * VG, group)
    index, lowest, highest = nuq.split_value_outliers(x, per_end)
    zero, scale = (part.to(side) for part in nuq.zero_and_scale(lowest, highest))
    bounds = ordered_floor(boundaries(zero[:, None], scale[:, None], constants.value_midpoints), values.dtype)
    code = _code_values_compiled if can_compile(values) and bits <= _MOST_COUNTED_BITS else _code_values
    code(values, bounds, index, _Target(store.codes, slot_block, slot_offset, skip, bits))
    index = index.long()
    store.zero[slot_block, slot_offset] = zero.view(-1, VG)
    store.scale[slot_block, slot_offset] = scale.view(-1, VG)
    first = torch.arange(VG, device=values.device).view(1, VG, 1) * group
    if per_end:
        checked = x.gather(1, index).to(side).view(T, -1)
        channel = (index.view(T, VG, -1) + first).view(T, -1)
        store.outlier_index[slot_block, slot_offset] = channel.to(torch.int16)
        store.outlier_value[slot_block, slot_offset] = checked
    else:
        # Without outliers the range must fit the 16-bit storage; with them, an outlier overflows first.
        checked = torch.maximum(zero.abs(), scale).view(T, VG)
        if bool(torch.isfinite(checked).all()):
            return
        channel = first.view(1, VG) + x.abs().argmax(1).view(T, VG)
    if skip is not None:
        _check_finite(values[skip].flatten(), ERROR_VALUE_NOT_FINITE, error, C)
        # What a sink token leaves here is never read, whether it fits or not.
        checked = checked.masked_fill(skip[:, None], 0)
    _check_finite(checked.flatten(), ERROR_VALUE_NOT_FINITE, error, C, channel.flatten())


class _Target(NamedTuple):
    """Where the codes of a call's tokens go; those of sink tokens are 0."""

    codes: Tensor  # the side's in the pool, [N, H, BS, row_bytes]
    block: Tensor  # of each token, int64 [T]
    slot: Tensor  # within the block, int64 [T]
    skip: Tensor | None  # which tokens are sinks, bool [T]
    bits: int

    def put(self, codes: Tensor, rows: slice) -> None:
        """Pack codes [t, H, D] of some of the tokens into their slots."""
        store, packed = self.codes, pack(codes, self.bits)
        for size, word in _WORDS:
            if packed.shape[-1] % size == 0:
                store, packed = store.view(word), packed.view(word)
                break
        store[self.block[rows], :, self.slot[rows]] = packed

    def for_loops(self, head_dim: int) -> tuple[object, ...]:
        """What both compiled writers take from ``skip`` on."""
        sinks = np.empty(0, np.uint8) if self.skip is None else raw(self.skip.view(torch.uint8))
        widths = plane_widths(self.bits)
        ones = byte_ones(head_dim, min(widths))
        codes = raw(self.codes if ones == 1 else self.codes.view(torch.int64))
        return sinks, np.array(widths), ones, codes, *(raw(x.contiguous()) for x in (self.block, self.slot))


def _code_keys(keys: Tensor, bounds: Tensor, inside: tuple[Tensor, Tensor], target: _Target) -> Tensor:
    """Code and store keys [T, H, D], 0 under sinks and outliers; flat indices of the outliers, ascending, int64 [K].

    Args:
        keys: contiguous.
        bounds: decision boundaries as keys are compared, [2^bits - 1, H, D].
        inside: the closed range outside of which a key is an outlier, likewise, [H, D] each.
        target: where codes go.
    """
    found, scratch = [], Scratch()
    for rows in row_chunks(keys):
        x = ordered(keys[rows], scratch)
        codes = count_below(x, bounds, scratch)
        outside = torch.clamp(x, *inside, out=scratch.take("above", x))
        torch.ne(outside, x, out=outside)
        if target.skip is not None:
            sinks = target.skip[rows, None, None]
            outside.masked_fill_(sinks, 0)
            codes.masked_fill_(sinks, 0)
        at = nonzero_flat(outside)
        codes.view(-1).index_fill_(0, at, 0)
        target.put(codes, rows)
        found.append(at + rows.start * keys[0].numel())
    return torch.cat(found) if len(found) > 1 else found[0]


def _code_keys_compiled(
    keys: Tensor, bounds: Tensor, inside: tuple[Tensor, Tensor], target: _Target
) -> Tensor:
    """:func:`_code_keys` by compiled loops over the tokens."""
    from kvquant.compiled.encode_loops import write_key_rows

    T, H, D = keys.shape
    x = raw(keys).reshape(T, H * D)
    arguments = (
        x,
        magnitude_mask(x),
        ordered_bounds(bounds).reshape(-1, H * D),
        *(ordered_bounds(end).reshape(-1) for end in inside),
        *target.for_loops(D),
    )

    def work(first: int, last: int) -> NDArray[np.int64]:
        # PyTorch's own, so that its profiler sees it; two percent, and a token whose every key is one.
        room = torch.empty((last - first) * H * D // 50 + H * D, dtype=torch.int64)
        return write_key_rows(*arguments, room.numpy(), first, last)

    found = in_parts(T, x.size, work)
    return torch.cat([torch.from_numpy(part) for part in found])


def _code_values(values: Tensor, bounds: Tensor, outliers: Tensor, target: _Target) -> None:
    """Code and store values [T, H, D], 0 under sinks and outliers; arguments as of :func:`_code_keys` but for these.

    Args:
        bounds: [2^bits - 1, T * VG, 1].
        outliers: channels of each token's groups, int32 [T * VG, 2n].
    """
    T, H, D = values.shape
    VG = len(outliers) // T
    x, index, scratch = values.view(T * VG, -1), outliers.long(), Scratch()
    for rows in row_chunks(values):
        grouped = slice(rows.start * VG, rows.stop * VG)
        codes = count_below(ordered(x[grouped], scratch), bounds[:, grouped], scratch)
        codes.scatter_(1, index[grouped], 0)
        if target.skip is not None:
            codes.view(-1, H * D).masked_fill_(target.skip[rows, None], 0)
        target.put(codes.view(-1, H, D), rows)


def _code_values_compiled(values: Tensor, bounds: Tensor, outliers: Tensor, target: _Target) -> None:
    """:func:`_code_values` by compiled loops over the tokens."""
    from kvquant.compiled.encode_loops import write_value_rows

    T, _, D = values.shape
    x = raw(values).reshape(len(outliers), -1)
    arguments = (
        x,
        magnitude_mask(x),
        ordered_bounds(bounds).reshape(-1, len(outliers)),
        raw(outliers),
        *target.for_loops(D),
    )
    in_parts(T, x.size, lambda first, last: write_value_rows(*arguments, first, last))


def _check_finite(x: Tensor, kind: int, error: Tensor, C: int, channel: Tensor | None = None) -> bool:
    """Record the first element of ``x`` [K] that is not finite; its channel is ``channel`` (or its place) modulo C."""
    finite = torch.isfinite(x)
    if bool(finite.all()):
        return True
    first = int(finite.to(torch.uint8).argmin())
    _set_error(error, kind, (first if channel is None else int(channel[first])) % C)
    return False


def _set_error(error: Tensor, kind: int, channel: int) -> None:
    if int(error[0]) == 0:
        error.copy_(torch.tensor([kind, channel], dtype=error.dtype))


def close_values(index: Tensor, value: Tensor, end: Tensor, blocks: Tensor, *, head_dim: int) -> None:
    """Order the value outliers of full blocks by head, then token (see ``ValueStore``), in all layers at once.

    Args:
        index: channels of the layer, int16 [L, N, BS, VG*2n]; becomes slot * D + channel of the head.
        value: [L, N, BS, VG*2n].
        end: int32 [L, N, H]; set to where each head's entries end.
        blocks: the blocks to order, all open, int64 [P].
        head_dim: D.
    """
    L, _, BS, K = index.shape
    H, P = end.shape[-1], blocks.numel()
    channel = index[:, blocks].view(L, P, BS, K).to(torch.int32) & 0xFFFF
    head = torch.div(channel, head_dim, rounding_mode="floor")
    slot = torch.arange(BS, dtype=torch.int32, device=index.device)[:, None]
    entry = (slot * head_dim + channel - head * head_dim).view(L, P, BS * K).to(torch.int16)
    by_head, order = head.view(L, P, BS * K).to(torch.int16).sort(stable=True)
    index[:, blocks] = entry.gather(2, order).view(L, P, BS, K)
    value[:, blocks] = value[:, blocks].view(L, P, BS * K).gather(2, order).view(L, P, BS, K)
    heads = torch.arange(H, dtype=torch.int16, device=index.device).expand(L, P, H).contiguous()
    end[:, blocks] = torch.searchsorted(by_head, heads, right=True).to(torch.int32)
