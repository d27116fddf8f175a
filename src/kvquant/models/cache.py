"""A transformers cache whose keys and values live in our block pools: forward calls over its sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.errors import DataError, ModelError
from kvquant.measure import Stopwatch
from kvquant.models.attention_hook import attention_modules
from kvquant.models.backend_check import check_backend
from kvquant.models.counting_layer import CountingLayer
from kvquant.models.devices import input_device, layer_devices
from kvquant.models.forward_call import CachedLayer, CallTokens, ForwardCall, check_lengths, padded_tokens
from kvquant.models.loading import ModelShape
from kvquant.models.pools import group_layers
from kvquant.models.rotary import check_rope_switch, rope_switch, rope_type_of, rotated_channels
from kvquant.models.sequences import StoredSequences
from kvquant.ragged import cumulative_lengths


class QuantizedCache(StoredSequences, Cache):
    """The keys and values of a growing batch of sequences, in blocks. Made by :meth:`KVHandle.new_cache`.

    Pass it to the model or to ``generate()`` as ``past_key_values``, or use :meth:`append` for ragged batches.

    Attributes:
        num_columns: columns of padded batches seen so far.
        stopwatch: adds up the time of quantizing and storing, if set.
        when_asked: called with the cache when transformers asks for its length.
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
        rope_length: int | None,
        call_tokens: int | None,
    ) -> None:
        devices, rotary = layer_devices(model), model.get_decoder().rotary_emb
        check_backend(
            backend,
            quantizers,
            devices,
            block_size=block_size,
            query_heads=shape.num_query_heads,
            rotated=rotated_channels(rotary),
        )
        groups = group_layers(
            quantizers,
            shape,
            devices,
            dtype=model.dtype,
            block_size=block_size,
            spill_headroom=spill_headroom,
        )
        StoredSequences.__init__(
            self,
            groups,
            num_blocks=num_blocks,
            memory_budget_gib=memory_budget_gib,
            max_length=max_length,
            max_sequences=max_sequences,
            call_tokens=call_tokens,
        )
        Cache.__init__(
            self,
            layers=[CountingLayer(self.get_num_columns, self.check_in_call) for _ in range(shape.num_layers)],
        )
        self.num_columns = 0
        self.stopwatch: Stopwatch | None = None
        self.when_asked: Callable[[QuantizedCache], None] | None = None
        self._model, self._rope_length, self._rope_switch = model, rope_length, rope_switch(rotary)
        self._prefill_reads, self._backend = prefill_reads, backend
        self._packed: CallTokens | None = None
        self._call: ForwardCall | None = None
        self._held = False  # whether it is laid out and finished apart from its forward call
        place = {
            layer: (pool, inner)
            for pool, group in enumerate(groups)
            for inner, layer in enumerate(group.layers)
        }
        self._layers = [
            CachedLayer(*place[layer], shape.windows[layer], rope_type_of(module, rotary), device, quantizer)
            for layer, (module, device, quantizer) in enumerate(
                zip(attention_modules(model), devices, quantizers, strict=True)
            )
        ]

    # ---- what users and transformers call ------------------------------------------------------------------------

    @torch.inference_mode()
    def append(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        rows: Sequence[int] | None = None,
        *,
        logits: str | int = "last",
    ) -> Tensor:
        """Run the model over new tokens of several sequences at once, without padding, and keep their K and V.

        Args:
            prompts: token ids of each sequence, lists or int tensors [S_i], of any lengths.
            rows: which sequences they continue; None: the open ones in order, or new ones if none is open.
            logits: ``last``: of each sequence's last token; ``all``: of every token; a number: of that many last
                tokens of each.

        Returns:
            [B, V] (``last``), [T, V] (``all``) or [B * number, V].

        Raises:
            DataError: an empty prompt, or more tokens than the model's context.
            PoolExhausted: the pool has no room; everything stored is intact.
        """
        device = input_device(self._model)
        ids = [torch.as_tensor(p, dtype=torch.int64).flatten().to(device) for p in prompts]
        lengths = [len(p) for p in ids]
        check_lengths(lengths)
        opened = self.open(len(ids)) if rows is None and not self.rows else []
        if rows is None:
            rows = self.rows
        if len(rows) != len(ids):
            raise DataError(
                f"one prompt per sequence is needed, got {len(ids)} prompts for {len(rows)} sequences"
            )
        positions = torch.cat(
            [torch.arange(n, device=device) + self.length(r) for n, r in zip(lengths, rows, strict=True)]
        )
        last_tokens = 1 if isinstance(logits, str) else logits
        # On the host: the last layers may be on another device than the ids.
        last = [end - back for end in cumulative_lengths(lengths)[1:] for back in range(last_tokens, 0, -1)]
        # As wide as the same call padded: generate() then finds its new tokens behind.
        self._packed = CallTokens(list(rows), lengths, max(lengths), None)
        try:
            out = self._model(
                input_ids=torch.cat(ids)[None],
                position_ids=positions[None],
                past_key_values=self,
                use_cache=True,
                logits_to_keep=0 if logits == "all" else last,
            )
        except BaseException:
            for row in opened:  # refused whole, or not at all
                self.free(row)
            raise
        finally:
            self._packed = None
        return out.logits[0]

    def crop(self, tokens_to_remove: int) -> None:
        """:meth:`StoredSequences.crop`; columns go with the tokens."""
        super().crop(tokens_to_remove)
        self.num_columns = max(0, self.num_columns + tokens_to_remove)

    def reset(self) -> None:
        """Forget every sequence; the pool stays."""
        super().reset()
        self.num_columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with sequence ``beam_idx[i]`` of the batch in place i, as beam search asks; int64 [B].

        Raises:
            PoolExhausted: no block is left for the copy of an open one; nothing has changed.
        """
        self.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` of the batch (int64 or bool), in this order; the others are freed."""
        chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.select(chosen.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Fork every sequence so that it stands ``repeats`` times in a row in the batch.

        Raises:
            PoolExhausted: ``max_sequences`` or the blocks do not suffice; nothing has changed.
        """
        self.select([place for place in range(len(self.rows)) for _ in range(repeats)])

    def get_num_columns(self) -> int:
        """Columns of padded batches seen so far; tells ``when_asked``."""
        if self.when_asked is not None:
            self.when_asked(self)
        return self.num_columns

    # ---- one forward call ------------------------------------------------------------------------------------

    def begin(self, batch: int, columns: int, attention_mask: Tensor | None, rotary: Any) -> None:
        """Lay out a forward call over [batch, columns] ids and reserve its blocks (called by the model's pre-hook).

        Raises:
            DataError: no token at all, one beyond the context, or a mix that a long rope cannot turn.
            PoolExhausted: no room; everything stored is intact.
        """
        if self._held:
            return
        if self._packed is None and not self.rows:
            self.open(batch)
        tokens = self._packed or padded_tokens(self.rows, batch, columns, attention_mask)
        check_lengths(tokens.lengths)
        past = [self.length(row) for row in tokens.rows]
        longest = max(p + n for p, n in zip(past, tokens.lengths, strict=True))
        if longest > self._max_length:
            raise DataError(
                f"a sequence may hold {self._max_length} tokens (the model's context), got {longest}; "
                "shorten the prompt or raise model.max_length"
            )
        if self._call_tokens is not None and sum(tokens.lengths) > self._call_tokens:
            raise DataError(
                f"one call may bring {self._call_tokens} new tokens (call_tokens), got {sum(tokens.lengths)}; "
                "append in chunks or raise call_tokens"
            )
        if self._rope_length is not None and longest > self._rope_length:
            raise DataError(f"rope_length must be at least {longest} (a sequence), got {self._rope_length}")
        if self._rope_switch is not None and self._rope_length is None:
            # A padded batch follows its longest sequence, as the model itself does.
            whole = (past, tokens.lengths) if self._packed else ([max(past)], [longest - max(past)])
            check_rope_switch(self._rope_switch, *whole)
        self._call = ForwardCall.reserve(tokens, self._layers, self._pools, rotary, self._rope_length)

    def finish(self) -> None:
        """Make the call's tokens part of their sequences.

        Raises:
            NonFiniteActivations: NaN, infinity or overflow in a key or value.
            PoolExhausted: outlier chunks ran out. Nothing of the call is kept in either case.
        """
        if self._held:
            return
        call, self._call = self._running(), None
        call.commit()
        self.num_columns += call.tokens.columns

    def lay_out(self, lengths: Sequence[int]) -> ForwardCall:
        """:meth:`begin` a call of so many new tokens of each open sequence, apart from its forward call.

        For forward calls that can neither copy from the host nor wait for the device, such as captured ones: they run
        in :meth:`laid_out`; :meth:`finish` may come before them.
        """
        self._packed = CallTokens(list(self.rows), list(lengths), max(lengths), None)
        try:
            self.begin(len(lengths), max(lengths), None, self._model.get_decoder().rotary_emb)
        finally:
            self._packed = None
        call = self._running()
        call.copy_layout()
        return call

    @contextlib.contextmanager
    def laid_out(self, call: ForwardCall) -> Iterator[None]:
        """Let the forward calls inside be ``call``, as often as it is repeated; they neither begin nor finish it."""
        before = self._call, self._held
        self._call, self._held = call, True
        try:
            yield
        finally:
            self._call, self._held = before

    def abandon(self) -> None:
        """Undo the reservations of a call that failed."""
        if self._call is not None:
            self._call.rollback()
        self._call = None

    def check_in_call(self) -> None:
        """Raise a ModelError unless :meth:`begin` has laid out the forward call that is running."""
        self._running()

    def _running(self) -> ForwardCall:
        if self._call is None:
            raise ModelError(
                "a quantized cache works only inside `with quantized_kv_cache(model, ...)` of its own model; "
                "enter the context again"
            )
        return self._call

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Store one layer's new keys and values and attend; [B, heads, S, D] in, [B, S, Hq, D] out."""
        assert window == self._layers[layer].window, "the window is the module's own"
        return self._running().attend(
            layer,
            query,
            keys,
            values,
            scaling=scaling,
            softcap=softcap,
            prefill_reads=self._prefill_reads,
            backend=self._backend,
            stopwatch=self.stopwatch,
        )
