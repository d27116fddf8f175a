"""KIVI: keys per channel in groups of tokens, values per token in groups of channels, an exact recent window.

Liu et al., ICML 2024, arXiv:2402.02750: plain integers between each group's minimum and maximum, no calibration, keys
after RoPE. ``quant.recent_tokens`` is its residual length R: keys become quantized R at a time, so that a query sees
between 1 and R exact ones; values one at a time, the last R being exact. The codes of tokens in the window are written
already (their slots exist anyway) and are not read before the window has passed; a group of keys is written anew when
a token joins it, from the exact tokens of the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvquant import nuq
from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import MethodLayout, side_dtype
from kvquant.kernels import ERROR_KEY_NOT_FINITE, LayerStore, get_backend
from kvquant.methods import _own_store as own
from kvquant.not_finite import flag_not_finite
from kvquant.packing import pack, packed_row_bytes, unpack
from kvquant.ragged import RaggedStep, cumulative_lengths
from kvquant.spec import QuantSpec


class Method(BatchedKVQuantizer):
    """Asymmetric integers in groups of ``options.group_size``, tokens for keys, channels for values."""

    default_options: ClassVar[Mapping[str, Any]] = {"group_size": 32}
    keys_after_rope = True
    own_store = True
    calibrated = False

    @classmethod
    def check(cls, spec: QuantSpec) -> None:
        """Groups are whole within the window, and nothing is left that calibration would have to find."""
        super().check(spec)
        group, recent = spec.option("group_size", 32), spec.recent_tokens
        if not isinstance(group, int) or group < 2 or group & (group - 1):
            raise ValueError(f"quant.options.group_size must be a power of two, got {group}; try 32")
        if recent < group or recent % group:
            raise ValueError(
                f"quant.recent_tokens must be a multiple of quant.options.group_size={group} with quant=kivi, got "
                f"{recent}; try {max(group, recent // group * group)}"
            )
        for name, unused in (
            ("outlier_fraction", 0),
            ("sink_tokens", 0),
            ("logit_bias", False),
            ("qnorm", False),
        ):
            if getattr(spec, name) != unused:
                raise ValueError(
                    f"quant.{name} must be {str(unused).lower()} with quant=kivi, which has none, got "
                    f"{getattr(spec, name)}; try quant=nuq"
                )

    @classmethod
    def uncalibrated(cls, spec: QuantSpec, num_kv_heads: int, head_dim: int) -> BatchedKVQuantizer:
        """The quantizer: its codebooks are evenly spaced."""
        group = spec.option("group_size", 32)
        if head_dim % group:
            raise ValueError(
                f"quant.options.group_size must divide the head dimension {head_dim}, got {group}; try {head_dim & -head_dim}"
            )
        books = map(nuq.uniform_codebook, spec.widths)
        return cls(spec, num_kv_heads, head_dim, own.constants(num_kv_heads, head_dim, *books))

    @property
    def group(self) -> int:
        """Tokens of a key group, channels of a value group."""
        return int(self.spec.option("group_size", 32))

    def layout(
        self, num_layers: int, dtype: torch.dtype, block_size: int, spill_headroom: float
    ) -> MethodLayout:
        """Codes, and zero and scale of each group, in 16 bits."""
        H, D, G, side = self.num_kv_heads, self.head_dim, self.group, side_dtype(dtype)
        if block_size % G:
            raise ValueError(
                f"cache.block_size must be a multiple of quant.options.group_size={G}, got {block_size}; try {2 * G}"
            )
        key_bits, value_bits = self.spec.widths
        layout = MethodLayout(self.spec, num_layers, H, D, dtype, block_size, spill_headroom)
        channels = H * D // G
        return own.with_tensors(
            layout,
            {
                "key_codes": ((H, block_size, packed_row_bytes(D, key_bits)), torch.uint8),
                "key_zero": ((H, block_size // G, D), side),
                "key_scale": ((H, block_size // G, D), side),
                "value_codes": ((H, block_size, packed_row_bytes(D, value_bits)), torch.uint8),
                "value_zero": ((block_size, channels), side),
                "value_scale": ((block_size, channels), side),
                "value_outlier_index": ((block_size, 0), torch.int16),
                "value_outlier_value": ((block_size, 0), side),
                "value_outlier_end": ((H,), torch.int32),
            },
        )

    def recent_start(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys are exact since the last multiple of R, values for R tokens."""
        R = self.spec.recent_tokens
        return torch.div(positions, R, rounding_mode="floor") * R, positions + 1 - R

    def write(
        self, keys: Tensor, values: Tensor, store: LayerStore, step: RaggedStep, *, backend: str = "auto"
    ) -> None:
        """Quantize new values, and every key group that a new token belongs to."""
        t = own.tensors_of(store)
        flag_not_finite(keys, ERROR_KEY_NOT_FINITE, store.error)
        self._write_key_groups(keys, store, step)
        get_backend(backend, keys.device.type).write_values(
            values,
            own.value_store(t),
            self.fitted,
            step.slot_block,
            step.slot_offset,
            None,
            store.error,
            bits=self.spec.widths[1],
        )

    def _write_key_groups(self, keys: Tensor, store: LayerStore, step: RaggedStep) -> None:
        t, G, device = own.tensors_of(store), self.group, keys.device
        key_bits, _ = self.spec.widths
        _, H, D = keys.shape
        BS = t["key_codes"].shape[2]
        # Every sequence begins where its open group does.
        begin = [p - p % G for p in step.past]
        lengths = [p + n - b for p, n, b in zip(step.past, step.lengths, begin, strict=True)]
        host = [begin, step.past, cumulative_lengths(step.lengths)[:-1], cumulative_lengths(lengths)[:-1]]
        begin_t, past, first_new, first = (torch.tensor(x, device=device) for x in host)
        sequence = torch.repeat_interleave(
            torch.arange(len(lengths), device=device),
            torch.tensor(lengths, device=device),
            output_size=sum(lengths),
        )
        position = torch.arange(sum(lengths), device=device) - first[sequence] + begin_t[sequence]
        block = step.block_table[sequence, torch.div(position, BS, rounding_mode="floor")].to(torch.int64)
        slot = position % BS
        is_new = position >= past[sequence]
        x = keys[(first_new[sequence] + position - past[sequence]).clamp(min=0)].float()
        if max(step.past) > 0:
            assert store.recent is not None
            row, place = step.rows[sequence], position % self.spec.recent_tokens
            held = store.recent.position[row, place] == position
            # After a crop the window may have lost a token: what was stored of it is the best there is.
            old = torch.where(
                held[:, None, None],
                store.recent.keys[row, place].float(),
                self._read_slots(store, block, slot),
            )
            x = torch.where(is_new[:, None, None], x, old)
        groups = [-(-n // G) for n in lengths]
        group_first = torch.tensor(cumulative_lengths(groups)[:-1], device=device)
        group = group_first[sequence] + torch.div(position - begin_t[sequence], G, rounding_mode="floor")
        index = group[:, None, None].expand(-1, H, D)
        low = torch.full((sum(groups), H, D), torch.inf, device=device).scatter_reduce_(0, index, x, "amin")
        high = torch.full_like(low, -torch.inf).scatter_reduce_(0, index, x, "amax")
        side = t["key_zero"].dtype
        zero, scale = (y.to(side) for y in nuq.zero_and_scale(low, high))
        # Every element has a range of its own group and channel: normalized, one set of boundaries serves all.
        x_norm = (x - zero[group].float()) / scale[group].float().clamp(min=1e-12)
        codes = nuq.encode(
            x_norm.flatten(1), x.new_zeros(()), x.new_ones(()), self.fitted.key_midpoints
        ).view_as(x)
        t["key_codes"][block, :, slot] = pack(codes, key_bits)
        heads = position % G == 0  # one token of each group says where its range goes
        at = (block[heads], slice(None), torch.div(slot[heads], G, rounding_mode="floor"))
        t["key_zero"][at] = zero[group[heads]]
        t["key_scale"][at] = scale[group[heads]]

    def _read_slots(self, store: LayerStore, block: Tensor, slot: Tensor) -> Tensor:
        """Dequantized keys of single slots, [n, H, D] fp32."""
        t = own.tensors_of(store)
        codes = unpack(t["key_codes"][block, :, slot], self.spec.widths[0], self.head_dim)
        group = torch.div(slot, self.group, rounding_mode="floor")
        return nuq.decode(
            codes, t["key_zero"][block, :, group], t["key_scale"][block, :, group], self.fitted.key_centroids
        )

    def reader(self, store: LayerStore, *, backend: str = "auto") -> own.Reader:
        """Return a reader of tiles rotated to their positions."""
        t, c = own.tensors_of(store), self.fitted
        kernels = get_backend(backend, store.error.device.type)
        (key_bits, value_bits), D, G = self.spec.widths, self.head_dim, self.group

        def read(ids: Tensor) -> tuple[Tensor, Tensor]:
            codes = unpack(t["key_codes"][ids], key_bits, D)  # [S, P, H, BS, D]
            numbers = c.key_centroids[codes.int()].unflatten(3, (-1, G))
            keys = (
                numbers * t["key_scale"][ids].float()[..., None, :] + t["key_zero"][ids].float()[..., None, :]
            )
            values = kernels.read_values(own.value_store(t), c, ids, bits=value_bits, head_dim=D)
            return keys.flatten(3, 4).transpose(1, 2).flatten(2, 3), values

        return read
