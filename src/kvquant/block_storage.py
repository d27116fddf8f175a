"""The tensors of a block pool: preallocated once, handed out by layer, never reallocated.

Who holds which block is decided by :class:`kvquant.block_pool.BlockPool`; here a block is a slot to write, copy or
clear.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvquant import spill_chains
from kvquant.block_layout import BlockLayout
from kvquant.errors import NonFiniteActivations, PoolExhausted
from kvquant.kernels import (
    ERROR_OUT_OF_SPILL,
    ERROR_VALUE_NOT_FINITE,
    ExactStore,
    KeyStore,
    LayerStore,
    MethodStore,
    RecentStore,
    ValueStore,
)


class BlockStorage:
    """Tensors for ``num_blocks`` blocks in every layer of a group, their spill chunks, what rows keep beside them, and error words.

    Args:
        layout: shapes of a block.
        num_blocks: blocks, N.
        max_sequences: rows: sequences that may keep tokens beside their blocks.
        device: where everything lives.

    Attributes:
        tensors: [L, ...] each, by name.
        layers: what the kernels see of each layer.
        spill_top: height of each layer's stack of free spill chunks, int32 [L, 1].
        error: kind and channel of each layer's first error, int64 [L, 2].
    """

    def __init__(
        self, layout: BlockLayout, num_blocks: int, max_sequences: int, device: torch.device
    ) -> None:
        self.layout, self.num_chunks = layout, layout.num_chunks(num_blocks)
        L = layout.num_layers
        shapes = {
            name: ((num_blocks, *shape), dtype) for name, (shape, dtype) in layout.block_shapes().items()
        }
        for name, (shape, dtype) in layout.chunk_shapes().items():
            shapes[name] = ((self.num_chunks, *shape), dtype)
        for name, (shape, dtype) in layout.row_shapes().items():
            shapes[name] = ((max_sequences, *shape), dtype)
        # Zeros, not empty: a slot never written must still index inside its block.
        self.tensors: dict[str, Tensor] = {
            name: torch.zeros(L, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in shapes.items()
        }
        self.spill_top = torch.full((L, 1), self.num_chunks, dtype=torch.int32, device=device)
        self.error = torch.zeros(L, 2, dtype=torch.int64, device=device)
        self._free_all_chunks()
        self.layers = [self._layer(index) for index in range(L)]

    def _layer(self, index: int) -> LayerStore:
        t = {name: tensor[index] for name, tensor in self.tensors.items()}
        keys: KeyStore | ExactStore | MethodStore
        values: ValueStore | ExactStore | MethodStore
        if self.layout.spec.is_exact:
            keys, values = ExactStore(t["keys"]), ExactStore(t["values"])
        elif not self.layout.chains_outliers:
            keys = values = MethodStore({name: t[name] for name in self.layout.block_shapes()})
        else:
            keys = KeyStore(
                codes=t["key_codes"],
                outlier_count=t["key_outlier_count"],
                outlier_index=t["key_outlier_index"],
                outlier_value=t["key_outlier_value"],
                spill_head=t["spill_head"],
                spill_next=t["spill_next"],
                spill_index=t["spill_index"],
                spill_value=t["spill_value"],
                spill_free=t["spill_free"],
                spill_top=self.spill_top[index],
            )
            values = ValueStore(
                codes=t["value_codes"],
                zero=t["value_zero"],
                scale=t["value_scale"],
                outlier_index=t["value_outlier_index"],
                outlier_value=t["value_outlier_value"],
                outlier_end=t["value_outlier_end"],
            )
        recent = None
        if "recent_keys" in t:
            recent = RecentStore(t["recent_keys"], t["recent_values"], t["recent_position"])
        extra = {name: t[name] for name, _, _ in self.layout.extra}
        return LayerStore(keys, values, t["sink_keys"], t["sink_values"], self.error[index], recent, extra)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor."""
        everything = [*self.tensors.values(), self.spill_top, self.error]
        return sum(t.untyped_storage().nbytes() for t in everything)

    @property
    def free_chunk_bytes(self) -> int:
        """Bytes of spill chunks that no block uses (waits for the device)."""
        return int(self.spill_top.sum()) * self.layout.chunk_bytes

    def chunks_of(self, blocks: Sequence[int]) -> Tensor:
        """Spill chunks behind some blocks, int64 [L]; a block named twice counts twice."""
        if not (self.layout.chains_outliers and blocks):
            return self.spill_top.new_zeros(self.layout.num_layers, dtype=torch.int64)
        return spill_chains.count(self.tensors, blocks)

    def copy_block(self, source: int, target: int) -> bool:
        """Copy a block with chains of its own; returns False, with nothing taken, when spill chunks run out."""
        for name in self.layout.block_shapes():
            self.tensors[name][:, target] = self.tensors[name][:, source]
        if self.layout.chains_outliers and not spill_chains.copy(
            self.tensors, self.spill_top, source, target
        ):
            self.tensors["key_outlier_count"][:, target] = 0
            return False
        return True

    def copy_row(self, source: int, target: int) -> None:
        """Copy what a sequence keeps beside its blocks (sinks, recent tokens) from one row of the table to another."""
        for name in self.layout.row_shapes():
            self.tensors[name][:, target] = self.tensors[name][:, source]

    def crop_block(self, block: int, tokens: int) -> None:
        """Forget the outliers of slots from ``tokens`` on; codes need no forgetting."""
        if self.layout.chains_outliers:
            spill_chains.crop(self.tensors, self.spill_top, block, tokens, self.layout.head_dim)

    def release_blocks(self, blocks: list[int]) -> None:
        """Give back the spill chunks of blocks that nobody holds any more."""
        if blocks and self.layout.chains_outliers:
            spill_chains.release(self.tensors, self.spill_top, blocks)

    def release_all_blocks(self) -> None:
        """:meth:`release_blocks` of every block, without asking the device what they hold."""
        if self.layout.chains_outliers:
            self.tensors["key_outlier_count"].zero_()
            self._free_all_chunks()

    def _free_all_chunks(self) -> None:
        if self.num_chunks:
            # Popped from the top: the lowest ids go first.
            stack = torch.arange(self.num_chunks - 1, -1, -1, dtype=torch.int32, device=self.spill_top.device)
            self.tensors["spill_free"].copy_(stack.expand_as(self.tensors["spill_free"]))
            self.spill_top.fill_(self.num_chunks)

    def first_error(self, layer_numbers: Sequence[int]) -> Exception | None:
        """Read the error words, the one place that does, and say what the first one found means.

        Args:
            layer_numbers: what to call the layers.
        """
        for layer, (kind, channel) in zip(layer_numbers, self.error.tolist(), strict=True):
            if kind:
                return _as_exception(layer, kind, channel, self.layout)
        return None


def _as_exception(layer: int, kind: int, channel: int, layout: BlockLayout) -> Exception:
    if kind == ERROR_OUT_OF_SPILL:
        return PoolExhausted(
            f"layer {layer} has more key outliers than its spill chunks hold; raise cache.spill_headroom "
            f"(now {layout.spill_headroom}) or recalibrate on text like this"
        )
    side = "value" if kind == ERROR_VALUE_NOT_FINITE else "key"
    return NonFiniteActivations(
        f"{side} activations must be finite and fit 16 bits, got NaN, infinity or more than the stored type holds in "
        f"layer {layer}, channel {channel} (head {channel // layout.head_dim}); check the model's dtype"
    )
