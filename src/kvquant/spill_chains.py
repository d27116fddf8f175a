"""Chains of spill chunks behind full outlier rows: give back, cut and copy.

Used when sequences are freed, cropped or forked, never while tokens are written. A chain is as long as its (block,
head)'s count says; links beyond that are dead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvquant.kernels import SPILL_ENTRIES, KeyStore, LayerStore


def _key_stores(layers: Sequence[LayerStore]) -> Iterator[KeyStore]:
    for layer in layers:
        assert isinstance(layer.keys, KeyStore)  # no other store has outliers that vary in number
        yield layer.keys


def _chain_lengths(counts: Tensor, base: int) -> Tensor:
    """Chunks behind rows that hold ``counts`` outliers, ``base`` of them on their own."""
    beyond = counts - base
    return torch.div(beyond + SPILL_ENTRIES - 1, SPILL_ENTRIES, rounding_mode="floor").clamp(min=0)


def _lengths_of(store: KeyStore, counts: Tensor) -> Tensor:
    return _chain_lengths(counts, store.outlier_index.shape[-1])


def _chunks(store: KeyStore, heads: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Ids of chunks number ``first`` to ``last - 1`` of the chains that begin at ``heads`` (flat tensors)."""
    found, chunk = [], heads.to(torch.int64)
    for level in range(int(last.max()) if last.numel() else 0):
        found.append(chunk[(level >= first) & (level < last)])
        chunk = store.spill_next[chunk].to(torch.int64)
    return torch.cat(found) if found else heads.new_zeros(0, dtype=torch.int64)


def _push(store: KeyStore, chunks: Tensor) -> None:
    top = int(store.spill_top)
    store.spill_free[top : top + chunks.numel()] = chunks.to(torch.int32)
    store.spill_top.add_(chunks.numel())


def count(layers: Sequence[LayerStore], blocks: Sequence[int]) -> Tensor:
    """How many spill chunks each layer keeps behind some blocks, int64 [L]."""
    ids = list(blocks)
    return torch.stack([_lengths_of(s, s.outlier_count[ids]).sum() for s in _key_stores(layers)]).long()


def release(tensors: dict[str, Tensor], spill_top: Tensor, blocks: list[int]) -> None:
    """Return all spill chunks of some blocks to the free stacks, of all layers at once.

    Waits for the device once, and once for each chunk of the longest chain, however many layers there are.

    Args:
        tensors: of the pool's layers, [L, ...] each.
        spill_top: height of each layer's stack, int32 [L, 1]; updated.
        blocks: distinct ids.
    """
    ids = torch.tensor(blocks, device=spill_top.device)
    base = tensors["key_outlier_index"].shape[-1]
    lengths = _chain_lengths(tensors["key_outlier_count"][:, ids], base).flatten(1)  # [L, blocks * heads]
    chunk = tensors["spill_head"][:, ids].flatten(1).to(torch.int64)
    for level in range(int(lengths.max()) if lengths.numel() else 0):
        taken = level < lengths
        layer, entry = taken.nonzero(as_tuple=True)
        place = spill_top + taken.cumsum(1) - 1
        tensors["spill_free"][layer, place[layer, entry]] = chunk[layer, entry].to(torch.int32)
        spill_top += taken.sum(1, keepdim=True)
        # Of a chain that has ended the head may be anything that was once a chunk: it leads to some chunk.
        chunk = tensors["spill_next"].gather(1, chunk).to(torch.int64)
    tensors["key_outlier_count"][:, ids] = 0


def crop(layers: Sequence[LayerStore], block: int, tokens: int, head_dim: int) -> None:
    """Drop the outliers of slots from ``tokens`` on in one block."""
    for store in _key_stores(layers):
        base, count, head = store.outlier_index.shape[-1], store.outlier_count[block], store.spill_head[block]
        old = _lengths_of(store, count)
        limit = tokens * head_dim
        kept = _entries_below(store.outlier_index[block], count, limit)
        chunk = head.to(torch.int64)
        for level in range(int(old.max())):
            left = count - base - level * SPILL_ENTRIES
            kept = kept + _entries_below(store.spill_index[chunk], left, limit)
            chunk = store.spill_next[chunk].to(torch.int64)
        _push(store, _chunks(store, head, _lengths_of(store, kept), old))
        store.outlier_count[block] = kept.to(torch.int32)


def _entries_below(index: Tensor, count: Tensor, limit: int) -> Tensor:
    """How many of the first ``count`` [H] entries of ``index`` [H, K] lie below ``limit``."""
    present = torch.arange(index.shape[-1], device=index.device) < count[:, None]
    return (present & ((index.to(torch.int64) & 0xFFFF) < limit)).sum(-1)


def copy(layers: Sequence[LayerStore], source: int, target: int) -> bool:
    """Give a copied block chains of its own; returns False, with nothing taken, when chunks run out."""
    stores = list(_key_stores(layers))
    needed = [_lengths_of(store, store.outlier_count[source]) for store in stores]
    if any(int(n.sum()) > int(store.spill_top) for store, n in zip(stores, needed, strict=True)):
        return False
    for store, lengths in zip(stores, needed, strict=True):
        for h, length in enumerate(lengths.tolist()):
            old, previous = int(store.spill_head[source, h]), None
            for _ in range(length):
                store.spill_top.sub_(1)
                new = int(store.spill_free[int(store.spill_top)])
                store.spill_index[new], store.spill_value[new] = (
                    store.spill_index[old],
                    store.spill_value[old],
                )
                if previous is None:
                    store.spill_head[target, h] = new
                else:
                    store.spill_next[previous] = new
                old, previous = int(store.spill_next[old]), new
    return True
