"""Rotary tables for one forward call, taken from the model's own rotary embedding.

Some models (Gemma 3) have one embedding per layer type; some (long rope) change frequencies with the length of the
text. All tables of a call are made at one length, or queries and stored keys would be turned by different angles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvquant.errors import DataError
from kvquant.kernels import Rope


class CallRope(NamedTuple):
    """The tables that layers of one type need in one call."""

    keys: Rope
    query_cos: Tensor  # [T, R] fp32, of every new token
    query_sin: Tensor  # [T, R]

    def to(self, device: torch.device) -> CallRope:
        """The same tables on another device."""
        return CallRope(
            Rope(*(table.to(device) for table in self.keys)),
            self.query_cos.to(device),
            self.query_sin.to(device),
        )


def rope_type_of(module: Any, rotary: Any) -> str | None:
    """Layer type by which an attention module chooses among the tables of ``rotary``; None if there is one set."""
    return str(module.layer_type) if isinstance(rotary.rope_type, dict) else None


def call_rope(
    rotary: Any, layer_type: str | None, positions: Tensor, *, longest: int, rope_length: int, tile: int
) -> CallRope:
    """Make the tables of a call.

    Args:
        rotary: the decoder's rotary embedding.
        layer_type: from :func:`rope_type_of`.
        positions: of every new token, int64 [T].
        longest: tokens of the longest sequence once this call is stored.
        rope_length: length in tokens at which length-dependent frequencies are taken, at least ``longest``.
        tile: tokens of a key tile.
    """
    device = positions.device

    def tables(at: Tensor) -> tuple[Tensor, Tensor]:
        # The highest position decides the frequencies of a long rope: it is asked for and dropped. Positions beyond it
        # only fill up a tile.
        at = torch.cat([at.clamp(max=rope_length - 1), at.new_tensor([rope_length - 1])])
        cos, sin = rotary(torch.empty(0, device=device), at[None], *([layer_type] if layer_type else []))
        # Back from where a device_map has put the embedding.
        return cos[0, :-1].to(device), sin[0, :-1].to(device)

    query_cos, query_sin = tables(positions)
    cos, sin = tables(torch.arange(tile, device=device))
    base_cos, base_sin = tables(torch.arange(-(-longest // tile), device=device) * tile)
    half = cos.shape[-1] // 2
    prefix = f"{layer_type}_" if layer_type else ""
    factor = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    # Once a call: kernels would copy what is not contiguous once a layer.
    cos, sin = (table[:, :half].contiguous() for table in (cos, sin))
    rope = Rope(cos, sin, base_cos[:, :half] / factor, base_sin[:, :half] / factor)
    return CallRope(rope, query_cos, query_sin)


def rotated_channels(rotary: Any) -> int | None:
    """Channels of a head that the model rotates; None if its embedding has no frequencies."""
    counts = [2 * len(buffer) for name, buffer in rotary.named_buffers() if name.endswith("inv_freq")]
    return max(counts, default=None)


def rope_switch(rotary: Any) -> int | None:
    """Tokens after which a long rope takes its long frequencies; None for any other kind."""
    if rotary.rope_type != "longrope":
        return None
    return int(rotary.config.rope_parameters["original_max_position_embeddings"])


def check_rope_switch(switch: int, past: Sequence[int], lengths: Sequence[int]) -> None:
    """Refuse a call that would mix the short and the long frequencies of a long rope.

    Raises:
        DataError: a stored sequence grows past the switch, or the sequences of the call lie on both sides of it.
    """
    fix = f"give new_cache(rope_length=...) the longest text to come (over {switch}) for long frequencies throughout"
    after = [p + n > switch for p, n in zip(past, lengths, strict=True)]
    if any(p and a != (p > switch) for p, a in zip(past, after, strict=True)):
        raise DataError(
            f"a stored sequence may not grow past {switch} tokens, where this model's rotary frequencies change; {fix}, "
            "or free it and append the whole text anew"
        )
    if len(set(after)) > 1:
        raise DataError(
            f"sequences of one call must lie on one side of {switch} tokens, where this model's rotary frequencies "
            f"change; append the longer ones separately, or {fix}"
        )
