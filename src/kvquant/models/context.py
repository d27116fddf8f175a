"""``with quantized_kv_cache(model, calibration) as kv:`` a model that keeps its keys and values in our blocks."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.errors import ModelError
from kvquant.models.attention_hook import forward_hooks, replaced_attention
from kvquant.models.cache import QuantizedCache
from kvquant.models.devices import layer_devices
from kvquant.models.loading import ModelShape, model_shape
from kvquant.models.rotary import rope_switch


class KVHandle:
    """What :func:`quantized_kv_cache` yields: makes caches for its model."""

    def __init__(
        self,
        model: PreTrainedModel,
        quantizers: Sequence[BatchedKVQuantizer],
        shape: ModelShape,
        defaults: dict[str, Any],
    ) -> None:
        self.model, self.quantizers, self.shape, self._defaults = model, quantizers, shape, defaults
        self._latest: weakref.ref[QuantizedCache] | None = None  # whose length was asked for last

    def new_cache(self, **settings: Any) -> QuantizedCache:
        """Preallocate a cache.

        Args:
            settings: any of ``num_blocks``, ``memory_budget_gib``, ``max_sequences``, ``block_size``,
                ``prefill_reads``, ``backend``, ``spill_headroom``, ``max_length``, ``rope_length`` (tokens at which
                rotary frequencies that depend on the length are taken; without it, that of each call's longest
                sequence), ``call_tokens`` (the most new tokens of one call, all sequences together; layers with a
                sliding window then get only the blocks that their windows need). Without a size, the first call allocates for its sequences at the model's full context.

        Raises:
            PoolExhausted: the size asked for does not fit the memory; says what would.
        """
        known = {
            "block_size": 64,
            "num_blocks": None,
            "memory_budget_gib": None,
            "max_sequences": None,
            "spill_headroom": 2.0,
            "prefill_reads": "quantized",
            "backend": "auto",
            "max_length": self.shape.max_length,
            "rope_length": None,
            "call_tokens": None,
        }
        unknown = set(settings) - set(known)
        if unknown:
            raise TypeError(f"new_cache takes {', '.join(known)}, got {', '.join(sorted(unknown))}")
        cache = QuantizedCache(
            self.model, self.quantizers, self.shape, **{**known, **self._defaults, **settings}
        )
        cache.when_asked = self._note
        return cache

    def _note(self, cache: QuantizedCache) -> None:
        self._latest = weakref.ref(cache)

    def _emptied_for_long_rope(self, columns: int, rotary: Any) -> QuantizedCache | None:
        """The cache to fill anew when generate() drops it because a long rope changes its frequencies (Phi-3).

        It has asked that cache for its length just before, to find out.
        """
        switch = rope_switch(rotary)
        cache = None if self._latest is None else self._latest()
        if switch is None or cache is None or not cache.num_columns <= switch < columns:
            return None
        cache.reset()
        return cache


@contextlib.contextmanager
def quantized_kv_cache(model: PreTrainedModel, calibration: Any, **defaults: Any) -> Iterator[KVHandle]:
    """Let a model keep its keys and values in quantized blocks while the context lasts.

    Args:
        model: a supported transformers model; it is left exactly as it was.
        calibration: one :class:`BatchedKVQuantizer` per layer, or an object with such ``quantizers``.
        defaults: settings for every :meth:`KVHandle.new_cache`.

    Raises:
        ModelError: the family is not supported, the calibration has other layers or heads, or layers are offloaded.
    """
    quantizers = getattr(calibration, "quantizers", calibration)
    shape = model_shape(model)
    found = [(q.num_kv_heads, q.head_dim) for q in quantizers]
    if found != [(shape.num_kv_heads, shape.head_dim)] * shape.num_layers:
        raise ModelError(
            f"the calibration must be for {shape.num_layers} layers of {shape.num_kv_heads} heads x {shape.head_dim}, "
            f"got {len(found)} layers of {found[0] if found else 'nothing'}; calibrate this model"
        )
    quantizers = [q.to(device) for q, device in zip(quantizers, layer_devices(model), strict=True)]
    handle = KVHandle(model, quantizers, shape, defaults)
    decoder: Any = model.get_decoder()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        batch, columns = (ids if ids is not None else kwargs["inputs_embeds"]).shape[:2]
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = handle._emptied_for_long_rope(columns, decoder.rotary_emb)
        cache = _our_cache(cache)
        cache.begin(batch, columns, kwargs.get("attention_mask"), decoder.rotary_emb)
        return args, {**kwargs, "past_key_values": cache}

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, QuantizedCache):
            return
        if output is None:  # the forward call raised
            cache.abandon()
        else:
            cache.finish()

    def attend(
        module: nn.Module,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        cache: Any,
        scaling: float,
        **kwargs: Any,
    ) -> Tensor:
        return _our_cache(cache).attend(
            int(module.layer_idx),  # type: ignore[arg-type]
            query,
            keys,
            values,
            scaling=scaling,
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
        )

    with replaced_attention(model, attend), forward_hooks([decoder], before=before, after=after):
        yield handle


def _our_cache(cache: Any) -> QuantizedCache:
    if not isinstance(cache, QuantizedCache):
        raise ModelError(
            f"past_key_values must be a cache of this context, got {type(cache).__name__}; pass kv.new_cache()"
        )
    return cache
