"""Pools for the layers of a model: which layers share blocks, and how many blocks there are."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import psutil
import torch

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.errors import PoolExhausted
from kvquant.models.loading import ModelShape
from kvquant.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class PoolSize:
    """How much to allocate: so many blocks, so many GiB, or (both None) every sequence at its full length.

    With ``call_tokens``, the most new tokens that one call brings over all its sequences, layers with a sliding window
    get no more blocks than their windows can hold; without it a call may be as long as a prompt, and all of it is
    stored before the window gives blocks back.
    """

    num_blocks: int | None
    memory_budget_gib: float | None
    max_length: int
    max_sequences: int
    call_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers that share block ids: one spec, one window, one device."""

    layout: BlockLayout
    window: int | None
    layers: tuple[int, ...]
    device: torch.device

    def num_blocks(self, num_blocks: int, size: PoolSize) -> int:
        """Blocks of this group's pool where groups without a window have ``num_blocks``."""
        if self.window is None or size.call_tokens is None:
            return num_blocks
        # Each sequence holds its window and at most one more block that its new tokens begin; the rest they fill.
        held = self.layout.blocks_in_window(self.window, 0) + 1
        return min(num_blocks, size.max_sequences * held + size.call_tokens // self.layout.block_size)

    def columns(self, num_blocks: int, size: PoolSize) -> int:
        """Columns of the block table."""
        columns = self.layout.blocks_for(size.max_length)
        # Blocks of a window come back, so that a sequence may outgrow the pool.
        return columns if self.window else min(columns, num_blocks)

    def nbytes(self, num_blocks: int, size: PoolSize) -> int:
        """Bytes of this group's pool, tables, sinks and spill chunks included."""
        blocks, columns = self.num_blocks(num_blocks, size), self.columns(num_blocks, size)
        return self.layout.pool_bytes(blocks, size.max_sequences, columns)


def group_layers(
    quantizers: Sequence[BatchedKVQuantizer],
    shape: ModelShape,
    devices: Sequence[torch.device],
    *,
    dtype: torch.dtype,
    block_size: int,
    spill_headroom: float,
) -> list[LayerGroup]:
    """Group layers by spec, window and device, in order of their first layer."""
    groups: dict[tuple[QuantSpec, int | None, torch.device], list[int]] = {}
    for layer, (quantizer, device) in enumerate(zip(quantizers, devices, strict=True)):
        groups.setdefault((quantizer.spec, shape.windows[layer], device), []).append(layer)
    return [
        LayerGroup(
            quantizers[layers[0]].layout(len(layers), dtype, block_size, spill_headroom),
            window,
            tuple(layers),
            device,
        )
        for (_, window, device), layers in groups.items()
    ]


def allocate_pools(groups: Sequence[LayerGroup], size: PoolSize) -> list[BlockPool]:
    """Allocate one pool per group.

    Raises:
        PoolExhausted: the size does not fit the memory, or holds no block; says what would.
    """
    num_blocks = _num_blocks(groups, size)
    for device in dict.fromkeys(group.device for group in groups):
        here = [group for group in groups if group.device == device]
        needed, available = _nbytes(here, num_blocks, size), _available_bytes(device)
        if needed > available:
            fits = max(1, _largest(here, size, available))
            raise PoolExhausted(
                f"the cache needs {needed / 2**30:.2f} GiB and {available / 2**30:.2f} GiB are free; "
                f"try cache.num_blocks={fits}, which fits"
            )
    return [
        BlockPool(
            group.layout,
            group.num_blocks(num_blocks, size),
            max_sequences=size.max_sequences,
            max_blocks_per_sequence=group.columns(num_blocks, size),
            window=group.window,
            layer_numbers=group.layers,
            device=group.device,
        )
        for group in groups
    ]


def key_elements(pools: Sequence[BlockPool], rows: Sequence[int]) -> int:
    """Key elements stored for some sequences, those of blocks that a window has given back left out."""
    return sum(
        pool.tokens_held(row) * pool.layout.num_layers * pool.layout.num_kv_heads * pool.layout.head_dim
        for pool in pools
        for row in rows
    )


def key_outliers(pools: Sequence[BlockPool], rows: Sequence[int]) -> int:
    """Key elements that are kept exactly among them (waits for the device)."""
    return sum(
        int(pool.tensors["key_outlier_count"][:, pool.blocks_of(row)].sum())
        for pool in pools
        if pool.layout.chains_outliers
        for row in rows
    )


def _num_blocks(groups: Sequence[LayerGroup], size: PoolSize) -> int:
    if size.num_blocks is not None:
        return size.num_blocks
    if size.memory_budget_gib is None:
        return size.max_sequences * groups[0].layout.blocks_for(size.max_length)
    num_blocks = _largest(groups, size, int(size.memory_budget_gib * 2**30))
    if num_blocks < 1:
        smallest = _nbytes(groups, 1, size)
        raise PoolExhausted(
            f"cache.memory_budget_gib must hold at least one block, {smallest} bytes with the tables of "
            f"{size.max_sequences} sequences, got {size.memory_budget_gib}; try {smallest / 2**30:.4f}, a smaller "
            "cache.block_size or fewer sequences"
        )
    return num_blocks


def _nbytes(groups: Sequence[LayerGroup], num_blocks: int, size: PoolSize) -> int:
    return sum(group.nbytes(num_blocks, size) for group in groups)


def _largest(groups: Sequence[LayerGroup], size: PoolSize, num_bytes: int) -> int:
    """The most blocks whose pools take at most ``num_bytes``."""
    most = num_bytes // min(group.layout.block_bytes for group in groups)
    return bisect.bisect_right(
        range(1, most + 1), num_bytes, key=lambda num_blocks: _nbytes(groups, num_blocks, size)
    )


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
