"""What methods with tensors of their own have in common: constants without key ranges, and views."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from kvquant import nuq
from kvquant.block_layout import MethodLayout, Shapes
from kvquant.kernels import LayerConstants, LayerStore, MethodStore, ValueStore

Reader: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]  # block ids [S, P] -> tiles [S, H, P*BS, D]


def constants(H: int, D: int, key_codebook: Tensor, value_codebook: Tensor) -> LayerConstants:
    """Layer constants of a method whose key ranges are found online; thresholds stay unused."""
    nothing = torch.zeros(H, D)
    return LayerConstants(
        key_lower=nothing,
        key_upper=nothing,
        key_zero=nothing,
        key_scale=nothing,
        key_midpoints=nuq.midpoints(key_codebook),
        key_centroids=key_codebook,
        value_midpoints=nuq.midpoints(value_codebook),
        value_centroids=value_codebook,
    )


def with_tensors(layout: MethodLayout, shapes: Shapes) -> MethodLayout:
    """The layout with these tensors in its blocks."""
    extra = tuple((name, shape, dtype) for name, (shape, dtype) in shapes.items())
    return MethodLayout(**{**{f: getattr(layout, f) for f in layout.__dataclass_fields__}, "extra": extra})


def tensors_of(store: LayerStore) -> dict[str, Tensor]:
    """The tensors of a layer by name, each [N, ...]."""
    assert isinstance(store.keys, MethodStore)
    return store.keys.tensors


def value_store(tensors: dict[str, Tensor]) -> ValueStore:
    """The nuq family's view of the values among a method's tensors."""
    return ValueStore(
        codes=tensors["value_codes"],
        zero=tensors["value_zero"],
        scale=tensors["value_scale"],
        outlier_index=tensors["value_outlier_index"],
        outlier_value=tensors["value_outlier_value"],
        outlier_end=tensors["value_outlier_end"],
    )
