"""What one block holds, in bytes: the single place where sizes of the pool's tensors are decided.

Why this layout. Codes are token-major per head, so that append, crop and fork touch whole bytes. Outliers of keys vary
in number, so a (block, head) has a base row for the expected number plus one standard deviation (few chains, little
slack) and chains 32-entry chunks beyond. Outliers of values are always 2n per token and group, so while tokens still
join a block they are a plain [BS, 2n] table whose position says the token: no counts, no slack. Attention works head
by head, and a head that filtered the whole table would read H times its share (10 KiB a block and head at 32 heads,
against 5.8 KiB of 3-bit codes), so a full block is put in order by head once: the same entries, H ends more.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from kvquant.kernels import SPILL_ENTRIES
from kvquant.nuq import value_outlier_count
from kvquant.packing import packed_row_bytes
from kvquant.spec import QuantSpec

# Spill chunks per layer at least. The expected number averages over many blocks; in a pool of a few, one odd sentence
# is not the average.
MIN_CHUNKS = 64
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def side_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type of outliers, zeros and scales: the model's own, fp16 for an fp32 model."""
    return torch.bfloat16 if model_dtype == torch.bfloat16 else torch.float16


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """Shapes and bytes of the blocks of one layer group.

    Args:
        spec: how keys and values are stored.
        num_layers: layers that share block ids, L.
        num_kv_heads: H.
        head_dim: D.
        dtype: the model's dtype, which exact storage and sink tokens keep.
        block_size: tokens in a block, BS.
        spill_headroom: outliers the pool has room for, as a multiple of the expected number.
        extra: further tensors of one block in one layer that a method needs: name, shape, dtype.

    Raises:
        ValueError: the block cannot be packed or indexed; the message names the setting and a fix.
    """

    spec: QuantSpec
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int = 64
    spill_headroom: float = 2.0
    extra: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()

    def __post_init__(self) -> None:
        BS, D = self.block_size, self.head_dim
        if BS < 8 or BS % 8:
            raise ValueError(f"cache.block_size must be a positive multiple of 8, got {BS}; try 64")
        if BS * D > 1 << 16:
            raise ValueError(
                f"cache.block_size * head_dim must be at most 65536 (16-bit outlier indices), got {BS} * {D}; "
                f"try {65536 // D // 8 * 8}"
            )
        if self.num_kv_heads * D > 1 << 16:
            raise ValueError(
                f"KV heads * head_dim must be at most 65536 (16-bit outlier indices), got {self.num_kv_heads} * {D}"
            )
        self.spec.value_group_channels(self.num_kv_heads * D)
        if self.spill_headroom < 1:
            raise ValueError(f"cache.spill_headroom must be at least 1, got {self.spill_headroom}; try 2")

    @property
    def key_outlier_base(self) -> int:
        """Key outliers that fit a (block, head) without a spill chunk."""
        if self.spec.is_exact or self.spec.outlier_fraction == 0:
            return 0
        mean = self.spec.outlier_fraction * self.block_size * self.head_dim
        return math.ceil((mean + math.sqrt(mean)) / 8) * 8

    @property
    def value_outliers(self) -> int:
        """Outliers of one value token over all groups, VG * 2n."""
        if self.spec.is_exact:
            return 0
        group = self.spec.value_group_channels(self.num_kv_heads * self.head_dim)
        return 2 * value_outlier_count(self.spec.value_outliers, group) * self.spec.value_groups

    @property
    def spill_chunks_per_block(self) -> int:
        """Spill chunks to provide for each block, in each layer."""
        if not self.key_outlier_base:
            return 0
        room = self.spill_headroom * self.spec.outlier_fraction * self.block_size * self.head_dim
        return self.num_kv_heads * max(1, math.ceil((room - self.key_outlier_base) / SPILL_ENTRIES))

    @property
    def chains_outliers(self) -> bool:
        """Whether key outliers vary in number, so that blocks have counts and spill chunks."""
        return not self.spec.is_exact

    def row_shapes(self) -> Shapes:
        """Tensors of one sequence in one layer: what stays exact beside the blocks."""
        H, D, spec = self.num_kv_heads, self.head_dim, self.spec
        sinks, recent = (0, 0) if spec.is_exact else (spec.sink_tokens, spec.recent_tokens)
        shapes: Shapes = {f"sink_{side}": ((sinks, H, D), self.dtype) for side in ("keys", "values")}
        if recent:
            shapes |= {f"recent_{side}": ((recent, H, D), self.dtype) for side in ("keys", "values")}
            shapes["recent_position"] = ((recent,), torch.int32)
        return shapes

    def block_shapes(self) -> Shapes:
        """Tensors of one block in one layer."""
        H, BS, D = self.num_kv_heads, self.block_size, self.head_dim
        if self.spec.is_exact:
            return {"keys": ((H, BS, D), self.dtype), "values": ((H, BS, D), self.dtype)}
        assert self.spec.key_bits is not None and self.spec.value_bits is not None  # set by QuantSpec itself
        side, base, VG = side_dtype(self.dtype), self.key_outlier_base, self.spec.value_groups
        return {
            "key_codes": ((H, BS, packed_row_bytes(D, self.spec.key_bits)), torch.uint8),
            "key_outlier_count": ((H,), torch.int32),
            "key_outlier_index": ((H, base), torch.int16),
            "key_outlier_value": ((H, base), side),
            "spill_head": ((H,), torch.int32),
            "value_codes": ((H, BS, packed_row_bytes(D, self.spec.value_bits)), torch.uint8),
            "value_zero": ((BS, VG), side),
            "value_scale": ((BS, VG), side),
            "value_outlier_index": ((BS, self.value_outliers), torch.int16),
            "value_outlier_value": ((BS, self.value_outliers), side),
            **{name: (shape, dtype) for name, shape, dtype in self.extra},
            "value_outlier_end": ((H,), torch.int32),
        }

    def chunk_shapes(self) -> Shapes:
        """Tensors of one spill chunk in one layer, its place in the free stack included."""
        if self.spec.is_exact:
            return {}
        return {
            "spill_next": ((), torch.int32),
            "spill_index": ((SPILL_ENTRIES,), torch.int16),
            "spill_value": ((SPILL_ENTRIES,), side_dtype(self.dtype)),
            "spill_free": ((), torch.int32),
        }

    def num_chunks(self, num_blocks: int) -> int:
        """Spill chunks of each layer in a pool of ``num_blocks`` blocks."""
        per_block = self.spill_chunks_per_block
        return max(num_blocks * per_block, MIN_CHUNKS) if per_block else 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, spill chunks apart."""
        return self.num_layers * _bytes(self.block_shapes())

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one spill chunk (it belongs to one layer)."""
        return _bytes(self.chunk_shapes())

    @property
    def provisioned_block_bytes(self) -> int:
        """Bytes that one more block adds to a large pool: the block and the spill chunks provided with it."""
        return self.block_bytes + self.num_layers * self.spill_chunks_per_block * self.chunk_bytes

    @property
    def sequence_bytes(self) -> int:
        """Bytes that one sequence takes beside its blocks (sinks, recent tokens) over all layers."""
        return self.num_layers * _bytes(self.row_shapes())

    def pool_bytes(self, num_blocks: int, max_sequences: int, columns: int) -> int:
        """Bytes of a whole pool before it is allocated.

        Args:
            num_blocks: blocks, N.
            max_sequences: rows of its block table.
            columns: columns of its block table.
        """
        chunks = self.num_layers * self.num_chunks(num_blocks) * self.chunk_bytes
        table = 4 * max_sequences * columns
        counters = self.num_layers * (4 + 16)  # height of the chunk stack; error word
        rows = max_sequences * self.sequence_bytes
        return num_blocks * self.block_bytes + chunks + table + counters + rows

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def blocks_in_window(self, window: int, new_tokens: int) -> int:
        """The most blocks of one sequence that a sliding window and ``new_tokens`` tokens of one call touch."""
        # Passed blocks are given back when a call is committed: the oldest visible token may be the last of its block.
        return self.blocks_for(window - 1 + self.block_size - 1 + new_tokens)


class MethodLayout(BlockLayout):
    """The blocks of a method with a store of its own: ``extra`` is all there is, and nothing varies in number."""

    @property
    def chains_outliers(self) -> bool:
        """Never: what a block holds is fixed."""
        return False

    @property
    def key_outlier_base(self) -> int:
        """None are kept apart."""
        return 0

    def value_shapes(self) -> Shapes:
        """The nuq family's tensors for values, for methods that differ in keys alone."""
        return {name: entry for name, entry in super().block_shapes().items() if name.startswith("value_")}

    def block_shapes(self) -> Shapes:
        """Tensors of one block in one layer."""
        return {name: (shape, dtype) for name, shape, dtype in self.extra}

    def chunk_shapes(self) -> Shapes:
        """Nothing spills."""
        return {}


def _bytes(shapes: Shapes) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
