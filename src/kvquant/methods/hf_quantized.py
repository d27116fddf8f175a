"""The outside baseline: transformers' own QuantizedCache with its quanto or HQQ backend (extra ``[hf]``).

It keeps no blocks and dequantizes its whole history at every call, so it takes part in tables of quality and bytes
only. A text is read in pieces of its residual length: within one, tokens see each other exactly and everything before
dequantized, which is what decoding token by token shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import QuantizedCache

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import BlockLayout
from kvquant.errors import ConfigError
from kvquant.spec import QuantSpec

_BITS = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8)}


class Method(BatchedKVQuantizer):
    """``options.backend`` quanto or hqq, ``options.group_size`` its group, ``quant.recent_tokens`` its residual length."""

    default_options: ClassVar[Mapping[str, Any]] = {"backend": "quanto", "group_size": 64}
    own_store = True
    outside = True
    calibrated = False

    @classmethod
    def check(cls, spec: QuantSpec) -> None:
        """Backends and the widths they have."""
        super().check(spec)
        backend = spec.option("backend", "quanto")
        if backend not in _BITS:
            raise ValueError(
                f"quant.options.backend must be one of {', '.join(_BITS)}, got {backend}; try hqq"
            )
        widths = ", ".join(map(str, _BITS[backend]))
        if spec.key_bits != spec.value_bits or spec.bits not in _BITS[backend]:
            raise ValueError(
                f"quant.bits must be one of {widths} for keys and values alike with the {backend} backend of "
                f"quant=hf_quantized, got {spec.key_bits}/{spec.value_bits}; try 4"
            )
        if spec.recent_tokens < 1:
            raise ValueError(
                f"quant.recent_tokens must be 1 or more with quant=hf_quantized, got {spec.recent_tokens}; try 128"
            )
        if spec.outlier_fraction or spec.sink_tokens:
            raise ValueError(
                "quant.outlier_fraction and quant.sink_tokens must be 0 with quant=hf_quantized, which has neither, got "
                f"{spec.outlier_fraction} and {spec.sink_tokens}; try quant=nuq"
            )

    def layout(
        self, num_layers: int, dtype: torch.dtype, block_size: int, spill_headroom: float
    ) -> BlockLayout:
        """There are none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "quant=hf_quantized keeps a cache of its own instead of blocks; try task=perplexity or task=compare"
        )

    @classmethod
    @torch.inference_mode()
    def run(cls, model: Any, spec: QuantSpec, token_ids: Tensor) -> tuple[Tensor, int, int]:
        """Read one sequence; returns logits [n, V], bytes held at its end and numbers of K and V stored.

        Raises:
            ConfigError: the backend is not installed.
        """
        backend = spec.option("backend", "quanto")
        # HQQ counts the axes of its groups from 0 to 1, quanto from the front or the back: both defaults are 0.
        settings = {"nbits": spec.bits, "q_group_size": spec.option("group_size", 64)}
        try:
            cache = QuantizedCache(
                backend,
                model.config,
                residual_length=spec.recent_tokens,
                axis_key=0,
                axis_value=0,
                **settings,
            )
        except ImportError as error:
            raise ConfigError(
                f"quant=hf_quantized needs the package of its backend {backend}, which is missing; pip install 'kvquant[hf]'"
            ) from error
        pieces = [
            model(input_ids=piece[None].to(model.device), past_key_values=cache, use_cache=True).logits[0]
            for piece in token_ids.split(spec.recent_tokens)
        ]
        held = sum(
            tensor_bytes(x)
            for layer in cache.layers
            for x in (layer._quantized_keys, layer._quantized_values)
        )
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
        # The residual as full as it gets: read in whole pieces it is empty whenever one could look.
        held += spec.recent_tokens * per_token * model.dtype.itemsize
        elements = len(token_ids) * per_token
        return torch.cat(pieces), held, elements


def tensor_bytes(value: Any) -> int:
    """Bytes of every tensor in nested containers; a tensor made of others (quanto's) counts as those."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__") and type(value) is not Tensor:
            names, _ = value.__tensor_flatten__()
            return sum(tensor_bytes(getattr(value, name)) for name in names)
        return value.untyped_storage().nbytes()
    if isinstance(value, Mapping):
        return sum(tensor_bytes(x) for x in value.values())
    if isinstance(value, list | tuple):
        return sum(tensor_bytes(x) for x in value)
    return 0
