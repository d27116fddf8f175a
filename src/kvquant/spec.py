"""What to do with one layer's keys and values: the quantization settings that every floor shares."""

from __future__ import annotations

import dataclasses

METHODS = ("nuq", "uniform", "normal_float", "none")
FISHER_WEIGHTS = ("fisher", "fisher_scale2", "none")
MIN_BITS, MAX_BITS = 1, 8


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one attention layer's keys and values are stored.

    Args:
        bits: width of a code for keys and values alike, 1 to 8.
        method: ``nuq`` (fitted non-uniform codebook), ``uniform``, ``normal_float``, or ``none`` (exact storage
            in the model's dtype, through the same blocks).
        key_bits: overrides ``bits`` for keys; after construction always the width in force.
        value_bits: overrides ``bits`` for values; after construction always the width in force.
        outlier_fraction: fraction of elements kept exactly, half of them at each end.
        sink_tokens: positions below this in each sequence stay exact.
        value_groups: number of groups the C channels of a value token are split into, each with its own range.
        fisher_weight: weight of the k-means: ``fisher`` (KVQuant's code), ``fisher_scale2`` (its paper's
            equation) or ``none``.
        qnorm: correct dequantized inliers so that they keep the calibration mean and standard deviation.

    Raises:
        ValueError: a setting is out of its range; the message names the setting, its value and a fix.
    """

    bits: int = 4
    method: str = "nuq"
    key_bits: int | None = None
    value_bits: int | None = None
    outlier_fraction: float = 0.01
    sink_tokens: int = 0
    value_groups: int = 1
    fisher_weight: str = "fisher"
    qnorm: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"quant.method must be one of {', '.join(METHODS)}, got {self.method!r}; try nuq"
            )
        if self.fisher_weight not in FISHER_WEIGHTS:
            raise ValueError(
                f"quant.fisher_weight must be one of {', '.join(FISHER_WEIGHTS)}, got {self.fisher_weight!r}; try fisher"
            )
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.bits)
        for name in ("bits", "key_bits", "value_bits"):
            value = getattr(self, name)
            if not MIN_BITS <= value <= MAX_BITS:
                raise ValueError(f"quant.{name} must be {MIN_BITS} to {MAX_BITS}, got {value}; try 4")
        if not 0 <= self.outlier_fraction < 0.5:
            raise ValueError(
                f"quant.outlier_fraction must be at least 0 and below 0.5, got {self.outlier_fraction}; try 0.01"
            )
        if self.sink_tokens < 0:
            raise ValueError(f"quant.sink_tokens must be 0 or more, got {self.sink_tokens}; try 0")
        if self.value_groups < 1:
            raise ValueError(f"quant.value_groups must be 1 or more, got {self.value_groups}; try 1")

    @property
    def is_exact(self) -> bool:
        """Whether keys and values are stored as they are."""
        return self.method == "none"

    def value_group_channels(self, num_channels: int) -> int:
        """Channels of one value group.

        Args:
            num_channels: channels of the layer, C = H * D.

        Raises:
            ValueError: ``value_groups`` does not divide C.
        """
        if num_channels % self.value_groups:
            raise ValueError(
                f"quant.value_groups must divide the layer's {num_channels} value channels, got {self.value_groups}; "
                "try 1"
            )
        return num_channels // self.value_groups
