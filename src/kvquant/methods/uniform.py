"""Evenly spaced levels (plain integers), over the whole range or clipped where the squared error is least.

Clipping trades large errors on few elements for small ones on all others; the best trade is found on calibration data,
per layer, separately for keys and values (as in Banner et al. 2019, arXiv:1810.05723, without assuming a distribution).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from kvquant import nuq
from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.spec import QuantSpec

_CLIPS = np.linspace(0.2, 1.0, 81)


class Method(BatchedKVQuantizer):
    """Everything but the codebook is nuq's: it spans the range, or the share of it that ``clip=optimal`` finds."""

    default_options: ClassVar[Mapping[str, Any]] = {"clip": "none"}

    @classmethod
    def check(cls, spec: QuantSpec) -> None:
        """Refuse another clip."""
        super().check(spec)
        clip = spec.option("clip", "none")
        if clip not in ("none", "optimal"):
            raise ValueError(f"quant.options.clip must be none or optimal, got {clip!r}; try optimal")

    @classmethod
    def codebook(cls, spec: QuantSpec, bits: int, histogram: Callable[[], nuq.WeightedHistogram]) -> Tensor:
        """Evenly spaced centroids over [-1, 1] or [-c, c]."""
        codebook = nuq.uniform_codebook(bits)
        if spec.option("clip", "none") == "none":
            return codebook
        counted = histogram()
        errors = [_squared_error(counted, codebook * clip) for clip in _CLIPS]
        return codebook * float(_CLIPS[int(np.argmin(errors))])


def _squared_error(histogram: nuq.WeightedHistogram, codebook: Tensor) -> float:
    """Weighted squared error of a codebook over a histogram's bins."""
    filled = histogram.weight > 0
    weight = histogram.weight[filled]
    points = histogram.weighted_sum[filled] / weight
    codes = np.searchsorted(nuq.midpoints(codebook).double().numpy(), points)
    return float(np.dot(weight, (points - codebook.double().numpy()[codes]) ** 2))
