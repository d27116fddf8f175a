"""One forward call of a model over a cache's pools: where its tokens stand, where they go, and their attention."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_pool import BlockPool
from kvquant.errors import DataError
from kvquant.kernels import Rope, get_backend
from kvquant.measure import Stopwatch
from kvquant.models.rotary import CallRope, call_rope
from kvquant.prefill_quant import PrefillQuantizedAttention, blocks_per_tile
from kvquant.ragged import RaggedStep


@dataclasses.dataclass(frozen=True)
class CachedLayer:
    """Where a layer's keys and values live, and how they are read.

    ``pool`` and ``inner`` are its pool and its place in it; ``rope_type`` says which rotary tables it uses.
    """

    pool: int
    inner: int
    window: int | None
    rope_type: str | None
    device: torch.device
    quantizer: BatchedKVQuantizer


@dataclasses.dataclass(frozen=True)
class CallTokens:
    """The new tokens of a call.

    Attributes:
        rows: sequences that have new tokens, distinct.
        lengths: new tokens of each, at least 1.
        columns: width of the call as a padded batch.
        index: flat places of the tokens in [B, S]; None: there is no padding.
    """

    rows: list[int]
    lengths: list[int]
    columns: int
    index: Tensor | None


class ForwardCall:
    """A call whose blocks are reserved in every pool; made by :meth:`reserve`, it lasts until the call is over."""

    def __init__(
        self,
        tokens: CallTokens,
        layers: Sequence[CachedLayer],
        pools: Sequence[BlockPool],
        steps: Sequence[RaggedStep],
        ropes: dict[tuple[str | None, torch.device], CallRope],
    ) -> None:
        self.tokens, self._layers, self._pools, self._steps, self._ropes = tokens, layers, pools, steps, ropes

    @classmethod
    def reserve(
        cls,
        tokens: CallTokens,
        layers: Sequence[CachedLayer],
        pools: Sequence[BlockPool],
        rotary: Any,
        rope_length: int | None,
    ) -> ForwardCall:
        """Set the blocks of a call aside and make its rotary tables.

        Args:
            tokens: what is new.
            layers: of the model, in order.
            pools: what the layers refer to.
            rotary: the decoder's rotary embedding.
            rope_length: tokens at which length-dependent frequencies are taken; None: the call's longest sequence.

        Raises:
            PoolExhausted: no room; nothing stays reserved.
        """
        steps: list[RaggedStep] = []
        try:
            for pool in pools:
                steps.append(pool.reserve(tokens.rows, tokens.lengths))
        except Exception:
            for pool in pools:
                pool.rollback()
            raise
        longest = max(steps[0].kv_lengths)
        tables: dict[str | None, CallRope] = {}
        ropes = {}
        for layer in layers:
            kind = layer.rope_type
            if kind not in tables:
                tables[kind] = call_rope(
                    rotary,
                    kind,
                    steps[0].positions,
                    longest=longest,
                    rope_length=rope_length or longest,
                    tile=blocks_per_tile(pools[0].layout.block_size) * pools[0].layout.block_size,
                )
            if (kind, layer.device) not in ropes:
                ropes[kind, layer.device] = tables[kind].to(layer.device)
        return cls(tokens, layers, pools, steps, ropes)

    @property
    def positions(self) -> Tensor:
        """Position of every new token in its sequence, int64 [T]."""
        return self._steps[0].positions

    def copy_layout(self) -> None:
        """Copy to the device what kernels ask for only when they run."""
        for step in self._steps:
            _ = step.runs, step.kv_lengths_tensor

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        softcap: float | None,
        prefill_reads: str,
        backend: str,
        stopwatch: Stopwatch | None,
    ) -> Tensor:
        """Store one layer's new keys and values and attend; [B, heads, S, D] in, [B, S, Hq, D] out."""
        B, Hq, S, D = query.shape
        place = self._layers[layer]
        pool, step = self._pools[place.pool], self._steps[place.pool]
        q, k, v = (x.transpose(1, 2).reshape(B * S, -1, D) for x in (query, keys, values))
        index = self.tokens.index
        if index is not None:
            index = index.to(query.device)
            q, k, v = q[index], k[index], v[index]
        store = pool.layers[place.inner]
        tables, cos, sin = self._ropes[place.rope_type, place.device]
        rope: Rope | None = tables
        kernels = get_backend(backend, query.device.type)
        attention = PrefillQuantizedAttention(
            place.quantizer,
            pool.layout.block_size,
            scaling,
            prefill_reads=prefill_reads,
            window=place.window,
            softcap=softcap,
            backend=backend,
        )
        # Kernels are launched on the current device, which need not be this layer's.
        with torch.cuda.device_of(query):
            # fp32 tables and products: the query's rotation must match the keys', which happens tile by tile in fp32.
            dtype = attention.query_dtype(query, store, step)
            turned = kernels.rotate_tokens(q, cos, sin, dtype)
            if place.quantizer.keys_after_rope:
                k, rope = kernels.rotate_tokens(k, cos, sin, torch.float32), None
            k, turned = place.quantizer.turn_keys(k), place.quantizer.turn_query(turned).to(dtype)
            with contextlib.nullcontext() if stopwatch is None else stopwatch:
                attention.store(k, v, store, step)
            out = attention.attend(turned, k, v, store, step, rope).to(query.dtype)
        if index is not None:
            padded = out.new_zeros(B * S, Hq, D)
            padded[index] = out
            out = padded
        return out.view(B, S, Hq, D)

    def commit(self) -> None:
        """Make the tokens part of their sequences.

        Raises:
            NonFiniteActivations: NaN, infinity or overflow in a key or value.
            PoolExhausted: outlier chunks ran out. Nothing of the call is kept in either case.
        """
        try:
            # All are asked before any advances: a call is kept whole or not at all.
            for pool in self._pools:
                pool.check()
            for pool in self._pools:
                pool.advance()
        except Exception:
            self.rollback()
            raise

    def rollback(self) -> None:
        """Give the reserved blocks back."""
        for pool in self._pools:
            pool.rollback()


def padded_tokens(rows: Sequence[int], batch: int, columns: int, mask: Tensor | None) -> CallTokens:
    """The new tokens of a padded batch, left- or right-padded.

    Args:
        rows: the sequences, one per row of the batch.
        batch: rows.
        columns: width of the ids.
        mask: the tokenizer's, [B, at least ``columns``]; None: no padding.

    Raises:
        DataError: the batch has other rows, or the mask is no tokenizer's.
    """
    if len(rows) != batch:
        raise DataError(
            f"the cache holds {len(rows)} sequences and the batch {batch}; pass a fresh kv.new_cache()"
        )
    if mask is None:
        return CallTokens(list(rows), [columns] * batch, columns, None)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise DataError(f"attention_mask must be [batch, tokens], got {got}; pass the tokenizer's own mask")
    valid = mask[:, -columns:].bool()
    lengths = valid.sum(1).tolist()
    index = None if min(lengths) == columns else valid.flatten().nonzero().flatten()
    # A chunk of a left-padded batch may hold nothing but padding of a short sequence.
    present = [(row, n) for row, n in zip(rows, lengths, strict=True) if n]
    return CallTokens([row for row, _ in present], [n for _, n in present], columns, index)


def check_lengths(lengths: Sequence[int]) -> None:
    """Refuse a call without tokens, or with an empty prompt.

    Raises:
        DataError: as said.
    """
    if not lengths or min(lengths) < 1:
        raise DataError("every prompt must hold at least 1 token, got 0; drop empty prompts")
