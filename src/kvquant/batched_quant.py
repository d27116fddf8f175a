"""Quantize the keys and values of one attention layer for a whole ragged batch at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvquant import nuq
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.fitting import CalibrationTokens, fit_constants, key_noise
from kvquant.kernels import (
    ERROR_KEY_NOT_FINITE,
    ERROR_VALUE_NOT_FINITE,
    LayerConstants,
    LayerStore,
    StoredLayer,
    get_backend,
    run_argument,
)
from kvquant.methods import method_class
from kvquant.packed_kv import PackedKV
from kvquant.ragged import RaggedStep, cumulative_lengths, lengths_from_cu_seqlens
from kvquant.sinks import sinks_of_layer
from kvquant.spec import QuantSpec


class BatchedKVQuantizer:
    """The quantizer of one layer: a spec and what calibration fixed.

    This class holds the nuq family (a codebook, key ranges per channel, value ranges per token, outliers) and exact
    storage; each file of ``kvquant.methods`` derives from it and overrides what it does otherwise.

    Args:
        spec: the settings.
        num_kv_heads: H.
        head_dim: D.
        constants: thresholds and codebooks; None for ``method="none"``.

    Attributes:
        default_options: the method's own settings, ``quant.options.<name>``, with the values they have by default.
        keys_after_rope: whether keys are stored rotated to their positions instead of being rotated when read.
        own_store: whether blocks hold other tensors than the nuq family's, which only PyTorch kernels read.
        outside: whether another library keeps the cache, so that there are no blocks at all.
        calibrated: whether something is fitted on calibration text.
        key_noise: variance that quantization adds to each key channel, [H, D] fp32; for ``spec.logit_bias``.
    """

    default_options: ClassVar[Mapping[str, Any]] = {}
    keys_after_rope: ClassVar[bool] = False
    own_store: ClassVar[bool] = False
    outside: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True

    def __init__(
        self, spec: QuantSpec, num_kv_heads: int, head_dim: int, constants: LayerConstants | None
    ) -> None:
        if (constants is None) != spec.is_exact and not self.own_store:
            raise ValueError(
                f"quant.method {spec.method!r} needs calibrated constants; use BatchedKVQuantizer.calibrate"
            )
        self.spec, self.num_kv_heads, self.head_dim, self.constants = spec, num_kv_heads, head_dim, constants
        self.key_noise: Tensor | None = None

    @property
    def fitted(self) -> LayerConstants:
        """What calibration fixed, of a method that quantizes."""
        assert self.constants is not None
        return self.constants

    @classmethod
    def uncalibrated(cls, spec: QuantSpec, num_kv_heads: int, head_dim: int) -> BatchedKVQuantizer:
        """The quantizer of a method that fits nothing."""
        return cls(spec, num_kv_heads, head_dim, None)

    @classmethod
    def check(cls, spec: QuantSpec) -> None:
        """Refuse settings that the method does not have.

        Raises:
            ValueError: names the setting, its value and a fix.
        """
        unknown = sorted(set(dict(spec.options)) - set(cls.default_options))
        if unknown:
            known = ", ".join(cls.default_options) or "none"
            raise ValueError(
                f"quant.options of quant={spec.method} must be among {known}, got {unknown[0]}; leave it out"
            )

    @classmethod
    def codebook(cls, spec: QuantSpec, bits: int, histogram: Callable[[], nuq.WeightedHistogram]) -> Tensor:
        """The centroids of one layer's keys or values, [2**bits], fp32, ascending.

        Args:
            spec: the settings.
            bits: width of a code.
            histogram: counts the normalized inliers of calibration, for methods that look at them.
        """
        raise NotImplementedError

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
        attention_mass: Tensor | None = None,
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
            attention_mass: what the first of these tokens draw, for ``spec.sink_rule="attention_mass"``
                (:func:`kvquant.models.attention_mass.attention_mass`), [at most T].

        Raises:
            ValueError: shapes disagree, NaN or infinity among the elements, or ``attention_mass`` is missing.
        """
        if cls is BatchedKVQuantizer:
            cls = method_class(spec.method)
        cls.check(spec)
        if values.shape != keys.shape:
            raise ValueError(
                f"keys and values must have one shape, got {list(keys.shape)} and {list(values.shape)}"
            )
        spec = dataclasses.replace(spec, sink_tokens=sinks_of_layer(spec, keys, positions, attention_mass))
        if not cls.calibrated:
            return cls.uncalibrated(spec, *keys.shape[1:])
        tokens = CalibrationTokens(keys, values, key_fisher, value_fisher)
        if positions is not None and spec.sink_tokens:
            tokens = tokens.chosen(positions >= spec.sink_tokens)
        return cls.fit(spec, tokens)

    @classmethod
    def fit(cls, spec: QuantSpec, tokens: CalibrationTokens) -> BatchedKVQuantizer:
        """:meth:`calibrate` once shapes are checked and sink tokens are left out; what a method overrides."""
        constants = fit_constants(spec, tokens, cls.codebook)
        _, H, D = tokens.keys.shape
        quantizer = cls(spec, H, D, constants)
        if spec.logit_bias:
            quantizer.key_noise = key_noise(tokens.keys, constants)
        return quantizer

    @classmethod
    def exact(cls, num_kv_heads: int, head_dim: int) -> BatchedKVQuantizer:
        """A quantizer that stores everything as it is (``quant=none``)."""
        return cls(QuantSpec(method="none"), num_kv_heads, head_dim, None)

    def state(self) -> dict[str, Tensor]:
        """Everything that calibration fixed, by name; :meth:`from_state` takes it back."""
        tensors = {} if self.constants is None else dict(self.constants._asdict())
        if self.key_noise is not None:
            tensors["key_noise"] = self.key_noise
        # The layer's own number, which sink_rule may have lowered.
        return {**tensors, "sink_tokens": torch.tensor(self.spec.sink_tokens)}

    @property
    def constants_bytes(self) -> int:
        """Bytes of what calibration fixed: thresholds and codebooks, held once however much is cached."""
        tensors = (tensor for name, tensor in self.state().items() if name != "sink_tokens")
        # Fields that a method leaves empty share one tensor.
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())

    @classmethod
    def from_state(
        cls, spec: QuantSpec, num_kv_heads: int, head_dim: int, tensors: Mapping[str, Tensor]
    ) -> BatchedKVQuantizer:
        """Rebuild a quantizer from what :meth:`state` returned."""
        spec = dataclasses.replace(spec, sink_tokens=int(tensors["sink_tokens"]))
        constants = None
        if "key_zero" in tensors:
            constants = LayerConstants(*(tensors[name] for name in LayerConstants._fields))
        quantizer = cls(spec, num_kv_heads, head_dim, constants)
        quantizer.key_noise = tensors.get("key_noise")
        return quantizer

    def to(self, device: torch.device | str) -> BatchedKVQuantizer:
        """The same quantizer with its constants on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.state().items()}
        return type(self).from_state(self.spec, self.num_kv_heads, self.head_dim, moved)

    def layout(
        self, num_layers: int, dtype: torch.dtype, block_size: int, spill_headroom: float
    ) -> BlockLayout:
        """The blocks of ``num_layers`` layers that are stored like this one."""
        return BlockLayout(
            self.spec, num_layers, self.num_kv_heads, self.head_dim, dtype, block_size, spill_headroom
        )

    def turn_keys(self, keys: Tensor) -> Tensor:
        """Bring keys [T, H, D] into the basis in which they are stored."""
        return keys

    def turn_query(self, query: Tensor) -> Tensor:
        """Bring a query [T, Hq, D], rotated at its position, into the basis of the stored keys."""
        return query

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
                kernels.write_exact(x, side, *slots, kind, store.error)
            return
        skip = self.write_sinks(keys, values, store, step)
        args = (self.constants, *slots, skip, store.error)
        runs = run_argument(kernels, step)
        kernels.write_keys(keys, store.keys, *args, bits=self.spec.key_bits, **runs)
        kernels.write_values(values, store.values, *args, bits=self.spec.value_bits, **runs)

    def write_sinks(self, keys: Tensor, values: Tensor, store: LayerStore, step: RaggedStep) -> Tensor | None:
        """Keep sink tokens as they are; returns which tokens are sinks, bool [T], or None."""
        if not self.spec.sink_tokens or min(step.past) >= self.spec.sink_tokens:
            return None
        sinks = step.first_tokens(self.spec.sink_tokens)
        rows, at = step.rows[step.token_sequence[sinks]], step.positions[sinks]
        store.sink_keys[rows, at] = keys[sinks].to(store.sink_keys.dtype)
        store.sink_values[rows, at] = values[sinks].to(store.sink_values.dtype)
        return step.positions < self.spec.sink_tokens

    def keep_recent(self, keys: Tensor, values: Tensor, store: LayerStore, step: RaggedStep) -> None:
        """Keep the last tokens of each sequence as they are, once the call's queries have read older ones."""
        if store.recent is None:
            return
        R = store.recent.position.shape[1]
        end = torch.tensor(step.kv_lengths, device=keys.device)[step.token_sequence]
        # One writer per place: what a later token of this call would overwrite is not written at all.
        kept = step.positions >= end - R
        rows, position = step.rows[step.token_sequence[kept]], step.positions[kept]
        store.recent.keys[rows, position % R] = keys[kept].to(store.recent.keys.dtype)
        store.recent.values[rows, position % R] = values[kept].to(store.recent.values.dtype)
        store.recent.position[rows, position % R] = position.to(torch.int32)

    def recent_start(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """First key and first value that a query at each position [T] reads exactly (its own token counts)."""
        first = positions + 1 - self.spec.recent_tokens
        return first, first

    def reader(
        self, store: LayerStore, *, backend: str = "auto"
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Return ``read(block_ids [S, P]) -> (keys, values)``, dequantized fp32 tiles [S, H, P*BS, D] each."""
        return StoredLayer(
            get_backend(backend, store.error.device.type),
            store.keys,
            store.values,
            self.constants,
            *self.spec.widths,
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
        layout = self.layout(1, keys.dtype, block_size, spill_headroom)
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
