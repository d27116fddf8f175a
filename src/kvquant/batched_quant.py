"""Quantize the keys and values of one attention layer for a whole ragged batch at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from kvquant import nuq
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.kernels import (
    ERROR_KEY_NOT_FINITE,
    ERROR_VALUE_NOT_FINITE,
    LayerConstants,
    LayerStore,
    StoredLayer,
    get_backend,
)
from kvquant.ragged import RaggedStep, cumulative_lengths, lengths_from_cu_seqlens
from kvquant.spec import QuantSpec


@dataclasses.dataclass
class PackedKV:
    """A ragged batch of one layer in packed form: an exactly sized pool and the rows of its sequences."""

    pool: BlockPool
    rows: list[int]
    lengths: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, ranges, outliers, sinks, tables and the slack of half-filled blocks and chunks."""
        return self.pool.bytes_held

    @property
    def effective_bits(self) -> float:
        """8 * bytes held / elements of K and V."""
        layout = self.pool.layout
        return 8 * self.nbytes / (2 * sum(self.lengths) * layout.num_kv_heads * layout.head_dim)

    @property
    def key_outlier_fraction(self) -> float:
        """Fraction of key elements that were kept exactly."""
        if self.pool.layout.spec.is_exact:
            return 0.0
        kept = sum(
            int(self.pool.tensors["key_outlier_count"][:, block].sum())
            for row in self.rows
            for block in self.pool.blocks_of(row)
        )
        return kept / (sum(self.lengths) * self.pool.layout.num_kv_heads * self.pool.layout.head_dim)


class BatchedKVQuantizer:
    """The quantizer of one layer: a spec and what calibration fixed.

    Args:
        spec: the settings.
        num_kv_heads: H.
        head_dim: D.
        constants: thresholds and codebooks; None for ``method="none"``.
    """

    def __init__(
        self, spec: QuantSpec, num_kv_heads: int, head_dim: int, constants: LayerConstants | None
    ) -> None:
        if (constants is None) != spec.is_exact:
            raise ValueError(
                f"quant.method {spec.method!r} needs calibrated constants; use BatchedKVQuantizer.calibrate"
            )
        self.spec, self.num_kv_heads, self.head_dim, self.constants = spec, num_kv_heads, head_dim, constants

    @classmethod
    def calibrate(
        cls,
        spec: QuantSpec,
        keys: Tensor,
        values: Tensor,
        *,
        key_fisher: Tensor | None = None,
        value_fisher: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> BatchedKVQuantizer:
        """Fix thresholds and fit codebooks on calibration tokens of one layer.

        Args:
            spec: the settings.
            keys: pre-RoPE keys, [T, H, D].
            values: [T, H, D].
            key_fisher: squared gradient of the loss with respect to each key element, [T, H, D]; None: all 1.
            value_fisher: the same for values.
            positions: position of each token in its sequence, [T]; tokens below ``spec.sink_tokens`` are left
                out. None: no token is a sink.

        Raises:
            ValueError: shapes disagree, or NaN or infinity among the elements.
        """
        _, H, D = keys.shape
        if values.shape != keys.shape:
            raise ValueError(
                f"keys and values must have one shape, got {list(keys.shape)} and {list(values.shape)}"
            )
        if spec.is_exact:
            return cls(spec, H, D, None)
        C = H * D
        parts = [keys, values, key_fisher, value_fisher]
        if positions is not None and spec.sink_tokens:
            kept = positions >= spec.sink_tokens
            parts = [None if p is None else p[kept] for p in parts]
        k, v, kf, vf = (None if p is None else p.reshape(-1, C) for p in parts)
        assert k is not None and v is not None
        if spec.fisher_weight == "none":
            kf = vf = None
        scale2 = spec.fisher_weight == "fisher_scale2"

        lower, upper = nuq.channel_thresholds(k, spec.outlier_fraction)
        zero, scale = nuq.zero_and_scale(lower, upper)
        group = spec.value_group_channels(C)
        per_end = nuq.value_outlier_count(spec.outlier_fraction, group)
        rows = v.reshape(-1, group)
        row_weights = None if vf is None else vf.reshape(-1, group)
        assert spec.key_bits is not None and spec.value_bits is not None  # set by QuantSpec itself
        key_codebook, key_centroids = _codebook(
            spec, spec.key_bits, lambda: nuq.key_histogram(k, lower, upper, kf, times_scale2=scale2)
        )
        value_codebook, value_centroids = _codebook(
            spec,
            spec.value_bits,
            lambda: nuq.value_histogram(rows, per_end, row_weights, times_scale2=scale2),
        )
        if spec.outlier_fraction == 0:
            # Nothing is an outlier: keys beyond the calibrated range clamp to the end centroids.
            lower, upper = torch.full_like(lower, -torch.inf), torch.full_like(upper, torch.inf)
        constants = LayerConstants(
            key_lower=lower.view(H, D),
            key_upper=upper.view(H, D),
            key_zero=zero.view(H, D),
            key_scale=scale.view(H, D),
            key_midpoints=nuq.midpoints(key_codebook),
            key_centroids=key_centroids,
            value_midpoints=nuq.midpoints(value_codebook),
            value_centroids=value_centroids,
        )
        return cls(spec, H, D, constants)

    @classmethod
    def exact(cls, num_kv_heads: int, head_dim: int) -> BatchedKVQuantizer:
        """A quantizer that stores everything as it is (``quant=none``)."""
        return cls(QuantSpec(method="none"), num_kv_heads, head_dim, None)

    def to(self, device: torch.device | str) -> BatchedKVQuantizer:
        """The same quantizer with its constants on another device."""
        moved = None if self.constants is None else LayerConstants(*(t.to(device) for t in self.constants))
        return BatchedKVQuantizer(self.spec, self.num_kv_heads, self.head_dim, moved)

    # ---- into and out of one layer of a pool -----------------------------------------------------------------

    def write(
        self, keys: Tensor, values: Tensor, store: LayerStore, step: RaggedStep, *, backend: str = "auto"
    ) -> None:
        """Quantize the new tokens of a step straight into their block slots.

        Args:
            keys: pre-RoPE keys, [T, H, D].
            values: [T, H, D].
            store: the layer's part of the pool.
            step: where each token goes.
            backend: name of the kernels.
        """
        kernels = get_backend(backend, keys.device.type)
        slots = (step.slot_block, step.slot_offset)
        if self.constants is None:
            for x, side, kind in (
                (keys, store.keys, ERROR_KEY_NOT_FINITE),
                (values, store.values, ERROR_VALUE_NOT_FINITE),
            ):
                kernels.write_exact(x, side, *slots)
                _flag_not_finite(x, kind, store.error)
            return
        skip = None
        if self.spec.sink_tokens and min(step.past) < self.spec.sink_tokens:
            skip = step.positions < self.spec.sink_tokens
            rows, at = step.rows[step.token_sequence[skip]], step.positions[skip]
            store.sink_keys[rows, at] = keys[skip].to(store.sink_keys.dtype)
            store.sink_values[rows, at] = values[skip].to(store.sink_values.dtype)
        args = (self.constants, *slots, skip, store.error)
        kernels.write_keys(keys, store.keys, *args, bits=self.spec.key_bits)
        kernels.write_values(values, store.values, *args, bits=self.spec.value_bits)

    def reader(self, store: LayerStore, *, backend: str = "auto") -> StoredLayer:
        """Return ``read(block_ids [S, P]) -> (keys, values)``, dequantized fp32 tiles [S, H, P*BS, D] each."""
        assert self.spec.key_bits is not None and self.spec.value_bits is not None  # set by QuantSpec itself
        return StoredLayer(
            get_backend(backend, store.error.device.type),
            store.keys,
            store.values,
            self.constants,
            self.spec.key_bits,
            self.spec.value_bits,
            self.head_dim,
        )

    # ---- a batch on its own ----------------------------------------------------------------------------------

    def quantize(
        self,
        keys: Tensor,
        values: Tensor,
        cu_seqlens: Tensor,
        *,
        block_size: int = 64,
        spill_headroom: float = 2.0,
        backend: str = "auto",
    ) -> PackedKV:
        """Quantize a ragged batch into an exactly sized pool.

        Args:
            keys: pre-RoPE keys, [T, H, D].
            values: [T, H, D].
            cu_seqlens: int32 [B + 1].
            block_size: tokens per block.
            spill_headroom: key outliers to provide for, as a multiple of the expected number.
            backend: name of the kernels.

        Raises:
            ValueError: shapes or offsets do not fit the quantizer.
            NonFiniteActivations: NaN, infinity, or more than 16 bits hold, named by channel.
            PoolExhausted: more outliers than ``spill_headroom`` provides for.
        """
        T, H, D = keys.shape
        if (self.num_kv_heads, self.head_dim) != (H, D) or values.shape != keys.shape:
            raise ValueError(
                f"keys and values must be [T, {self.num_kv_heads}, {self.head_dim}], "
                f"got {list(keys.shape)} and {list(values.shape)}"
            )
        lengths = lengths_from_cu_seqlens(cu_seqlens, T)
        layout = BlockLayout(self.spec, 1, H, D, keys.dtype, block_size, spill_headroom)
        per_sequence = [layout.blocks_for(n) for n in lengths]
        pool = BlockPool(
            layout,
            sum(per_sequence),
            max_sequences=len(lengths),
            max_blocks_per_sequence=max(per_sequence),
            device=keys.device,
        )
        rows = [pool.add_sequence() for _ in lengths]
        step = pool.reserve(rows, lengths)
        self.write(keys, values, pool.layers[0], step, backend=backend)
        pool.commit()
        return PackedKV(pool, rows, lengths)

    def dequantize(self, packed: PackedKV, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """Return the keys and values [T, H, D] that attention would see, in the dtype they came in."""
        pool, store = packed.pool, packed.pool.layers[0]
        T, dtype = sum(packed.lengths), pool.layout.dtype
        shape = (T, self.num_kv_heads, self.head_dim)
        keys, values = (torch.empty(shape, dtype=dtype, device=pool.device) for _ in range(2))
        read = self.reader(store, backend=backend)
        for row, start, n in zip(
            packed.rows, cumulative_lengths(packed.lengths), packed.lengths, strict=False
        ):
            ids = torch.tensor([pool.blocks_of(row)], device=pool.device)
            for out, tile, sink in zip(
                (keys, values), read(ids), (store.sink_keys, store.sink_values), strict=True
            ):
                out[start : start + n] = tile[0, :, :n].transpose(0, 1).to(dtype)
                count = min(sink.shape[1], n)
                out[start : start + count] = sink[row, :count]
        return keys, values


def _codebook(
    spec: QuantSpec, bits: int, histogram: Callable[[], nuq.WeightedHistogram]
) -> tuple[Tensor, Tensor]:
    """Return the codebook that decides codes, and the centroids that codes decode to (Q-Norm applied)."""
    if spec.method == "nuq" or spec.qnorm:
        counted = histogram()
    if spec.method == "nuq":
        codebook = nuq.fit_codebook(counted, bits)
    else:
        codebook = nuq.uniform_codebook(bits) if spec.method == "uniform" else nuq.normal_float_codebook(bits)
    if not spec.qnorm:
        return codebook, codebook
    gain, offset = nuq.qnorm_affine(counted, codebook)
    return codebook, codebook * gain + offset


def _flag_not_finite(x: Tensor, kind: int, error: Tensor) -> None:
    """Note the first channel of [T, H, D] with NaN or infinity in an error word, without asking the device."""
    # One pass; in fp32, because many finite fp16 numbers may add up to infinity.
    bad = ~torch.isfinite(x.flatten(1).sum(dim=0, dtype=torch.float32))
    channel = bad.to(torch.uint8).argmax()
    found = torch.stack([torch.full_like(channel, kind), channel])
    error.copy_(torch.where(bad.any() & (error[0] == 0), found, error))
