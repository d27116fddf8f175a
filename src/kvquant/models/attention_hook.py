"""Put our own function in place of a model's attention, and take it out again.

The mechanism: a forward pre-hook on every attention module swaps the rotary embedding for the identity, so that the
cache's K is the pre-RoPE one (un-rotating afterwards is not exact in bf16), and hands the real embedding and the
cache on; a function registered with transformers' AttentionInterface does the rest. Both are removed on exit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvquant.errors import ModelError

# query [B, Hq, S, D], keys and values [B, H, S, D], all before rotation -> output [B, S, Hq, D]
AttentionFunction = Callable[..., Tensor]
_IMPLEMENTATION = "kvquant"
_installed: dict[int, int] = {}  # id of model -> how often; one at a time


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the self-attention modules of a decoder, in layer order.

    Raises:
        ModelError: none were found.
    """
    decoder: Any = getattr(model, "model", model)
    found = [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no attention module with layer_idx and o_proj; try a Llama-architecture model"
        )
    return sorted(found, key=lambda module: int(module.layer_idx))  # type: ignore[arg-type]


@contextlib.contextmanager
def replaced_attention(model: PreTrainedModel, function: AttentionFunction) -> Iterator[None]:
    """Run ``function(module, query, keys, values, cache=, rope=, scaling=, **kwargs)`` as the model's attention.

    ``rope`` is the module's (cos, sin), ``cache`` what was passed as past_key_values. On exit, also after an
    exception, hooks and attention implementation are as they were.

    Raises:
        ModelError: the model's attention is replaced already.
    """
    if id(model) in _installed:
        raise ModelError("this model's attention is replaced already; leave the outer context first")

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        cos, sin = kwargs["position_embeddings"]
        identity = (torch.ones_like(cos), torch.zeros_like(sin))
        own = {
            "kvquant_function": function,
            "kvquant_rope": (cos, sin),
            "kvquant_cache": kwargs.get("past_key_values"),
        }
        return args, {**kwargs, **own, "position_embeddings": identity}

    previous = model.config._attn_implementation
    _register()
    handles = []
    _installed[id(model)] = 1
    try:
        handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in attention_modules(model)]
        model.set_attn_implementation(_IMPLEMENTATION)
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(previous)
        del _installed[id(model)]


def _register() -> None:
    """Make the implementation known to transformers; harmless to repeat, and inert unless a model selects it."""
    AttentionInterface.register(_IMPLEMENTATION, _dispatch)
    AttentionMaskInterface.register(_IMPLEMENTATION, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout of a call says which tokens exist: no mask is ever built."""


def _dispatch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    kvquant_function: AttentionFunction,
    kvquant_rope: tuple[Tensor, Tensor],
    kvquant_cache: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out = kvquant_function(
        module, query, key, value, cache=kvquant_cache, rope=kvquant_rope, scaling=scaling, **kwargs
    )
    return out, None


@contextlib.contextmanager
def record_keys_and_values(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Run a model exactly, collecting every layer's pre-RoPE keys and values.

    Yields a list that each forward call (without a cache, rows of equal length) fills anew with one
    ``(keys, values)`` per layer, [B, H, S, D] each; they are part of the autograd graph and keep their gradients.
    """
    collected: list[tuple[Tensor, Tensor]] = []

    def attend(
        module: nn.Module,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        rope: tuple[Tensor, Tensor],
        scaling: float,
        **kwargs: Any,
    ) -> Tensor:
        if int(module.layer_idx) == 0:  # type: ignore[arg-type]
            collected.clear()
        if keys.requires_grad:
            keys.retain_grad()
            values.retain_grad()
        collected.append((keys, values))
        cos, sin = (table[:, None] for table in rope)
        out = nn.functional.scaled_dot_product_attention(
            rotate(query, cos, sin),
            rotate(keys, cos, sin),
            values,
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        return out.transpose(1, 2)

    with replaced_attention(model, attend):
        yield collected


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of [..., D] by full tables [..., R] (Su et al. 2021, half-split form).

    Computed in fp32 whatever the dtype, and returned in it.
    """
    R = cos.shape[-1]
    part, rest = x[..., :R].float(), x[..., R:]
    half = torch.cat([-part[..., R // 2 :], part[..., : R // 2]], dim=-1)
    turned = (part * cos + half * sin).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
