"""nuq on keys that are divided by their token's norm first: one more 16-bit number per token and head.

The length of a key varies between tokens more than its direction does, and one static range per channel has to hold
both; dividing leaves it the direction alone. The rest is nuq's, down to the kernels.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import BlockLayout, side_dtype
from kvquant.fitting import CalibrationTokens
from kvquant.kernels import LayerStore
from kvquant.methods._own_store import Reader
from kvquant.methods.nuq import Method as Nuq
from kvquant.ragged import RaggedStep
from kvquant.spec import QuantSpec


class Method(Nuq):
    """Stores the root mean square of each token and head, and nuq's form of what is left."""

    own_store = True

    @classmethod
    def check(cls, spec: QuantSpec) -> None:
        """The bias correction knows the noise of one length only."""
        super().check(spec)
        if spec.logit_bias:
            raise ValueError(
                "quant.logit_bias must be false with quant=nuq_token_norm, got true; try quant=nuq"
            )

    @classmethod
    def fit(cls, spec: QuantSpec, tokens: CalibrationTokens) -> BatchedKVQuantizer:
        """Fit nuq to normalized keys; their gradient grows by what they were divided by."""
        norm, fisher = _norm(tokens.keys), tokens.key_fisher
        fisher = None if fisher is None else fisher.float() * norm.square()
        normalized = dataclasses.replace(tokens, keys=tokens.keys.float() / norm, key_fisher=fisher)
        return super().fit(spec, normalized)

    def layout(
        self, num_layers: int, dtype: torch.dtype, block_size: int, spill_headroom: float
    ) -> BlockLayout:
        """One number per token and head more than nuq."""
        extra = (("key_norm", (self.num_kv_heads, block_size), side_dtype(dtype)),)
        return BlockLayout(
            self.spec, num_layers, self.num_kv_heads, self.head_dim, dtype, block_size, spill_headroom, extra
        )

    def write(
        self, keys: Tensor, values: Tensor, store: LayerStore, step: RaggedStep, *, backend: str = "auto"
    ) -> None:
        """Store each token's norm and quantize the rest."""
        assert store.extra is not None
        stored = store.extra["key_norm"]
        norm = _norm(keys).to(stored.dtype)
        stored[step.slot_block, :, step.slot_offset] = norm[..., 0]
        super().write(keys.float() / norm.float(), values, store, step, backend=backend)
        # What nuq kept exactly has lost its length.
        self.write_sinks(keys, values, store, step)

    def reader(self, store: LayerStore, *, backend: str = "auto") -> Reader:
        """Return nuq's reader with the norms put back."""
        assert store.extra is not None
        norms, read = store.extra["key_norm"], super().reader(store, backend=backend)

        def scaled(ids: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = read(ids)  # [S, H, P*BS, D]
            norm = norms[ids].float().transpose(1, 2).flatten(2, 3)  # [S, P, H, BS] -> [S, H, P*BS]
            return keys * norm[..., None], values

        return scaled


def _norm(keys: Tensor) -> Tensor:
    """Root mean square over a head's channels, [T, H, 1] fp32."""
    return keys.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
