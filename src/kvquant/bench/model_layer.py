"""Prefill of one decoder layer with random weights: what quantizing a prompt's keys and values is a share of."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from kvquant.bench.full_precision import SDPA
from kvquant.bench.shapes import LayerShape
from kvquant.bench.timing import Clock, Timing


class ModelLayer:
    """Norms, projections, rotation, causal attention and a gated MLP over one prompt of T tokens.

    Args:
        shape: of the layer.
        tokens: T.
        dtype: of weights and activations.
        device: where they are.
    """

    def __init__(self, shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.tokens = shape, tokens
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, spread: float = 1.0) -> Tensor:
            x = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
            return x.mul_(spread).to(dtype)

        width, inner = shape.hidden, shape.intermediate
        attended = shape.query_heads * shape.head_dim
        self.qkv = draw(attended + 2 * shape.channels, width, spread=width**-0.5)
        self.out = draw(width, attended, spread=attended**-0.5)
        self.gate_up = draw(2 * inner, width, spread=width**-0.5)
        self.down = draw(width, inner, spread=inner**-0.5)
        self.norms = torch.ones(2, width, dtype=dtype, device=device)
        self.input = draw(tokens, width)
        frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = torch.arange(tokens)[:, None] * frequency
        self.cos, self.sin = (table.to(device, dtype) for table in (angle.cos(), angle.sin()))

    @staticmethod
    def nbytes(shape: LayerShape, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of weights and of the activations alive at once, roughly."""
        attended = shape.query_heads * shape.head_dim
        weights = shape.hidden * (2 * attended + 2 * shape.channels + 3 * shape.intermediate)
        activations = tokens * (4 * shape.hidden + 4 * shape.intermediate + 3 * attended)
        return (weights + activations) * dtype.itemsize

    def prefill(self, backend: str) -> Tensor:
        """The layer's output, [T, hidden]."""
        x, shape, T = self.input, self.shape, self.tokens
        attended = shape.query_heads * shape.head_dim
        projected = F.linear(F.rms_norm(x, x.shape[-1:], self.norms[0]), self.qkv)
        heads = [
            part.view(T, -1, shape.head_dim).transpose(0, 1)[None]
            for part in projected.split([attended, shape.channels, shape.channels], -1)
        ]
        query, key = (self._rotate(part) for part in heads[:2])
        with sdpa_kernel(SDPA[backend]):
            seen = F.scaled_dot_product_attention(
                query, key, heads[2], is_causal=True, enable_gqa=shape.query_heads > shape.kv_heads
            )
        x = x + F.linear(seen[0].transpose(0, 1).reshape(T, attended), self.out)
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], self.norms[1]), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], -1)

    def measure(self, clock: Clock) -> tuple[str, Timing]:
        """Time of a prefill with the fastest attention, and that attention's name."""
        found: dict[str, Timing] = {}
        refusals = []
        for name in ("flash", "cudnn", "efficient") if clock.is_cuda else ("flash",):
            try:
                found[name] = clock.measure(functools.partial(self._prefill, name))
            except RuntimeError as error:  # a backend that does not take this shape
                refusals.append(f"{name}: {error}")
        if not found:
            raise RuntimeError(f"no attention ran for {self.shape}: {'; '.join(refusals)}")
        return min(found.items(), key=lambda entry: entry[1].median_s)

    def _prefill(self, backend: str, _: int) -> Tensor:
        return self.prefill(backend)
