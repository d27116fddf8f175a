"""From calibration tokens of one layer to its constants: thresholds of keys, and codebooks of keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from kvquant import nuq
from kvquant.kernels import LayerConstants
from kvquant.spec import QuantSpec

# (settings, width of a code, what counts the normalized inliers) -> centroids in [-1, 1], ascending
Codebook = Callable[[QuantSpec, int, Callable[[], nuq.WeightedHistogram]], Tensor]


@dataclasses.dataclass(frozen=True)
class CalibrationTokens:
    """What calibration saw of one layer, sink tokens left out; of several widths the counting is done once.

    Args:
        keys: before RoPE, [T, H, D].
        values: [T, H, D].
        key_fisher: squared gradient of the loss, [T, H, D]; None: all 1.
        value_fisher: the same for values.
    """

    keys: Tensor
    values: Tensor
    key_fisher: Tensor | None = None
    value_fisher: Tensor | None = None
    # Not carried over by dataclasses.replace: other tokens are counted anew.
    _counted: dict[Hashable, Any] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def chosen(self, mask: Tensor) -> CalibrationTokens:
        """The tokens where a bool [T] is true."""
        parts = (self.keys, self.values, self.key_fisher, self.value_fisher)
        return CalibrationTokens(*(None if x is None else x[mask] for x in parts))  # type: ignore[arg-type]

    def once(self, what: str, spec: QuantSpec, count: Callable[[], Any]) -> Any:
        """What ``count`` returns, computed the first time that it is asked for of a spec, whatever the spec's widths."""
        key = (what, dataclasses.replace(spec, bits=1, key_bits=1, value_bits=1))
        if key not in self._counted:
            self._counted[key] = count()
        return self._counted[key]


def fit_constants(spec: QuantSpec, tokens: CalibrationTokens, codebook: Codebook) -> LayerConstants:
    """Fix what the nuq family needs: a range and two thresholds per key channel, a codebook for keys and for values.

    Args:
        spec: the settings.
        tokens: of the layer.
        codebook: the method's own.
    """
    _, H, D = tokens.keys.shape
    C = H * D
    k, v = tokens.keys.reshape(-1, C), tokens.values.reshape(-1, C)
    kf, vf = (None if x is None else x.reshape(-1, C) for x in (tokens.key_fisher, tokens.value_fisher))
    if spec.fisher_weight == "none":
        kf = vf = None
    scale2 = spec.fisher_weight == "fisher_scale2"

    lower, upper = tokens.once("thresholds", spec, lambda: key_thresholds(spec, k, H))
    zero, scale = nuq.zero_and_scale(lower, upper)
    group = spec.value_group_channels(C)
    per_end = nuq.value_outlier_count(spec.value_outliers, group)
    rows = v.reshape(-1, group)
    row_weights = None if vf is None else vf.reshape(-1, group)
    key_bits, value_bits = spec.widths

    def count_keys() -> nuq.WeightedHistogram:
        return nuq.key_histogram(k, lower, upper, kf, times_scale2=scale2)

    def count_values() -> nuq.WeightedHistogram:
        return nuq.value_histogram(rows, per_end, row_weights, times_scale2=scale2)

    key_codebook, key_centroids = _centroids(
        spec, key_bits, codebook, lambda: tokens.once("keys", spec, count_keys)
    )
    value_codebook, value_centroids = _centroids(
        spec, value_bits, codebook, lambda: tokens.once("values", spec, count_values)
    )
    if spec.outlier_fraction == 0:
        # Nothing is an outlier: keys beyond the calibrated range clamp to the end centroids.
        low, high = torch.full_like(lower, -torch.inf), torch.full_like(upper, torch.inf)
    else:
        low, high = lower, upper
    return LayerConstants(
        key_lower=low.view(H, D),
        key_upper=high.view(H, D),
        key_zero=zero.view(H, D),
        key_scale=scale.view(H, D),
        key_midpoints=nuq.midpoints(key_codebook),
        key_centroids=key_centroids,
        value_midpoints=nuq.midpoints(value_codebook),
        value_centroids=value_centroids,
    )


def _centroids(
    spec: QuantSpec, bits: int, codebook: Codebook, histogram: Callable[[], nuq.WeightedHistogram]
) -> tuple[Tensor, Tensor]:
    """Return the codebook that decides codes, and the centroids that codes decode to (Q-Norm applied)."""
    fitted = codebook(spec, bits, histogram)
    if not spec.qnorm:
        return fitted, fitted
    gain, offset = nuq.qnorm_affine(histogram(), fitted)
    return fitted, fitted * gain + offset


def key_noise(keys: Tensor, constants: LayerConstants) -> Tensor:
    """Variance that quantization adds to each key channel, [H, D] fp32; outliers add none.

    Args:
        keys: calibration tokens, [T, H, D].
        constants: fitted to them.
    """
    c = constants
    codes = nuq.encode(keys, c.key_zero, c.key_scale, c.key_midpoints)
    error = nuq.decode(codes, c.key_zero, c.key_scale, c.key_centroids) - keys.float()
    inlier = (keys >= c.key_lower) & (keys <= c.key_upper)
    return error.square().masked_fill_(~inlier, 0.0).mean(0)


def key_thresholds(spec: QuantSpec, keys: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Lower and upper outlier thresholds of each key channel, fp32 [C] each.

    Args:
        spec: ``outlier_fraction`` of each channel's elements, each head's or the layer's (``key_outliers``).
        keys: calibration tokens, [T, C].
        num_heads: H.
    """
    if spec.key_outliers == "channel" or spec.outlier_fraction == 0:
        return nuq.channel_thresholds(keys, spec.outlier_fraction)
    x = keys.float()
    T, C = x.shape
    mean, std = x.mean(0), x.std(0).clamp(min=1e-12)
    # The share f of a head's or all elements that lies furthest from its channel's mean, in the channel's own units.
    groups = num_heads if spec.key_outliers == "head" else 1
    distance = (x - mean).abs().div_(std).view(T, groups, -1).transpose(0, 1).flatten(1)
    count = max(1, round(spec.outlier_fraction * distance.shape[1]))
    limit = distance.topk(count).values[:, -1].repeat_interleave(C // groups)
    lower, upper = mean - limit * std, mean + limit * std
    # A range must not reach beyond what its channel holds: codes would be spent on nothing.
    return torch.maximum(lower, x.amin(0)), torch.minimum(upper, x.amax(0))
