"""Decode attention of the nuq family on a CPU by compiled loops: heads are shared out among PyTorch's threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvquant.compiled import byte_ones, can_compile, in_parts, raw
from kvquant.kernels import KeyStore, Rope, StoredLayer, ValueStore
from kvquant.packing import plane_widths
from kvquant.ragged import RaggedStep


def decodes_compiled(
    layer: Callable[[Tensor], tuple[Tensor, Tensor]], query: Tensor
) -> TypeGuard[StoredLayer]:
    """Whether :func:`attend_decode_compiled` serves a layer: packed codes as the nuq family keeps them, on a CPU."""
    return isinstance(layer, StoredLayer) and isinstance(layer.keys, KeyStore) and can_compile(query)


def attend_decode_compiled(
    query: Tensor,
    step: RaggedStep,
    layer: StoredLayer,
    rope: Rope | None,
    sinks: tuple[Tensor, Tensor] | None,
    *,
    block_size: int,
    blocks_per_tile: int,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one new token of each sequence; as :func:`kvquant.kernels.decode_attention.attend_decode`."""
    from kvquant.compiled.decode_loops import attend_heads

    B, Hq, D = query.shape
    keys, values, constants = layer.keys, layer.values, layer.constants
    assert isinstance(keys, KeyStore) and isinstance(values, ValueStore) and constants is not None
    H = keys.codes.shape[1]
    queries = query.float() * softmax_scale
    out = torch.empty(B, Hq, D)
    if rope is None:
        turns = [torch.empty(block_size, 0)] * 2 + [torch.empty(1, 0)] * 2
    else:
        turns = list(rope)
    exact = (torch.empty(B, 0, H, D),) * 2 if sinks is None else tuple(x.float() for x in sinks)
    widest = max(step.kv_lengths)
    ranges = (constants.key_zero, constants.key_scale)

    def work(first: int, last: int) -> None:
        tile = torch.empty(block_size, D)
        key_store, key_side = _side(keys.codes, layer.key_bits, constants.key_centroids, tile)
        value_store, value_side = _side(values.codes, layer.value_bits, constants.value_centroids, tile)
        attend_heads(
            queries.numpy(),
            raw(step.block_table.contiguous()),
            np.array(step.kv_lengths),
            widest if window is None else window,
            0.0 if softcap is None else softcap,
            tuple(raw_floats(x) for x in turns),
            blocks_per_tile,
            (key_store, *(raw(x) for x in keys[1:8])),
            key_side,
            tuple(raw_floats(x) for x in ranges),
            (value_store, *(raw(x) for x in values[1:])),
            value_side,
            _floats(values.zero.dtype),
            tuple(raw_floats(x) for x in exact),
            tile.numpy(),
            out.numpy(),
            first,
            last,
        )

    in_parts(B * H, 2 * sum(step.kv_lengths) * H * D, work)
    return out.to(query.dtype)


def raw_floats(x: Tensor) -> NDArray[np.float32]:
    """The memory of an fp32 tensor, contiguous, as numpy sees it."""
    return x.detach().contiguous().numpy()


def _side(codes: Tensor, bits: int, centroids: Tensor, tile: Tensor) -> tuple[NDArray[Any], tuple[Any, ...]]:
    """Codes of a side as integers, and what `attend_heads` wants to know of them; with codes of a tile to work in."""
    widths, ones = np.array(plane_widths(bits)), byte_ones(tile.shape[1], min(plane_widths(bits)))
    word = torch.uint8 if ones == 1 else torch.int64
    rows = torch.empty(tile.shape, dtype=torch.uint8)
    return raw(codes.view(word)), (widths, ones, raw_floats(centroids), raw(rows), raw(rows.view(word)))


@functools.lru_cache(maxsize=2)
def _floats(dtype: torch.dtype) -> NDArray[np.float32]:
    """What each pattern of 16 bits stands for, fp32 [65536]."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float().numpy()
