"""A transformers cache whose keys and values live in our block pools: verbs, allocation, and one forward call."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.errors import DataError, ModelError, PoolExhausted
from kvquant.kernels import Rope
from kvquant.measure import Stopwatch
from kvquant.models.attention_hook import rotate
from kvquant.models.loading import ModelShape
from kvquant.prefill_quant import PrefillQuantizedAttention, blocks_per_tile
from kvquant.ragged import RaggedStep, cumulative_lengths


class _CountingLayer(CacheLayerMixin):
    """What transformers sees of a layer: it counts columns and hands the new keys and values through."""

    def __init__(self, cache: QuantizedCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated per layer."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values; the attention function stores them.

        Raises:
            ModelError: the model runs its own attention, which would see no history.
        """
        self._cache.check_in_call()
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included: what generate() counts positions with."""
        return self._cache.num_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask, if one were built."""
        return self._cache.num_columns + query_length, 0

    def get_max_length(self) -> int:
        """No maximum of its own: the pool is the limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same under the name that transformers used before 5.20."""
        return -1


class QuantizedCache(Cache):
    """The keys and values of a growing batch of sequences, in blocks. Made by :meth:`KVHandle.new_cache`.

    Pass it to the model or to ``generate()`` as ``past_key_values``, or use :meth:`append` for ragged batches.

    Attributes:
        rows: the open sequences, in batch order.
        num_columns: columns of padded batches seen so far.
        stopwatch: adds up the time of quantizing and storing, if set.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        quantizers: Sequence[BatchedKVQuantizer],
        shape: ModelShape,
        *,
        block_size: int,
        num_blocks: int | None,
        memory_budget_gib: float | None,
        max_sequences: int | None,
        spill_headroom: float,
        prefill_reads: str,
        backend: str,
        max_length: int,
    ) -> None:
        super().__init__(layers=[_CountingLayer(self) for _ in range(shape.num_layers)])
        self.num_columns = 0
        self.rows: list[int] = []
        self.stopwatch: Stopwatch | None = None
        self._model, self._quantizers, self._shape = model, quantizers, shape
        self._block_size, self._max_length, self._max_sequences = block_size, max_length, max_sequences
        self._num_blocks, self._budget_gib = num_blocks, memory_budget_gib
        self._spill_headroom, self._prefill_reads, self._backend = spill_headroom, prefill_reads, backend
        self._pools: list[BlockPool] = []
        self._place: list[tuple[int, int]] = []  # layer -> (pool, index within it)
        self._steps: list[RaggedStep] = []
        self._token_index: Tensor | None = None
        self._packed: tuple[list[int], list[int]] | None = None
        self._rope: tuple[Rope, Tensor, Tensor] | None = None
        self._group_layers()
        if num_blocks is not None or memory_budget_gib is not None:
            self._allocate(max_sequences or 64)

    # ---- verbs -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def append(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        rows: Sequence[int] | None = None,
        *,
        logits: str = "last",
    ) -> Tensor:
        """Run the model over new tokens of several sequences at once, without padding, and keep their K and V.

        Args:
            prompts: token ids of each sequence, lists or int tensors [S_i], of any lengths.
            rows: which sequences they continue; None: the open ones in order, or new ones if none is open.
            logits: ``last``: of each sequence's last token; ``all``: of every token.

        Returns:
            [B, V] (``last``) or [T, V] (``all``).

        Raises:
            DataError: an empty prompt, or more tokens than the model's context.
            PoolExhausted: the pool has no room; everything stored is intact.
        """
        device = next(self._model.parameters()).device
        ids = [torch.as_tensor(p, dtype=torch.int64).flatten().to(device) for p in prompts]
        lengths = [len(p) for p in ids]
        _check_prompts(lengths)
        if rows is None:
            rows = self.rows if self.rows else self.open(len(ids))
        if len(rows) != len(ids):
            raise DataError(
                f"one prompt per sequence is needed, got {len(ids)} prompts for {len(rows)} sequences"
            )
        positions = torch.cat(
            [torch.arange(n, device=device) + self.length(r) for n, r in zip(lengths, rows, strict=True)]
        )
        last = torch.tensor(cumulative_lengths(lengths)[1:], device=device) - 1
        self._packed = (list(rows), lengths)
        try:
            out = self._model(
                input_ids=torch.cat(ids)[None],
                position_ids=positions[None],
                past_key_values=self,
                use_cache=True,
                logits_to_keep=last if logits == "last" else 0,
            )
        finally:
            self._packed = None
        return out.logits[0]

    def open(self, num_sequences: int) -> list[int]:
        """Open empty sequences; returns their rows.

        Raises:
            PoolExhausted: the pool has no room for their tables.
        """
        if not self._pools:
            self._allocate(self._max_sequences or num_sequences)
        new = []
        for _ in range(num_sequences):
            opened = [pool.add_sequence() for pool in self._pools]
            assert len(set(opened)) == 1, "pools of one cache hand out rows in step"
            new.append(opened[0])
        self.rows += new
        return new

    def free(self, row: int) -> None:
        """Close a sequence and give its blocks back."""
        self.rows.remove(row)
        for pool in self._pools:
            pool.free(row)

    def fork(self, row: int) -> int:
        """Open a sequence with the same history; full blocks are shared. Returns its row."""
        forked = []
        try:
            for pool in self._pools:
                forked.append((pool, pool.fork(row)))
        except PoolExhausted:
            for pool, new in forked:
                pool.free(new)
            raise
        self.rows.append(forked[0][1])
        return forked[0][1]

    def crop(self, max_length: int) -> None:
        """Keep the first ``max_length`` tokens of every sequence, or drop the last ``-max_length`` if negative."""
        for row in self.rows:
            length = self.length(row)
            keep = max(0, length + max_length) if max_length < 0 else min(length, max_length)
            for pool in self._pools:
                pool.crop(row, keep)
        self.num_columns = (
            max(0, self.num_columns + max_length) if max_length < 0 else min(self.num_columns, max_length)
        )

    def length(self, row: int) -> int:
        """Tokens stored for a sequence."""
        return self._pools[0].length(row)

    def reset(self) -> None:
        """Forget every sequence; the pool stays."""
        for row in list(self.rows):
            self.free(row)
        self.num_columns = 0

    # ---- bytes -----------------------------------------------------------------------------------------------

    @property
    def bytes_held(self) -> int:
        """Bytes held for the stored sequences, see :attr:`BlockPool.bytes_held`."""
        return sum(pool.bytes_held for pool in self._pools)

    @property
    def bytes_free(self) -> int:
        """Bytes allocated and not held."""
        return sum(pool.bytes_free for pool in self._pools)

    @property
    def effective_bits(self) -> float:
        """8 * bytes held / elements of K and V held."""
        tokens = sum(self.length(row) for row in self.rows)
        elements = 2 * tokens * self._shape.num_layers * self._shape.num_kv_heads * self._shape.head_dim
        return 8 * self.bytes_held / max(elements, 1)

    @property
    def key_outlier_fraction(self) -> float:
        """Fraction of stored key elements kept exactly."""
        kept = elements = 0
        for pool in self._pools:
            layout = pool.layout
            for row in self.rows:
                elements += pool.length(row) * layout.num_layers * layout.num_kv_heads * layout.head_dim
                if not layout.spec.is_exact:
                    kept += int(pool.tensors["key_outlier_count"][:, pool.blocks_of(row)].sum())
        return kept / max(elements, 1)

    @property
    def pools(self) -> list[BlockPool]:
        """The block pools, one per group of layers stored alike."""
        return self._pools

    # ---- allocation ------------------------------------------------------------------------------------------

    def _group_layers(self) -> None:
        """Layers of one spec share block ids."""
        groups: dict[Any, list[int]] = {}
        for layer, quantizer in enumerate(self._quantizers):
            groups.setdefault(quantizer.spec, []).append(layer)
        dtype = self._model.dtype
        self._layouts, place = [], {}
        for index, (spec, layers) in enumerate(groups.items()):
            self._layouts.append(
                BlockLayout(
                    spec,
                    len(layers),
                    self._shape.num_kv_heads,
                    self._shape.head_dim,
                    dtype,
                    self._block_size,
                    self._spill_headroom,
                )
            )
            place.update({layer: (index, i) for i, layer in enumerate(layers)})
        self._place = [place[layer] for layer in range(len(self._quantizers))]

    def _allocate(self, max_sequences: int) -> None:
        per_block = sum(layout.provisioned_block_bytes for layout in self._layouts)
        columns = self._layouts[0].blocks_for(self._max_length)
        if self._num_blocks is not None:
            num_blocks = self._num_blocks
        elif self._budget_gib is not None:
            num_blocks = int(self._budget_gib * 2**30) // per_block
            if num_blocks < 1:
                raise PoolExhausted(
                    f"cache.memory_budget_gib must hold at least one block of {per_block} bytes, got {self._budget_gib}; "
                    f"try {per_block / 2**30:.4f} or a smaller cache.block_size"
                )
        else:
            num_blocks = max_sequences * columns
        device = next(self._model.parameters()).device
        available = _available_bytes(device)
        if num_blocks * per_block > available:
            raise PoolExhausted(
                f"the cache needs {num_blocks * per_block / 2**30:.2f} GiB and {available / 2**30:.2f} GiB are free; "
                f"try cache.num_blocks={max(1, available // per_block)}, which fits"
            )
        self._pools = [
            BlockPool(
                layout,
                num_blocks,
                max_sequences=max_sequences,
                max_blocks_per_sequence=min(columns, num_blocks),
                device=device,
            )
            for layout in self._layouts
        ]

    # ---- one forward call ------------------------------------------------------------------------------------

    def begin(self, batch: int, columns: int, attention_mask: Tensor | None, rotary: nn.Module) -> None:
        """Lay out a forward call over [batch, columns] ids and reserve its blocks (called by the model's pre-hook).

        Raises:
            DataError: an empty prompt, or one beyond the context.
            PoolExhausted: no room; everything stored is intact.
        """
        if self._packed is not None:
            rows, lengths = self._packed
            self._token_index = None
        else:
            if not self.rows:
                self.open(batch)
            if len(self.rows) != batch:
                raise DataError(
                    f"the cache holds {len(self.rows)} sequences and the batch {batch}; pass a fresh kv.new_cache()"
                )
            rows = self.rows
            lengths, self._token_index = _valid_tokens(batch, columns, attention_mask)
        _check_prompts(lengths)
        longest = max(self.length(row) + n for row, n in zip(rows, lengths, strict=True))
        if longest > self._max_length:
            raise DataError(
                f"a sequence may hold {self._max_length} tokens (the model's context), got {longest}; "
                "shorten the prompt or raise model.max_length"
            )
        self._steps = []
        try:
            for pool in self._pools:
                self._steps.append(pool.reserve(rows, lengths))
        except PoolExhausted:
            self.abandon()
            raise
        cos, sin = _rotary_tables(rotary, self._steps[0].positions)
        self._rope = (self._key_rope(rotary, longest), cos, sin)
        self._columns = columns

    def finish(self) -> None:
        """Make the call's tokens part of their sequences.

        Raises:
            NonFiniteActivations: NaN, infinity or overflow in a key or value.
            PoolExhausted: outlier chunks ran out. Nothing of the call is kept in either case.
        """
        try:
            for pool in self._pools:
                pool.commit()
        except Exception:
            self.abandon()
            raise
        self._steps = []
        self.num_columns += self._columns

    def abandon(self) -> None:
        """Undo the reservations of a call that failed."""
        for pool in self._pools:
            pool.rollback()
        self._steps = []

    def check_in_call(self) -> None:
        """Raise a ModelError unless :meth:`begin` has laid out the forward call that is running."""
        if not self._steps:
            raise ModelError(
                "a quantized cache works only inside `with quantized_kv_cache(model, ...)` of its own model; "
                "enter the context again"
            )

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Store one layer's new keys and values and attend; [B, heads, S, D] in, [B, S, Hq, D] out."""
        self.check_in_call()
        B, Hq, S, D = query.shape
        pool_index, inner = self._place[layer]
        step = self._steps[pool_index]
        q, k, v = (x.transpose(1, 2).reshape(B * S, -1, D) for x in (query, keys, values))
        if self._token_index is not None:
            q, k, v = q[self._token_index], k[self._token_index], v[self._token_index]
        assert self._rope is not None
        rope, cos, sin = self._rope
        attention = PrefillQuantizedAttention(
            self._quantizers[layer],
            self._block_size,
            scaling,
            prefill_reads=self._prefill_reads,
            window=window,
            softcap=softcap,
            backend=self._backend,
        )
        # fp32 tables and products: the query's rotation must match the keys', which happens tile by tile in fp32.
        turned = rotate(q.float(), cos[:, None], sin[:, None])
        store = self._pools[pool_index].layers[inner]
        with contextlib.nullcontext() if self.stopwatch is None else self.stopwatch:
            attention.store(k, v, store, step)
        out = attention.attend(turned, k, v, store, step, rope).to(query.dtype)
        if self._token_index is not None:
            padded = out.new_zeros(B * S, Hq, D)
            padded[self._token_index] = out
            out = padded
        return out.view(B, S, Hq, D)

    def _key_rope(self, rotary: nn.Module, longest: int) -> Rope:
        tile = blocks_per_tile(self._block_size) * self._block_size
        device = self._pools[0].device
        cos, sin = _rotary_tables(rotary, torch.arange(tile, device=device))
        base_cos, base_sin = _rotary_tables(rotary, torch.arange(-(-longest // tile), device=device) * tile)
        half = cos.shape[-1] // 2
        factor = float(getattr(rotary, "attention_scaling", 1.0))
        return Rope(cos[:, :half], sin[:, :half], base_cos[:, :half] / factor, base_sin[:, :half] / factor)


def _valid_tokens(batch: int, columns: int, mask: Tensor | None) -> tuple[list[int], Tensor | None]:
    """Lengths of the new tokens of a padded batch, and their flat indices (None: there is no padding)."""
    if mask is None or columns == 1:
        return [columns] * batch, None
    if mask.dim() != 2:
        raise DataError(
            f"attention_mask must be [batch, tokens], got {list(mask.shape)}; pass the tokenizer's own mask"
        )
    valid = mask[:, -columns:].bool()
    lengths = valid.sum(1).tolist()
    if min(lengths) == columns:
        return lengths, None
    return lengths, valid.flatten().nonzero().flatten()


def _check_prompts(lengths: Sequence[int]) -> None:
    if not lengths or min(lengths) < 1:
        raise DataError("every prompt must hold at least 1 token, got 0; drop empty prompts")


def _rotary_tables(rotary: nn.Module, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own cos and sin in fp32, [n, R] each."""
    like = torch.empty(0, dtype=torch.float32, device=positions.device)
    cos, sin = rotary(like, positions[None])
    return cos[0], sin[0]


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
