"""Levels at the quantiles of a normal distribution: QLoRA's NF4 and its siblings (arXiv:2305.14314, appendix E)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvquant import nuq
from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.spec import QuantSpec


class Method(BatchedKVQuantizer):
    """Everything but the codebook is nuq's."""

    @classmethod
    def codebook(cls, spec: QuantSpec, bits: int, histogram: Callable[[], nuq.WeightedHistogram]) -> Tensor:
        """The codebook is known beforehand; nothing is counted."""
        return nuq.normal_float_codebook(bits)
