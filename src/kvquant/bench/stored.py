"""One attention layer's history in blocks, several times over: what operations are measured on.

The copies are the layers of one pool. Each holds other numbers, and operations take them in turn as a model's layers
do, so that none is in a cache when its turn comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.bench.shapes import LayerShape
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.fitting import CalibrationTokens
from kvquant.kernels import KeyStore, LayerStore, Rope, ValueStore, get_backend, run_argument
from kvquant.methods import method_class
from kvquant.prefill_quant import PrefillQuantizedAttention, blocks_per_tile
from kvquant.ragged import RaggedStep
from kvquant.spec import QuantSpec

# Elements of keys written in one call: 512 MiB of bf16.
_PIECE_ELEMENTS = 1 << 28
# A step from one copy's data to the next one's: no multiple of a block, no power of two.
_STRIDE = 389
# Tokens over which a head keeps its spread, and the standard deviation of that spread's logarithm.
_STRETCH, _DRIFT = 512, 0.08


class MadeUpKV:
    """Keys and values of one layer with channels of very different spread and heavy tails, as models have them.

    A head's spread drifts from stretch to stretch, so that outliers cluster as they do in text: of the shipped model's
    (block, head) pairs a quarter have more key outliers than fit the base row, on held-out text after the default
    calibration, and one in a hundred has twice the mean. Independent ones would spill in 6%.

    What is stored (:meth:`take`) is never what calibration sees (:meth:`sample`): other tokens of the same channels.

    Args:
        shape: of the layer.
        tokens: how many different tokens to draw.
        dtype: of the keys and values.
        device: where they are.
        seed: of the draw.
    """

    def __init__(
        self, shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        self.shape, self.tokens = shape, tokens
        self._dtype, self._device, self._seed = dtype, device, seed
        self._sides = [self._draw(side, tokens, seed + side) for side in range(2)]
        self.key_rms = float(self._sides[0][:1024].float().square().mean().sqrt())

    def _draw(self, side: int, tokens: int, seed: int) -> Tensor:
        """``tokens`` tokens of keys (side 0) or values (1); channels have the same spread whatever the seed."""
        C, device = self.shape.channels, self._device
        channels = torch.Generator(device).manual_seed(self._seed + side)
        spread = torch.randn(C, generator=channels, device=device).mul_(0.5).exp_()
        # Far from the channels' own numbers, or a token would be made of them.
        generator = torch.Generator(device).manual_seed(seed + 1000)
        out = torch.empty(tokens, C, dtype=self._dtype, device=device)
        for part in out.split(8192):
            tails = torch.rand(part.shape, generator=generator, device=device).clamp_(min=0.05).rsqrt_()
            drift = torch.randn(
                -(-len(part) // _STRETCH), self.shape.kv_heads, generator=generator, device=device
            )
            drift = drift.mul_(_DRIFT).exp_().repeat_interleave(_STRETCH, 0)[: len(part)]
            drawn = torch.randn(part.shape, generator=generator, device=device).mul_(tails).mul_(spread)
            part.copy_(drawn.view(len(part), self.shape.kv_heads, -1).mul_(drift[..., None]).view_as(part))
        return out.view(tokens, self.shape.kv_heads, self.shape.head_dim)

    def sample(self, count: int) -> CalibrationTokens:
        """``count`` further tokens for calibration, on the CPU."""
        return CalibrationTokens(*(self._draw(side, count, self._seed + 2 + side).cpu() for side in range(2)))

    def take(self, count: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of ``count`` tokens, [count, H, D] each; ``start`` wraps around.

        Raises:
            ValueError: fewer tokens were drawn.
        """
        if count > self.tokens:
            raise ValueError(f"at most {self.tokens} tokens were drawn, got a request for {count}")
        start %= self.tokens - count + 1
        keys, values = (side[start : start + count] for side in self._sides)
        return keys, values

    def query(self, tokens: int, seed: int = 0) -> Tensor:
        """Queries [tokens, Hq, D] whose logits spread over a few nats, as trained heads' do."""
        keys, _ = self.take(1)
        generator = torch.Generator(keys.device).manual_seed(seed)
        drawn = torch.randn(
            tokens, self.shape.query_heads, self.shape.head_dim, generator=generator, device=keys.device
        )
        return (drawn * (2.0 / self.key_rms)).to(keys.dtype)


def quantizers_of(
    spec: QuantSpec, widths: Iterable[int], tokens: CalibrationTokens
) -> dict[int, BatchedKVQuantizer]:
    """A quantizer for each width of codes, calibrated on the same tokens; they are counted once.

    Args:
        spec: everything else.
        widths: bits of keys and values alike.
        tokens: what calibration sees.
    """
    method = method_class(spec.method)
    specs = {n: dataclasses.replace(spec, bits=n, key_bits=n, value_bits=n) for n in widths}
    return {bits: method.fit(one, tokens) for bits, one in specs.items()}


class StoredHistory:
    """Sequences in blocks.

    Args:
        quantizer: of the layer, on the device.
        shape: of the layer.
        lengths: tokens of each sequence, its newest included.
        copies: layers of the pool.
        room: further tokens that each sequence may take.
        data: what is stored.
        backend: name of the kernels.
        block_size: tokens per block.
        spill_headroom: see ``BlockLayout``.
    """

    def __init__(
        self,
        quantizer: BatchedKVQuantizer,
        shape: LayerShape,
        lengths: Sequence[int],
        *,
        copies: int,
        room: int,
        data: MadeUpKV,
        backend: str,
        block_size: int,
        spill_headroom: float,
    ) -> None:
        keys, _ = data.take(1)
        self.shape, self.lengths, self.copies, self.data = shape, list(lengths), copies, data
        self.quantizer, self.backend, self.block_size = quantizer, backend, block_size
        self.device, self.dtype = keys.device, keys.dtype
        self.kernels = get_backend(backend, self.device.type)
        self.layout = layout_of(
            quantizer, shape, copies=copies, dtype=self.dtype, block_size=block_size, headroom=spill_headroom
        )
        per_sequence = [self.layout.blocks_for(n + room) for n in lengths]
        self.pool = BlockPool(
            self.layout,
            sum(per_sequence),
            max_sequences=len(lengths),
            max_blocks_per_sequence=max(per_sequence),
            device=self.device,
        )
        self.rows = [self.pool.add_sequence() for _ in lengths]
        self.rope = rope_tables(shape, block_size, max(lengths) + room, self.device)

    def store(self, copy: int) -> LayerStore:
        """The layer's part of the pool."""
        return self.pool.layers[copy]

    def write(self, step: RaggedStep) -> None:
        """Store made-up tokens of a step in every copy."""
        total = sum(step.lengths)
        for copy in range(self.copies):
            keys, values = self.data.take(total, self._start(copy, step))
            self.quantizer.write(keys, values, self.store(copy), step, backend=self.backend)

    def own(self, copy: int, step: RaggedStep) -> tuple[Tensor, Tensor]:
        """The keys and values that :meth:`write` stored for a step."""
        return self.data.take(sum(step.lengths), self._start(copy, step))

    def _start(self, copy: int, step: RaggedStep) -> int:
        return (copy + sum(step.past)) * _STRIDE

    def fill(self) -> None:
        """Store all but the last token of each sequence."""
        piece = max(1, min(self.data.tokens, _PIECE_ELEMENTS // self.shape.channels) // len(self.rows))
        while True:
            left = [
                (row, n - 1 - self.pool.length(row))
                for row, n in zip(self.rows, self.lengths, strict=True)
                if n - 1 > self.pool.length(row)
            ]
            if not left:
                return
            step = self.pool.reserve([row for row, _ in left], [min(piece, n) for _, n in left])
            self.write(step)
            self.pool.commit()

    def attention(self, prefill_reads: str) -> PrefillQuantizedAttention:
        """Attention over the blocks, as a model calls it."""
        scale = self.shape.head_dim**-0.5
        return PrefillQuantizedAttention(
            self.quantizer, self.block_size, scale, prefill_reads=prefill_reads, backend=self.backend
        )

    def write_arguments(self, copy: int, step: RaggedStep) -> tuple[tuple[object, ...], dict[str, Tensor]]:
        """What ``write_keys`` and ``write_values`` take after the store, bits apart."""
        arguments = (
            self.quantizer.constants,
            step.slot_block,
            step.slot_offset,
            None,
            self.store(copy).error,
        )
        return arguments, run_argument(self.kernels, step)

    def forget_outliers(self, copy: int) -> None:
        """Put a copy of the (empty) pool back as it was before keys were written."""
        keys = self.store(copy).keys
        assert isinstance(keys, KeyStore)
        keys.outlier_count.zero_()
        keys.spill_top.fill_(self.pool.num_chunks)

    def read_bytes(self, step: RaggedStep) -> int:
        """Bytes that attention over a step's sequences must read from one copy: all that is stored of their tokens.

        Whole rows of codes, ranges and outliers of stored tokens; slack of half-filled blocks is not read.
        """
        store = self.store(0)
        keys, values = store.keys, store.values
        assert isinstance(keys, KeyStore) and isinstance(values, ValueStore)
        _, H, _, key_row = keys.codes.shape
        tokens = sum(step.kv_lengths)
        blocks = sum(self.layout.blocks_for(n) for n in step.kv_lengths)
        ids = torch.cat(
            [step.block_table[i, : self.layout.blocks_for(n)].long() for i, n in enumerate(step.kv_lengths)]
        )
        entry = 2 + values.outlier_value.element_size()
        key_outliers = int(keys.outlier_count[ids].sum()) * entry if keys.outlier_index.shape[-1] else 0
        ranges = 2 * values.zero.shape[-1] * values.zero.element_size()
        per_token = H * (key_row + values.codes.shape[-1]) + ranges + values.outlier_index.shape[-1] * entry
        per_block = 4 + H * (4 + 4 + 4)  # table; counts, heads of chains, ends of value outliers
        return tokens * per_token + key_outliers + blocks * per_block


def kept_exactly(pool: BlockPool) -> dict[str, float]:
    """What a pool's layers keep of stored tokens as outliers, and how their blocks take it.

    ``key_outlier_fraction`` is what calibration's thresholds let through, of all key elements; ``spilled_blocks`` the
    share of (full block, head) pairs with more than their base row of ``key_outlier_base`` holds. Nothing where keys
    are stored as they are.
    """
    if not pool.layout.chains_outliers:
        return {}
    BS, channels = pool.layout.block_size, pool.layout.num_kv_heads * pool.layout.head_dim
    held = [block for row in pool.sequences for block in pool.blocks_of(row)]
    full = [block for row in pool.sequences for block in pool.blocks_of(row)[: pool.length(row) // BS]]
    counts, base = pool.tensors["key_outlier_count"], pool.layout.key_outlier_base
    stored = sum(map(pool.length, pool.sequences)) * pool.layout.num_layers * channels
    return {
        "key_outlier_fraction": int(counts[:, held].sum()) / stored,
        "value_outlier_fraction": pool.layout.value_outliers / channels,
        "key_outliers_per_block": float(counts[:, full].float().mean()) if full else 0.0,
        "key_outlier_base": base,
        "spilled_blocks": float((counts[:, full] > base).float().mean()) if full else 0.0,
    }


def layout_of(
    quantizer: BatchedKVQuantizer,
    shape: LayerShape,
    *,
    copies: int,
    dtype: torch.dtype,
    block_size: int,
    headroom: float,
) -> BlockLayout:
    """The blocks of ``copies`` layers."""
    return BlockLayout(quantizer.spec, copies, shape.kv_heads, shape.head_dim, dtype, block_size, headroom)


def rope_tables(shape: LayerShape, block_size: int, tokens: int, device: torch.device) -> Rope:
    """Rotary tables for tiles of ``blocks_per_tile`` blocks up to ``tokens`` tokens."""
    tile = block_size * blocks_per_tile(block_size)
    bases = torch.arange(-(-tokens // tile), device=device) * tile
    return Rope(*angles(shape, torch.arange(tile, device=device)), *angles(shape, bases))


def angles(shape: LayerShape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [T], fp32 [T, D/2] each."""
    D = shape.head_dim
    frequency = shape.rope_theta ** (-torch.arange(0, D, 2, device=positions.device, dtype=torch.float64) / D)
    angle = positions[:, None] * frequency
    return angle.cos().float(), angle.sin().float()
