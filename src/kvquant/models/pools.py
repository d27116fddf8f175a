"""Pools for the layers of a model: which layers share blocks, and how many blocks there are."""

from __future__ import annotations

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
    """How much to allocate: so many blocks, so many GiB, or (both None) every sequence at its full length."""

    num_blocks: int | None
    memory_budget_gib: float | None
    max_length: int


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers that share block ids: one spec, one window."""

    layout: BlockLayout
    window: int | None
    layers: tuple[int, ...]


def group_layers(
    quantizers: Sequence[BatchedKVQuantizer],
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    block_size: int,
    spill_headroom: float,
) -> list[LayerGroup]:
    """Group layers by spec and window, in order of their first layer."""
    groups: dict[tuple[QuantSpec, int | None], list[int]] = {}
    for layer, quantizer in enumerate(quantizers):
        groups.setdefault((quantizer.spec, shape.windows[layer]), []).append(layer)
    return [
        LayerGroup(
            quantizers[layers[0]].layout(len(layers), dtype, block_size, spill_headroom),
            window,
            tuple(layers),
        )
        for (_, window), layers in groups.items()
    ]


def allocate_pools(
    groups: Sequence[LayerGroup], size: PoolSize, max_sequences: int, device: torch.device
) -> list[BlockPool]:
    """Allocate one pool per group, all with the same number of blocks.

    Raises:
        PoolExhausted: the size does not fit the memory, or holds no block; says what would.
    """
    per_block = sum(group.layout.provisioned_block_bytes for group in groups)
    columns = groups[0].layout.blocks_for(size.max_length)
    if size.num_blocks is not None:
        num_blocks = size.num_blocks
    elif size.memory_budget_gib is not None:
        num_blocks = int(size.memory_budget_gib * 2**30) // per_block
        if num_blocks < 1:
            raise PoolExhausted(
                f"cache.memory_budget_gib must hold at least one block of {per_block} bytes, got "
                f"{size.memory_budget_gib}; try {per_block / 2**30:.4f} or a smaller cache.block_size"
            )
    else:
        num_blocks = max_sequences * columns
    available = _available_bytes(device)
    if num_blocks * per_block > available:
        raise PoolExhausted(
            f"the cache needs {num_blocks * per_block / 2**30:.2f} GiB and {available / 2**30:.2f} GiB are free; "
            f"try cache.num_blocks={max(1, available // per_block)}, which fits"
        )
    return [
        BlockPool(
            group.layout,
            num_blocks,
            max_sequences=max_sequences,
            # Blocks of a window come back, so that a sequence may outgrow the pool.
            max_blocks_per_sequence=columns if group.window else min(columns, num_blocks),
            window=group.window,
            layer_numbers=group.layers,
            device=device,
        )
        for group in groups
    ]


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
