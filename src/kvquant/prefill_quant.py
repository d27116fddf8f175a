"""Attention that stores what it reads: keys and values go into blocks once, queries attend over the blocks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.kernels import LayerStore, Rope, get_backend
from kvquant.kernels.mixed_attention import attend_mixed
from kvquant.ragged import RaggedStep

PREFILL_READS = ("quantized", "exact")
TILE_TOKENS = 512  # tokens of history dequantized at once for each sequence


def blocks_per_tile(block_size: int) -> int:
    """Blocks that make a tile of about ``TILE_TOKENS`` tokens."""
    return max(1, TILE_TOKENS // block_size)


@dataclasses.dataclass(frozen=True)
class PrefillQuantizedAttention:
    """Attention of one layer over quantized blocks: prefill, chunked prefill and decode alike.

    Args:
        quantizer: of this layer.
        block_size: tokens per block of the pool.
        softmax_scale: factor of the scores.
        prefill_reads: ``quantized``: every key and value a query sees, its own included, is the dequantized one;
            ``exact``: this call's own are exact, earlier calls' quantized. A sequence that brings one token
            (decode) always reads quantized, whatever the others of its call do.
        window: sliding window in tokens, or None.
        softcap: tanh cap of the scores, or None.
        backend: name of the kernels.
    """

    quantizer: BatchedKVQuantizer
    block_size: int
    softmax_scale: float
    prefill_reads: str = "quantized"
    window: int | None = None
    softcap: float | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.prefill_reads not in PREFILL_READS:
            raise ValueError(
                f"cache.prefill_reads must be one of {', '.join(PREFILL_READS)}, got {self.prefill_reads!r}; try quantized"
            )

    def query_dtype(self, query: Tensor, store: LayerStore, step: RaggedStep) -> torch.dtype:
        """The dtype in which :meth:`attend` takes a call's rotated queries.

        A prompt that FlashAttention reads on a GPU is read in the model's dtype, as the model's own attention reads
        it: it takes nothing wider. Everything else multiplies in fp32 (tiles, as of a softcap or an fp32 model, and
        exact beside quantized keys) or rounds on its own (decoding), so queries come in fp32 and are not rounded for
        nothing. A sequence that decodes beside prompts is read with them.

        Args:
            query: as the model made them, [T, Hq, D].
            store: the layer's part of the pool.
            step: layout of the call.
        """
        if not query.is_cuda or max(step.lengths) == 1 or self.quantizer.spec.mixes_exact:
            return torch.float32
        refusal = getattr(get_backend(self.backend, query.device.type), "prefill_refusal", None)
        layer = self.quantizer.reader(store, backend=self.backend)
        is_refused = refusal is None or refusal(query, layer, self.softcap) is not None
        return torch.float32 if is_refused else query.dtype

    def store(self, keys: Tensor, values: Tensor, store: LayerStore, step: RaggedStep) -> None:
        """Quantize a call's keys and values into their block slots.

        Args:
            keys: pre-RoPE, [T, H, D].
            values: [T, H, D].
            store: the layer's part of the pool.
            step: layout of the call, from :meth:`BlockPool.reserve`.
        """
        self.quantizer.write(keys, values, store, step, backend=self.backend)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        store: LayerStore,
        step: RaggedStep,
        rope: Rope | None,
    ) -> Tensor:
        """Attend over the stored history and the call's own tokens, which are stored already.

        Args:
            query: rotated at their positions, [T, Hq, D] of :meth:`query_dtype`.
            keys: this call's own, for ``prefill_reads=exact``, [T, H, D].
            values: likewise.
            store: the layer's part of the pool.
            step: layout of the call.
            rope: tables for tiles of ``blocks_per_tile(block_size)`` blocks; None: keys are not rotated.

        Returns:
            [T, Hq, D], in the query's dtype.
        """
        own_exact = (
            self.prefill_reads == "exact" and max(step.lengths) > 1 and not self.quantizer.spec.is_exact
        )
        sinks = None
        if store.sink_keys.shape[1]:
            sinks = (store.sink_keys[step.rows], store.sink_values[step.rows])
        if self.quantizer.spec.mixes_exact:
            out = attend_mixed(
                query,
                step,
                self.quantizer.reader(store, backend=self.backend),
                rope,
                (keys, values),
                sinks,
                store.recent,
                self.quantizer.recent_start(step.positions),
                key_noise=self.quantizer.key_noise,
                own_exact=own_exact,
                block_size=self.block_size,
                blocks_per_tile=blocks_per_tile(self.block_size),
                softmax_scale=self.softmax_scale,
                window=self.window,
                softcap=self.softcap,
            )
            self.quantizer.keep_recent(keys, values, store, step)
            return out
        return get_backend(self.backend, query.device.type).attend(
            query,
            step,
            self.quantizer.reader(store, backend=self.backend),
            rope,
            (keys, values) if own_exact else None,
            sinks,
            block_size=self.block_size,
            blocks_per_tile=blocks_per_tile(self.block_size),
            softmax_scale=self.softmax_scale,
            window=self.window,
            softcap=self.softcap,
        )

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        store: LayerStore,
        step: RaggedStep,
        rope: Rope | None,
    ) -> Tensor:
        """:meth:`store`, then :meth:`attend`."""
        self.store(keys, values, store, step)
        return self.attend(query, keys, values, store, step, rope)
