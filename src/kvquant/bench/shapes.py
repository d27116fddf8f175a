"""Attention layers of well-known models, by name: the shapes that benchmarks run at. Nothing heavy is imported here."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        query_heads: Hq.
        kv_heads: H; Hq / H query heads share one.
        head_dim: D.
        hidden: width of the residual stream.
        intermediate: width of the gated MLP.
        rope_theta: base of the rotary frequencies.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    rope_theta: float

    @property
    def channels(self) -> int:
        """Channels of a token's keys, C = H * D."""
        return self.kv_heads * self.head_dim


SHAPES = {
    "llama2_7b": LayerShape(32, 32, 128, 4096, 11008, 10_000.0),
    "llama31_8b": LayerShape(32, 8, 128, 4096, 14336, 500_000.0),
    "qwen3_8b": LayerShape(32, 8, 128, 4096, 12288, 1_000_000.0),
    "phi3_mini": LayerShape(32, 32, 96, 3072, 8192, 10_000.0),
    # For tests and for looking at a change in seconds; nobody's model.
    "small": LayerShape(4, 2, 64, 256, 512, 10_000.0),
}
