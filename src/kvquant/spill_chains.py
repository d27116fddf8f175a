"""Chains of spill chunks behind full outlier rows: give back, cut and copy.

Used when sequences are freed, cropped or forked, never while tokens are written. A chain is as long as its (block,
head)'s count says; links beyond that are dead.

Everything is done for all layers at once, a link of every chain after the other: the device is waited for a few times
and once for each chunk of the longest chain, however many layers there are. ``tensors`` are the pool's, [L, ...] each, and
``spill_top`` is the height of each layer's stack of free chunks, int32 [L, 1], which is updated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvquant.kernels import SPILL_ENTRIES


def _chain_lengths(counts: Tensor, base: int) -> Tensor:
    """Chunks behind rows that hold ``counts`` outliers, ``base`` of them on their own."""
    beyond = counts - base
    return torch.div(beyond + SPILL_ENTRIES - 1, SPILL_ENTRIES, rounding_mode="floor").clamp(min=0)


def _lengths_of(tensors: dict[str, Tensor], ids: Tensor | slice) -> Tensor:
    """Chunks of every chain of some blocks, int32 [L, blocks * heads]."""
    counts = tensors["key_outlier_count"][:, ids].flatten(1)
    return _chain_lengths(counts, tensors["key_outlier_index"].shape[-1])


def _heads_of(tensors: dict[str, Tensor], ids: Tensor | slice) -> Tensor:
    return tensors["spill_head"][:, ids].flatten(1).to(torch.int64)


def _next(tensors: dict[str, Tensor], chunk: Tensor) -> Tensor:
    """The links of chunks [L, n]; of a chain that has ended, whatever chunk its dead link names."""
    return tensors["spill_next"].gather(1, chunk).to(torch.int64)


def _levels(lengths: Tensor) -> range:
    """Numbers of the longest chain's chunks (waits for the device)."""
    return range(int(lengths.max()) if lengths.numel() else 0)


def count(tensors: dict[str, Tensor], blocks: Sequence[int]) -> Tensor:
    """How many spill chunks each layer keeps behind some blocks, int64 [L]; a block named twice counts twice."""
    ids = torch.tensor(blocks, dtype=torch.int64, device=tensors["key_outlier_count"].device)
    return _lengths_of(tensors, ids).sum(1, dtype=torch.int64)


def release(tensors: dict[str, Tensor], spill_top: Tensor, blocks: Sequence[int]) -> None:
    """Return all spill chunks of some blocks to the free stacks; the blocks have no outliers then.

    Args:
        tensors, spill_top: see above.
        blocks: distinct ids.
    """
    ids = torch.tensor(blocks, device=spill_top.device)
    lengths, chunk = _lengths_of(tensors, ids), _heads_of(tensors, ids)
    for level in _levels(lengths):
        _push(tensors, spill_top, chunk, level < lengths)
        chunk = _next(tensors, chunk)
    tensors["key_outlier_count"][:, ids] = 0


def _push(tensors: dict[str, Tensor], spill_top: Tensor, chunk: Tensor, taken: Tensor) -> None:
    """Put those of ``chunk`` [L, n] that are ``taken`` onto the stacks."""
    layer, entry = taken.nonzero(as_tuple=True)
    place = spill_top + taken.cumsum(1) - 1
    tensors["spill_free"][layer, place[layer, entry]] = chunk[layer, entry].to(torch.int32)
    spill_top += taken.sum(1, keepdim=True)


def crop(tensors: dict[str, Tensor], spill_top: Tensor, block: int, tokens: int, head_dim: int) -> None:
    """Drop the outliers of slots from ``tokens`` on in one block, and the chunks that are empty then.

    Entries are in token order, so that what is kept of each chain is its beginning.
    """
    counts, limit = tensors["key_outlier_count"][:, block], tokens * head_dim
    old, chunk = _lengths_of(tensors, slice(block, block + 1)), _heads_of(tensors, slice(block, block + 1))
    kept = _entries_below(tensors["key_outlier_index"][:, block], counts, limit)
    base = tensors["key_outlier_index"].shape[-1]
    layer = torch.arange(len(chunk), device=chunk.device)[:, None]
    chunks = []
    for level in _levels(old):
        left = counts - base - level * SPILL_ENTRIES
        kept = kept + _entries_below(tensors["spill_index"][layer, chunk], left, limit)
        chunks.append(chunk)
        chunk = _next(tensors, chunk)
    new = _chain_lengths(kept, base)
    for level, chunk in enumerate(chunks):
        _push(tensors, spill_top, chunk, (new <= level) & (level < old))
    tensors["key_outlier_count"][:, block] = kept.to(torch.int32)


def _entries_below(index: Tensor, count: Tensor, limit: int) -> Tensor:
    """How many of the first ``count`` [L, H] entries of ``index`` [L, H, K] lie below ``limit``."""
    present = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    return (present & ((index.to(torch.int64) & 0xFFFF) < limit)).sum(-1)


def copy(tensors: dict[str, Tensor], spill_top: Tensor, source: int, target: int) -> bool:
    """Give a copied block chains of its own; returns False, with nothing taken, when chunks run out in any layer."""
    block = slice(source, source + 1)
    lengths, old = _lengths_of(tensors, block), _heads_of(tensors, block)
    if bool((lengths.sum(1, keepdim=True) > spill_top).any()):
        return False
    previous = old
    for level in _levels(lengths):
        taken = level < lengths
        layer, head = taken.nonzero(as_tuple=True)
        free = tensors["spill_free"]
        place = (spill_top - taken.cumsum(1)).clamp(0, free.shape[1] - 1)  # of chains that have ended, any
        new = free.gather(1, place).to(torch.int64)
        to, origin = new[layer, head], old[layer, head]
        for name in ("spill_index", "spill_value"):
            tensors[name][layer, to] = tensors[name][layer, origin]
        link = to.to(torch.int32)
        if level == 0:
            tensors["spill_head"][layer, target, head] = link
        else:
            tensors["spill_next"][layer, previous[layer, head]] = link
        spill_top -= taken.sum(1, keepdim=True)
        previous, old = new, _next(tensors, old)
    return True
