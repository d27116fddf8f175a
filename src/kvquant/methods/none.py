"""Exact storage in the model's dtype, through the same blocks and the same attention: the baseline."""

from __future__ import annotations

from kvquant.batched_quant import BatchedKVQuantizer


class Method(BatchedKVQuantizer):
    """Stores everything as it is."""

    calibrated = False
