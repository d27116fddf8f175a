"""Put our own function in place of a model's attention, and take it out again.

The mechanism: a forward pre-hook on every attention module swaps the rotary embedding for the identity, so that the
cache's K is the pre-RoPE one (un-rotating afterwards is not exact in bf16), and hands the real embedding and the
cache on; a function registered with transformers' AttentionInterface does the rest. Both are removed on exit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvquant.errors import ModelError
from kvquant.models.no_rotation import identity_left_out, identity_tables

# query [B, Hq, S, D], keys and values [B, H, S, D], all before rotation -> output [B, S, Hq, D]
AttentionFunction = Callable[..., Tensor]
_IMPLEMENTATION = "kvquant"
_installed: set[int] = set()  # ids of models
_borrowed: dict[int, _Borrowed] = {}  # by id of config


class _Implementation(str):
    """Our name in a config. A deep copy of the config gets back what was there before: it has no context."""

    before: str | None

    def __deepcopy__(self, memo: dict[int, Any]) -> str | None:
        return self.before


@dataclasses.dataclass
class _Borrowed:
    """A config that names our implementation, for ``users`` models that share it."""

    config: Any
    before: str | None
    users: int = 0


class _Hook:
    """A forward hook that does nothing in a deep copy of its module."""

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self._function = function

    # A model compiled while the context lasts runs the rest of itself compiled, around these.
    @torch.compiler.disable
    def __call__(self, *args: Any) -> Any:
        return None if self._function is None else self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the self-attention modules of a decoder, in layer order.

    Raises:
        ModelError: none were found.
    """
    decoder: Any = getattr(model, "model", model)
    found: list[Any] = [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no attention module with layer_idx and o_proj; try a Llama-architecture model"
        )
    return sorted(found, key=lambda module: int(module.layer_idx))


@contextlib.contextmanager
def forward_hooks(
    modules: Iterable[nn.Module],
    *,
    before: Callable[..., Any],
    after: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """Run ``before(module, args, kwargs)`` and ``after(module, args, kwargs, output)`` around modules' forward calls.

    ``after`` also runs, with ``None`` as output, when the call raised. A deep copy of a module runs neither.
    """
    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(_Hook(before), with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(_Hook(after), with_kwargs=True, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replaced_attention(model: PreTrainedModel, function: AttentionFunction) -> Iterator[None]:
    """Run ``function(module, query, keys, values, cache=, rope=, scaling=, **kwargs)`` as the model's attention.

    ``rope`` is the module's (cos, sin), ``cache`` what was passed as past_key_values. On exit, also after an
    exception, hooks and attention implementation are as they were.

    Raises:
        ModelError: the model's attention is replaced already, or the model is compiled.
    """
    if id(model) in _installed:
        raise ModelError("this model's attention is replaced already; leave the outer context first")
    _refuse_compiled(model)

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        cos, sin = kwargs["position_embeddings"]
        own = {
            "kvquant_function": function,
            "kvquant_rope": (cos, sin),
            "kvquant_cache": kwargs.get("past_key_values"),
        }
        return args, {**kwargs, **own, "position_embeddings": identity_tables(cos)}

    _register()
    modules = attention_modules(model)
    _installed.add(id(model))
    try:
        with (
            forward_hooks(modules, before=before),
            _named_in_configs(model, modules),
            identity_left_out(modules),
        ):
            yield
    finally:
        _installed.discard(id(model))


@contextlib.contextmanager
def _named_in_configs(model: PreTrainedModel, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Name our implementation in every config that the attention of a model reads."""
    # Assigned directly: set_attn_implementation also changes sub-configs whose modules we leave alone.
    decoder: Any = model.get_decoder()
    configs = {id(m.config): m.config for m in [model, decoder, *modules]}  # type: ignore[union-attr]
    for key, config in configs.items():
        entry = _borrowed.setdefault(key, _Borrowed(config, config._attn_implementation_internal))
        entry.users += 1
        name = _Implementation(_IMPLEMENTATION)
        name.before = entry.before
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for key in configs:
            entry = _borrowed[key]
            entry.users -= 1
            if entry.users == 0:
                entry.config._attn_implementation_internal = entry.before
                del _borrowed[key]


def _refuse_compiled(model: nn.Module) -> None:
    """Raise ModelError for a model that torch.compile has wrapped: its hooks and verbs would not be seen."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelError(
                f"the model must not be compiled, {name or 'it'} is (hooks change its attention); pass the original "
                "(model._orig_mod of torch.compile(model)), and compile after leaving the context"
            )


def _register() -> None:
    """Make the implementation known to transformers; harmless to repeat, and inert unless a model selects it."""
    AttentionInterface.register(_IMPLEMENTATION, _dispatch)
    AttentionMaskInterface.register(_IMPLEMENTATION, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout of a call says which tokens exist: no mask is ever built."""


@torch.compiler.disable
def _dispatch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    kvquant_function: AttentionFunction | None = None,
    kvquant_rope: tuple[Tensor, Tensor] | None = None,
    kvquant_cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if kvquant_function is None:
        raise ModelError(
            "this model shares its config object with one whose attention is replaced; leave that context first, or "
            "give each model a config of its own"
        )
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
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if int(module.layer_idx) == 0:  # type: ignore[arg-type]
            collected.clear()
        if keys.requires_grad:
            keys.retain_grad()
            values.retain_grad()
        collected.append((keys, values))
        cos, sin = (table[:, None] for table in rope)
        out = causal_attention(
            rotate(query, cos, sin), rotate(keys, cos, sin), values, scaling, sliding_window, softcap
        )
        return out.transpose(1, 2)

    with replaced_attention(model, attend):
        yield collected


def causal_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """Differentiable causal attention of [B, Hq, S, D] over [B, H, S, D], as the models' own eager form does it."""
    S, window = query.shape[-2], None if window is None or window >= query.shape[-2] else window
    if window is None and softcap is None:
        return nn.functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scaling, enable_gqa=True
        )
    visible = torch.ones(S, S, dtype=torch.bool, device=query.device).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, scale=scaling, enable_gqa=True
        )
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    scores = torch.tanh(query @ keys.transpose(-1, -2) * scaling / softcap) * softcap
    scores = scores.float().masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).to(query.dtype) @ values


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of [..., D] by full tables [..., R] (Su et al. 2021, half-split form).

    Computed in fp32 whatever the dtype, and returned in it.
    """
    R = cos.shape[-1]
    part, rest = x[..., :R].float(), x[..., R:]
    half = torch.cat([-part[..., R // 2 :], part[..., : R // 2]], dim=-1)
    turned = (part * cos + half * sin).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
