"""nuq with outliers at half their bytes: an 8-bit value and an 8-bit index each, always as many per token.

Outliers are rounded to 255 levels of the range that calibration saw, in units of the inliers' range: far finer than
what a code resolves, and beyond that range they clamp. Keys keep those furthest from their channel's range, as many in
every token and group of at most 256 channels, so that they need neither counts nor offsets nor chains, as values do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvquant import nuq
from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import MethodLayout, side_dtype
from kvquant.fitting import CalibrationTokens
from kvquant.kernels import ERROR_KEY_NOT_FINITE, ERROR_VALUE_NOT_FINITE, LayerStore
from kvquant.methods import _own_store as own
from kvquant.methods.nuq import Method as Nuq
from kvquant.not_finite import flag_not_finite
from kvquant.packing import pack, packed_row_bytes, unpack
from kvquant.ragged import RaggedStep
from kvquant.spec import QuantSpec

_LEVELS = 127
_MOST_CHANNELS = 256  # what eight bits index


class Method(Nuq):
    """Codes, ranges and codebooks are nuq's.

    Attributes:
        reach: furthest outlier that int8 can say, of keys and of values, in half widths of the inliers' range, [2].
    """

    own_store = True
    reach: Tensor

    @classmethod
    def check(cls, spec: QuantSpec) -> None:
        """Something must be an outlier, and Q-Norm or a bias would need another fit."""
        super().check(spec)
        if not spec.outlier_fraction or not spec.value_outliers:
            raise ValueError(
                "quant.outlier_fraction must be above 0 with quant=nuq_int8, which is about outliers, got "
                f"{min(spec.outlier_fraction, spec.value_outliers)}; try quant=nuq"
            )
        if spec.logit_bias:
            raise ValueError("quant.logit_bias must be false with quant=nuq_int8, got true; try quant=nuq")

    @classmethod
    def fit(cls, spec: QuantSpec, tokens: CalibrationTokens) -> BatchedKVQuantizer:
        """Fit nuq, then see how far its outliers lie."""
        quantizer = super().fit(spec, tokens)
        assert isinstance(quantizer, cls)
        c = quantizer.fitted
        x = (tokens.keys.float() - c.key_zero) / c.key_scale.clamp(min=1e-12)
        rows, per_end = quantizer._value_rows(tokens.values)
        _, zero, scale = _ranges(rows, per_end)
        y = (rows - zero) / scale.clamp(min=1e-12)
        # The last tenth of a percent may clamp: it would cost all others their resolution.
        quantizer.reach = torch.stack([_high(x), _high(y)])
        return quantizer

    def state(self) -> dict[str, Tensor]:
        """nuq's, and the reach."""
        return {**super().state(), "reach": self.reach}

    @classmethod
    def from_state(
        cls, spec: QuantSpec, num_kv_heads: int, head_dim: int, tensors: Mapping[str, Tensor]
    ) -> BatchedKVQuantizer:
        """Rebuild a quantizer from what :meth:`state` returned."""
        quantizer = super().from_state(spec, num_kv_heads, head_dim, tensors)
        assert isinstance(quantizer, cls)
        quantizer.reach = tensors["reach"]
        return quantizer

    @property
    def key_group(self) -> int:
        """Channels among which a token's key outliers are chosen: whole heads, at most 256."""
        heads = max(
            h
            for h in range(1, self.num_kv_heads + 1)
            if self.num_kv_heads % h == 0 and h * self.head_dim <= _MOST_CHANNELS
        )
        return heads * self.head_dim

    @property
    def key_outliers(self) -> int:
        """Outliers of one token in one group."""
        return max(1, round(self.spec.outlier_fraction * self.key_group))

    def layout(
        self, num_layers: int, dtype: torch.dtype, block_size: int, spill_headroom: float
    ) -> MethodLayout:
        """nuq's codes and ranges, and two bytes an outlier."""
        H, D, BS, side = self.num_kv_heads, self.head_dim, block_size, side_dtype(dtype)
        group, VG = self.spec.value_group_channels(H * D), self.spec.value_groups
        if group > _MOST_CHANNELS or D > _MOST_CHANNELS:
            groups = H * D // _MOST_CHANNELS
            raise ValueError(
                f"quant.value_groups must leave groups of at most {_MOST_CHANNELS} channels with quant=nuq_int8, got "
                f"{group}; try quant.value_groups={groups}"
            )
        key_bits, value_bits = self.spec.widths
        keys = H * D // self.key_group * self.key_outliers
        values = 2 * nuq.value_outlier_count(self.spec.value_outliers, group) * VG
        return own.with_tensors(
            MethodLayout(self.spec, num_layers, H, D, dtype, block_size, spill_headroom),
            {
                "key_codes": ((H, BS, packed_row_bytes(D, key_bits)), torch.uint8),
                "key_outlier_index": ((BS, keys), torch.uint8),
                "key_outlier_value": ((BS, keys), torch.int8),
                "value_codes": ((H, BS, packed_row_bytes(D, value_bits)), torch.uint8),
                "value_zero": ((BS, VG), side),
                "value_scale": ((BS, VG), side),
                "value_outlier_index": ((BS, values), torch.uint8),
                "value_outlier_value": ((BS, values), torch.int8),
            },
        )

    def _value_rows(self, values: Tensor) -> tuple[Tensor, int]:
        """Values by group, [T * VG, channels], and outliers at each end."""
        group = self.spec.value_group_channels(self.num_kv_heads * self.head_dim)
        return values.float().reshape(-1, group), nuq.value_outlier_count(self.spec.value_outliers, group)

    def write(
        self, keys: Tensor, values: Tensor, store: LayerStore, step: RaggedStep, *, backend: str = "auto"
    ) -> None:
        """Quantize new tokens into their slots."""
        t, c = own.tensors_of(store), self.fitted
        key_bits, value_bits = self.spec.widths
        T, H, D = keys.shape
        block, slot = step.slot_block, step.slot_offset
        self.write_sinks(keys, values, store, step)
        flag_not_finite(keys, ERROR_KEY_NOT_FINITE, store.error)
        flag_not_finite(values, ERROR_VALUE_NOT_FINITE, store.error)

        codes = nuq.encode(keys, c.key_zero, c.key_scale, c.key_midpoints)
        t["key_codes"][block, :, slot] = pack(codes, key_bits)
        x = ((keys.float() - c.key_zero) / c.key_scale.clamp(min=1e-12)).reshape(T, -1, self.key_group)
        index = x.abs().topk(self.key_outliers, dim=-1).indices
        t["key_outlier_index"][block, slot] = index.reshape(T, -1).to(torch.uint8)
        t["key_outlier_value"][block, slot] = self._rounded(x.gather(-1, index), 0).view(T, -1)

        rows, per_end = self._value_rows(values)
        chosen, zero, scale = _ranges(rows, per_end)
        side = t["value_zero"].dtype
        zero, scale = zero.to(side), scale.to(side)
        codes = nuq.encode(rows, zero, scale, c.value_midpoints).view(T, H, D)
        t["value_codes"][block, :, slot] = pack(codes, value_bits)
        t["value_zero"][block, slot], t["value_scale"][block, slot] = zero.view(T, -1), scale.view(T, -1)
        y = (rows.gather(1, chosen) - zero.float()) / scale.float().clamp(min=1e-12)
        t["value_outlier_index"][block, slot] = chosen.view(T, -1).to(torch.uint8)
        t["value_outlier_value"][block, slot] = self._rounded(y, 1).view(T, -1)

    def _rounded(self, x: Tensor, side: int) -> Tensor:
        return (x / self.reach[side] * _LEVELS).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)

    def reader(self, store: LayerStore, *, backend: str = "auto") -> own.Reader:
        """Return a reader of pre-RoPE keys and values."""
        t, c = own.tensors_of(store), self.fitted
        H, D, VG = self.num_kv_heads, self.head_dim, self.spec.value_groups
        key_bits, value_bits = self.spec.widths

        def numbers(kind: str, bits: int, centroids: Tensor, group: int, side: int, ids: Tensor) -> Tensor:
            """Normalized numbers with their outliers, [S, P*BS, groups, channels]."""
            codes = unpack(t[f"{kind}_codes"][ids], bits, D)  # [S, P, H, BS, D]
            S, P, _, BS, _ = codes.shape
            x = centroids[codes.int()].permute(0, 1, 3, 2, 4).reshape(S, P * BS, -1, group)
            index = t[f"{kind}_outlier_index"][ids].long().view(S, P * BS, x.shape[2], -1)
            kept = t[f"{kind}_outlier_value"][ids].float().view_as(index) * (self.reach[side] / _LEVELS)
            return x.scatter(-1, index, kept)

        def read(ids: Tensor) -> tuple[Tensor, Tensor]:
            S = len(ids)
            keys = numbers("key", key_bits, c.key_centroids, self.key_group, 0, ids).reshape(S, -1, H, D)
            keys = keys * c.key_scale + c.key_zero
            values = numbers("value", value_bits, c.value_centroids, H * D // VG, 1, ids)
            zero, scale = (t[f"value_{n}"][ids].float().view(S, -1, VG, 1) for n in ("zero", "scale"))
            values = (values * scale + zero).reshape(S, -1, H, D)
            return keys.transpose(1, 2), values.transpose(1, 2)

        return read


def _ranges(rows: Tensor, per_end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outlier channels [R, 2n] int64, and zero and scale of the rest, [R, 1] each."""
    index, lowest, highest = nuq.split_value_outliers(rows, per_end)
    zero, scale = nuq.zero_and_scale(lowest, highest)
    return index.long(), zero[:, None], scale[:, None]


def _high(x: Tensor) -> Tensor:
    """The magnitude that one outlier in a thousand exceeds, at least 1."""
    beyond = x.abs().flatten()
    beyond = beyond[beyond > 1]
    return beyond.kthvalue(max(1, round(0.999 * len(beyond)))).values if len(beyond) else x.new_ones(())
