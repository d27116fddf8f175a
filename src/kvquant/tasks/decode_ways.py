"""Decode attention over quantized blocks against dequantizing the whole history and attending to that."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.kernels import Rope
from kvquant.measure import Stopwatch
from kvquant.peak_memory import peak_extra_bytes
from kvquant.prefill_quant import PrefillQuantizedAttention, blocks_per_tile

BLOCK_SIZE, ROPE_THETA = 64, 10_000.0


class DecodeWays:
    """One sequence in blocks and a query for its last token.

    Args:
        quantizer: of the layer.
        keys: pre-RoPE, [T, H, D].
        values: [T, H, D].
        backend: name of the kernels.
    """

    def __init__(self, quantizer: BatchedKVQuantizer, keys: Tensor, values: Tensor, backend: str) -> None:
        T, H, D = keys.shape
        device = keys.device
        layout = BlockLayout(quantizer.spec, 1, H, D, keys.dtype, BLOCK_SIZE)
        self._pool = BlockPool(layout, layout.blocks_for(T), max_sequences=1, device=device)
        row, self._store = self._pool.add_sequence(), self._pool.layers[0]
        for part in (slice(0, T - 1), slice(T - 1, T)):
            self._step = self._pool.reserve([row], [len(keys[part])])
            quantizer.write(keys[part], values[part], self._store, self._step, backend=backend)
            self._pool.commit()
        self._attention = PrefillQuantizedAttention(quantizer, BLOCK_SIZE, D**-0.5, backend=backend)
        self._read = quantizer.reader(self._store, backend=backend)
        tile = BLOCK_SIZE * blocks_per_tile(BLOCK_SIZE)
        offset, base = torch.arange(tile), torch.arange(-(-T // tile)) * tile
        self._rope = Rope(*_tables(offset, D, device), *_tables(base, D, device))
        self._cos, self._sin = _tables(torch.arange(T), D, device)
        generator = torch.Generator().manual_seed(0)
        self._query = torch.randn(1, H, D, generator=generator).to(keys)
        self._shape = (T, H, D)

    def over_blocks(self) -> Tensor:
        """Attend over the blocks; [1, H, D]."""
        nothing = self._query.new_empty(0)  # the call's own keys and values matter to exact reads alone
        return self._attention.attend(self._query, nothing, nothing, self._store, self._step, self._rope)

    def dequantize_then_attend(self) -> Tensor:
        """Make the whole history dense in the model's dtype, rotate its keys, attend with torch; [1, H, D]."""
        T, H, D = self._shape
        keys, values = (x[:, :, :T] for x in self._read(self._step.block_table.long()))
        first, second = keys.chunk(2, -1)
        rotated = [first * self._cos - second * self._sin, second * self._cos + first * self._sin]
        dense = torch.cat(rotated, -1).to(self._query.dtype), values.to(self._query.dtype)
        return F.scaled_dot_product_attention(self._query.view(1, H, 1, D), *dense).view(1, H, D)

    def measure(self, repeats: int) -> dict[str, Any]:
        """Medians of both ways taking turns, their difference, and the memory that each takes on the way."""
        ways = {"over_blocks": self.over_blocks, "dequantize_then_attend": self.dequantize_then_attend}
        T, H, D = self._shape
        dense_bytes = 2 * T * H * D * self._query.element_size()
        ours, theirs = (way().float() for way in ways.values())
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                with (watch := Stopwatch(self._query.device)):
                    way()
                seconds[name].append(watch.total_s)
        medians = {name: statistics.median(s) for name, s in seconds.items()}
        peaks = {name: peak_extra_bytes(way, self._query.device) for name, way in ways.items()}
        mine = peaks["over_blocks"]
        return {
            **{f"{name}_s": s for name, s in medians.items()},
            **{f"{name}_peak_extra_bytes": b for name, b in peaks.items()},
            "tokens": T,
            "speedup": medians["dequantize_then_attend"] / medians["over_blocks"],
            "dense_cache_bytes": dense_bytes,
            "peak_percent_of_dense_cache": None if mine is None else 100 * mine / dense_bytes,
            "relative_rms_between": float((ours - theirs).norm() / theirs.norm()),
        }


def _tables(positions: Tensor, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = positions[:, None] * ROPE_THETA ** (-torch.arange(0, head_dim, 2) / head_dim)
    return angle.cos().to(device), angle.sin().to(device)
