"""Attention over a full-precision cache, in every way that this torch and this machine have: the fastest is the rival.

A cache may keep the layout that suits its kernel, so the ways that want tokens outermost get it; laying it out is not
timed. Query heads that share a KV head are passed both as extra heads and, where all of them see the same keys, as
extra queries of that head.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kvquant.bench.shapes import LayerShape
from kvquant.bench.timing import Clock, Timing, Way

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# A way that takes this many times the fastest one's time does not become the fastest in a graph.
_MOST_BEHIND = 1.2
# A matrix of all scores beyond this is not made: nobody would.
_MOST_SCORE_BYTES = 4 << 30
WAYS = ("sdpa", "varlen", "flex", "flash_attn")


class FullPrecision:
    """Keys and values [B, H, T, D], ``copies`` of them, and the last ``new`` tokens' queries [B, Hq, new, D].

    Args:
        shape: of the layer.
        lengths: tokens of each sequence, the new ones included.
        new: queries of each sequence: 1 decodes; more are a chunk, which is causal.
        copies: how many caches take turns.
        dtype: of everything.
        device: where it is.
    """

    def __init__(
        self,
        shape: LayerShape,
        lengths: Sequence[int],
        new: int,
        copies: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape, self.lengths, self.new, self.copies = shape, list(lengths), new, copies
        self.device = device
        B, T = len(lengths), max(lengths)
        H, D = shape.kv_heads, shape.head_dim
        self.G = shape.query_heads // H
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        self.query = draw(B, shape.query_heads, new, D)
        self.keys, self.values = (draw(copies, B, H, T, D) for _ in range(2))
        self.is_ragged = len(set(lengths)) > 1

    @staticmethod
    def nbytes(shape: LayerShape, lengths: Sequence[int], copies: int, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of all copies, padding included."""
        return 2 * copies * len(lengths) * max(lengths) * shape.channels * dtype.itemsize

    def measure(
        self,
        clock: Clock,
        kinds: Sequence[str],
        step: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> dict[str, Timing | str]:
        """Time every way; one that cannot run has the reason in its place.

        Args:
            clock: measures.
            kinds: which of `WAYS` to try.
            step: entered with each way's name while it is measured.
        """
        return self._time(kinds, lambda make: clock.measure(make(), self.copies), step)

    def measure_graph(
        self,
        clock: Clock,
        kinds: Sequence[str],
        found: dict[str, Timing | str],
        step: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> dict[str, Timing | str]:
        """Time the fastest ways, and what is close to them, as part of a CUDA graph.

        Args:
            clock: measures.
            kinds: which of `WAYS` were tried.
            found: what :meth:`measure` gave.
            step: entered with each way's name while it is measured.
        """
        best = fastest(found)
        most_s = 0.0 if best is None else _MOST_BEHIND * best[1].median_s
        close = {name for name, t in found.items() if isinstance(t, Timing) and t.median_s <= most_s}
        return self._time(kinds, lambda make: clock.graph(make(), self.copies), step, close)

    def _time(
        self,
        kinds: Sequence[str],
        measure: Callable[[Callable[[], Way]], Timing],
        step: Callable[[str], AbstractContextManager[None]],
        only: set[str] | None = None,
    ) -> dict[str, Timing | str]:
        found: dict[str, Timing | str] = {}
        for name, make in self.ways(kinds):
            if only is not None and name not in only:
                continue
            try:
                with step(name), warnings.catch_warnings():
                    # A backend that refuses warns of every condition that it misses.
                    warnings.simplefilter("ignore")
                    found[name] = measure(make)
            except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
                found[name] = (" ".join(str(error).split()) or type(error).__name__)[:200]
        return found

    def ways(self, kinds: Sequence[str]) -> Iterator[tuple[str, Callable[[], Way]]]:
        """Name and maker of every way of these kinds."""
        if "sdpa" in kinds:
            names = SDPA if self.device.type == "cuda" else ("flash", "math")
            for name in names:
                yield f"sdpa_{name}", partial(self._sdpa, name, as_queries=False)
                if self.G > 1 and self.new == 1:
                    yield f"sdpa_{name}_grouped", partial(self._sdpa, name, as_queries=True)
        if self.device.type != "cuda":
            return
        if "varlen" in kinds and importlib.util.find_spec("torch.nn.attention.varlen"):
            yield "varlen", self._varlen
        if "flex" in kinds:
            yield "flex", self._flex
        if "flash_attn" in kinds:
            for module in ("flash_attn", "flash_attn_interface"):
                if importlib.util.find_spec(module):
                    yield module, partial(self._flash_attn, module)

    def _sdpa(self, name: str, *, as_queries: bool) -> Way:
        B, Hq, C, D = self.query.shape
        H, T = self.shape.kv_heads, self.keys.shape[3]
        if name == "math" and B * Hq * C * T * 4 > _MOST_SCORE_BYTES:
            raise ValueError("would make a matrix of all scores of more than 4 GiB")
        query = self.query.view(B, H, self.G, D) if as_queries else self.query
        gqa = self.G > 1 and not as_queries
        backend = SDPA[name]

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)

        mask: Tensor | None = None
        if C > 1:
            # Flash attention has a causal mode for the last rows, the others take a mask.
            mask = causal_lower_right(C, T)
            if name != "flash":
                at = torch.arange(T - C, T, device=self.device)
                mask = torch.arange(T, device=self.device) <= at[:, None]
        if not self.is_ragged:
            return lambda i: attend(query, self.keys[i], self.values[i], mask)
        if name == "flash":  # takes no mask: sequence by sequence
            return lambda i: [
                attend(
                    query[b : b + 1], self.keys[i, b : b + 1, :, :n], self.values[i, b : b + 1, :, :n], None
                )
                for b, n in enumerate(self.lengths)
            ]
        held = torch.tensor(self.lengths, device=self.device)[:, None, None, None]
        mask = torch.arange(T, device=self.device) < held  # [B, 1, 1, T]
        return lambda i: attend(query, self.keys[i], self.values[i], mask)

    def _tokens_outermost(self) -> tuple[Tensor, Tensor]:
        """Keys and values without padding, [copies, sum of T, H, D]."""
        parts = [
            torch.cat([x[:, b, :, :n].transpose(1, 2) for b, n in enumerate(self.lengths)], 1)
            for x in (self.keys, self.values)
        ]
        return parts[0], parts[1]

    def _varlen(self) -> Way:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        keys, values = self._tokens_outermost()
        B, Hq, C, D = self.query.shape
        H, T = self.shape.kv_heads, max(self.lengths)
        ends = torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)
        options: dict[str, Any] = {}
        if C == 1:
            query = self.query.view(B, H, self.G, D).transpose(1, 2).reshape(B * self.G, H, D)
            rows = self.G
        else:
            query, rows = self.query.transpose(1, 2).reshape(B * C, Hq, D), C
            known = inspect.signature(varlen_attn).parameters
            options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
            if "enable_gqa" in known:
                options["enable_gqa"] = self.G > 1
            elif self.G > 1:
                keys, values = (x.repeat_interleave(self.G, 2) for x in (keys, values))
        query_ends = torch.arange(B + 1, device=self.device, dtype=torch.int32) * rows
        return lambda i: varlen_attn(query, keys[i], values[i], query_ends, ends, rows, T, **options)

    def _flex(self) -> Way:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention)
        B, _, C, _ = self.query.shape
        T = max(self.lengths)
        options: dict[str, Any] = {"enable_gqa": self.G > 1}
        if self.is_ragged:
            held = torch.tensor(self.lengths, device=self.device)
            options["block_mask"] = create_block_mask(
                lambda b, h, q, k: k < held[b], B, None, C, T, device=self.device
            )
        elif C > 1:
            options["block_mask"] = create_block_mask(
                lambda b, h, q, k: k <= q + (T - C), None, None, C, T, device=self.device
            )
        return lambda i: compiled(self.query, self.keys[i], self.values[i], **options)

    def _flash_attn(self, name: str) -> Way:
        module = importlib.import_module(name)
        if self.is_ragged:
            raise ValueError("ragged caches go through varlen")
        keys, values = (x.transpose(2, 3).contiguous() for x in (self.keys, self.values))
        query = self.query.transpose(1, 2).contiguous()
        if self.new > 1:
            return lambda i: module.flash_attn_func(query, keys[i], values[i], causal=True)
        return lambda i: module.flash_attn_with_kvcache(query, keys[i], values[i])


def fastest(found: dict[str, Timing | str]) -> tuple[str, Timing] | None:
    """The fastest way that ran, with its name."""
    ran = [(name, timing) for name, timing in found.items() if isinstance(timing, Timing)]
    return min(ran, key=lambda entry: entry[1].median_s, default=None)
