"""What to do with one layer's keys and values: the quantization settings that every floor shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A method is a file in kvquant/methods; its name alone is read here, before anything heavy is imported.
METHODS = tuple(
    sorted(p.stem for p in (Path(__file__).parent / "methods").glob("*.py") if not p.stem.startswith("_"))
)
# Share one store and one set of kernels and differ in the codebook alone.
NUQ_FAMILY = ("nuq", "uniform", "normal_float")
FISHER_WEIGHTS = ("fisher", "fisher_scale2", "none")
KEY_OUTLIERS = ("channel", "head", "layer")
SINK_RULES = ("position", "key_norm", "attention_mass")
MIN_BITS, MAX_BITS = 1, 8


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one attention layer's keys and values are stored.

    Args:
        bits: width of a code for keys and values alike, 1 to 8.
        method: a file in ``kvquant/methods``: ``nuq`` (fitted non-uniform codebook), ``none`` (exact storage in the
            model's dtype, through the same blocks), ...
        key_bits: overrides ``bits`` for keys; after construction always the width in force.
        value_bits: overrides ``bits`` for values; after construction always the width in force.
        outlier_fraction: fraction of elements kept exactly, half of them at each end.
        value_outlier_fraction: overrides it for values.
        key_outliers: whose fraction that is for keys: each ``channel``'s (KVQuant), or each ``head``'s or the whole
            ``layer``'s, by distance from the channel's mean in its standard deviations.
        sink_tokens: positions below this in each sequence stay exact.
        sink_rule: ``position``: that many in every layer; ``key_norm``, ``attention_mass``: in each layer only the
            leading positions whose key norm, or whose share of later queries' attention, stood out in calibration,
            at most that many.
        recent_tokens: the last so many tokens before a query, its own included, are read exactly.
        value_groups: number of groups the C channels of a value token are split into, each with its own range.
        fisher_weight: weight of the k-means: ``fisher`` (KVQuant's code), ``fisher_scale2`` (its paper's
            equation) or ``none``.
        qnorm: correct dequantized inliers so that they keep the calibration mean and standard deviation.
        logit_bias: subtract half the variance that quantization adds to a logit from the logits of quantized keys,
            which would otherwise gain weight over exact ones.
        options: settings of one method alone, by name; its file says which there are.

    Raises:
        ValueError: a setting is out of its range; the message names the setting, its value and a fix.
    """

    bits: int = 4
    method: str = "nuq"
    key_bits: int | None = None
    value_bits: int | None = None
    outlier_fraction: float = 0.01
    value_outlier_fraction: float | None = None
    sink_tokens: int = 0
    value_groups: int = 1
    fisher_weight: str = "fisher"
    qnorm: bool = False
    key_outliers: str = "channel"
    sink_rule: str = "position"
    recent_tokens: int = 0
    logit_bias: bool = False
    options: Any = ()  # a mapping; after construction sorted (name, value) pairs, so that a spec can be a key

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"quant.method must be one of {', '.join(METHODS)}, got {self.method!r}; try nuq"
            )
        for name, choices in (
            ("fisher_weight", FISHER_WEIGHTS),
            ("key_outliers", KEY_OUTLIERS),
            ("sink_rule", SINK_RULES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"quant.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}; try {choices[0]}"
                )
        pairs = self.options.items() if isinstance(self.options, Mapping) else self.options
        object.__setattr__(self, "options", tuple(sorted((str(k), v) for k, v in pairs)))
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.bits)
        for name in ("bits", "key_bits", "value_bits"):
            value = getattr(self, name)
            if not MIN_BITS <= value <= MAX_BITS:
                raise ValueError(f"quant.{name} must be {MIN_BITS} to {MAX_BITS}, got {value}; try 4")
        for name in ("outlier_fraction", "value_outlier_fraction"):
            fraction = getattr(self, name)
            if fraction is not None and not 0 <= fraction < 0.5:
                raise ValueError(f"quant.{name} must be at least 0 and below 0.5, got {fraction}; try 0.01")
        for name in ("sink_tokens", "recent_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"quant.{name} must be 0 or more, got {getattr(self, name)}; try 0")
        if self.value_groups < 1:
            raise ValueError(f"quant.value_groups must be 1 or more, got {self.value_groups}; try 1")

    @property
    def is_exact(self) -> bool:
        """Whether keys and values are stored as they are."""
        return self.method == "none"

    @property
    def widths(self) -> tuple[int, int]:
        """Bits of a key's code and of a value's, in force."""
        assert self.key_bits is not None and self.value_bits is not None  # set above
        return self.key_bits, self.value_bits

    @property
    def value_outliers(self) -> float:
        """The outlier fraction in force for values."""
        return self.outlier_fraction if self.value_outlier_fraction is None else self.value_outlier_fraction

    @property
    def mixes_exact(self) -> bool:
        """Whether a query sees some keys exactly that another sees quantized (or weighs the two apart)."""
        return not self.is_exact and (self.recent_tokens > 0 or self.logit_bias)

    def option(self, name: str, default: Any) -> Any:
        """A setting of the method alone."""
        return dict(self.options).get(name, default)

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
