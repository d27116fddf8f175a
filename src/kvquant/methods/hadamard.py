"""Keys rotated by a block Hadamard matrix, one scale per token and head, an optimal codebook; values as in nuq.

A rotation spreads a channel's outliers over all channels of its block, so that one symmetric scale serves them all
(QuaRot, arXiv:2404.00456; K-only block rotation, as in SAW-INT4). It is orthogonal: a query rotated likewise has the
same products with the keys, and nothing is rotated back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvquant import nuq
from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import MethodLayout, side_dtype
from kvquant.fitting import CalibrationTokens, fit_constants
from kvquant.kernels import ERROR_KEY_NOT_FINITE, LayerStore, get_backend
from kvquant.methods import _own_store as own
from kvquant.methods.nuq import Method as Nuq
from kvquant.not_finite import flag_not_finite
from kvquant.packing import pack, packed_row_bytes, unpack
from kvquant.ragged import RaggedStep
from kvquant.spec import QuantSpec

# The codebook's [-1, 1] is this many root mean squares of a token's head: beyond lie 6e-5 of a normal distribution.
_REACH = 4.0


def hadamard(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The orthogonal Hadamard matrix of Sylvester's construction, [size, size] fp32; size is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / size**0.5


class Method(BatchedKVQuantizer):
    """Rotates keys at their positions (after RoPE) in blocks of ``options.block`` channels, at most a head's."""

    default_options: ClassVar[Mapping[str, Any]] = {"block": 128}
    keys_after_rope = True
    own_store = True

    @classmethod
    def check(cls, spec: QuantSpec) -> None:
        """A Sylvester matrix has a power of two of rows."""
        super().check(spec)
        block = spec.option("block", 128)
        if not isinstance(block, int) or block < 2 or block & (block - 1):
            raise ValueError(f"quant.options.block must be a power of two, got {block}; try 64")
        if spec.logit_bias:
            raise ValueError("quant.logit_bias must be false with quant=hadamard, got true; try quant=nuq")

    @classmethod
    def fit(cls, spec: QuantSpec, tokens: CalibrationTokens) -> BatchedKVQuantizer:
        """Fit the key codebook to rotated keys, weighted by their head's mean Fisher information."""
        keys, fisher = tokens.keys, tokens.key_fisher
        _, H, D = keys.shape
        base = fit_constants(spec, tokens, Nuq.codebook)
        quantizer = cls(spec, H, D, base)
        # Before RoPE: it turns pairs of channels, which the Hadamard matrix mixes anyway.
        x = quantizer.turn_keys(keys.float())
        scale = _scale(x)
        weight = scale.square()
        if fisher is not None and spec.fisher_weight != "none":
            weight = weight * fisher.float().mean(-1, keepdim=True)
        counted = nuq.WeightedHistogram()
        counted.add(x / scale, weight.expand_as(x))
        codebook = nuq.fit_codebook(counted, spec.widths[0])
        quantizer.constants = own.constants(H, D, codebook, base.value_centroids)._replace(
            value_midpoints=base.value_midpoints
        )
        return quantizer

    def layout(
        self, num_layers: int, dtype: torch.dtype, block_size: int, spill_headroom: float
    ) -> MethodLayout:
        """Codes and a scale per token and head for keys, the nuq family's tensors for values."""
        H, D = self.num_kv_heads, self.head_dim
        layout = MethodLayout(self.spec, num_layers, H, D, dtype, block_size, spill_headroom)
        return own.with_tensors(
            layout,
            {
                "key_codes": ((H, block_size, packed_row_bytes(D, self.spec.widths[0])), torch.uint8),
                "key_scale": ((H, block_size), side_dtype(dtype)),
                **layout.value_shapes(),
            },
        )

    def _rotate(self, x: Tensor) -> Tensor:
        size = min(self.spec.option("block", 128), self.head_dim & -self.head_dim)
        blocks = x.float().unflatten(-1, (-1, size)) @ hadamard(size, x.device)
        return blocks.flatten(-2)

    def turn_keys(self, keys: Tensor) -> Tensor:
        """Rotate keys [T, H, D]."""
        return self._rotate(keys)

    def turn_query(self, query: Tensor) -> Tensor:
        """Rotate a query [T, Hq, D] by the same matrix."""
        return self._rotate(query)

    def write(
        self, keys: Tensor, values: Tensor, store: LayerStore, step: RaggedStep, *, backend: str = "auto"
    ) -> None:
        """Quantize new tokens, rotated already, into their slots."""
        t, c = own.tensors_of(store), self.fitted
        key_bits, value_bits = self.spec.widths
        skip = self.write_sinks(keys, values, store, step)
        slots = (step.slot_block, step.slot_offset)
        flag_not_finite(keys, ERROR_KEY_NOT_FINITE, store.error)
        scale = _scale(keys.float())
        rows, row_scale = keys.float().flatten(0, 1), scale.flatten(0, 1)  # [T * H, D], [T * H, 1]
        codes = nuq.encode(rows, torch.zeros_like(row_scale), row_scale, c.key_midpoints).view_as(keys)
        # The best scale for these codes (least squares) is rarely the one they were chosen with.
        chosen = c.key_centroids[codes.int()]
        best = (keys * chosen).sum(-1) / chosen.square().sum(-1).clamp(min=1e-12)
        t["key_codes"][slots[0], :, slots[1]] = pack(codes, key_bits)
        t["key_scale"][slots[0], :, slots[1]] = best.to(t["key_scale"].dtype)
        kernels = get_backend(backend, keys.device.type)
        kernels.write_values(values, own.value_store(t), c, *slots, skip, store.error, bits=value_bits)

    def reader(self, store: LayerStore, *, backend: str = "auto") -> own.Reader:
        """Return a reader of tiles in the rotated basis."""
        t, c = own.tensors_of(store), self.fitted
        kernels = get_backend(backend, store.error.device.type)
        (key_bits, value_bits), D = self.spec.widths, self.head_dim

        def read(ids: Tensor) -> tuple[Tensor, Tensor]:
            codes = unpack(t["key_codes"][ids], key_bits, D)  # [S, P, H, BS, D]
            keys = c.key_centroids[codes.int()] * t["key_scale"][ids].float()[..., None]
            values = kernels.read_values(own.value_store(t), c, ids, bits=value_bits, head_dim=D)
            return keys.transpose(1, 2).flatten(2, 3), values

        return read


def _scale(x: Tensor) -> Tensor:
    """`_REACH` root mean squares of each token and head, [T, H, 1]."""
    return _REACH * x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
