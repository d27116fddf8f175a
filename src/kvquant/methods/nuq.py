"""KVQuant's non-uniform codebooks, fitted per layer to Fisher-weighted calibration data (arXiv:2401.18079, 3.2)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvquant import nuq
from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.spec import QuantSpec


class Method(BatchedKVQuantizer):
    """The weighted 1-D k-means of the normalized inliers."""

    @classmethod
    def codebook(cls, spec: QuantSpec, bits: int, histogram: Callable[[], nuq.WeightedHistogram]) -> Tensor:
        """Fit the codebook; `spec.fisher_weight` has decided the weights."""
        return nuq.fit_codebook(histogram(), bits)
