"""Exact storage in the model's dtype, through the same blocks and the same attention: the baseline."""

from __future__ import annotations

from torch import Tensor

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.spec import QuantSpec


class Method(BatchedKVQuantizer):
    """Stores everything as it is."""

    calibrated = False

    @classmethod
    def fit(
        cls,
        spec: QuantSpec,
        keys: Tensor,
        values: Tensor,
        key_fisher: Tensor | None,
        value_fisher: Tensor | None,
    ) -> BatchedKVQuantizer:
        """Nothing is fitted."""
        _, H, D = keys.shape
        return cls.uncalibrated(spec, H, D)
