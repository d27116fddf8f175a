"""Non-uniform quantization of keys (per channel) and values (per token): thresholds, outliers, codebooks, codes.

The method is KVQuant's (Hooper et al., NeurIPS 2024, arXiv:2401.18079, section 3), restated so that a whole
ragged batch of tokens goes through at once and every backend gives identical codes: a code counts the decision
boundaries zero + scale * midpoint strictly below an element, in fp32, each product and sum rounded on its own.
"""

import math
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvquant.codebooks import (
    WeightedHistogram,
    fit_codebook,
    midpoints,
    normal_float_codebook,
    qnorm_affine,
    uniform_codebook,
)
from kvquant.encoding import decode, encode, row_chunks
from kvquant.value_outliers import split_value_outliers

__all__ = [
    "WeightedHistogram",
    "channel_thresholds",
    "decode",
    "encode",
    "fit_codebook",
    "fit_key_codebook",
    "fit_value_codebook",
    "key_histogram",
    "midpoints",
    "normal_float_codebook",
    "qnorm_affine",
    "split_value_outliers",
    "uniform_codebook",
    "value_histogram",
    "value_outlier_count",
    "zero_and_scale",
]

_CHUNK_ELEMENTS = 1 << 20  # fp32 temporaries of 4 MiB: large enough to vectorise, small enough for the cache


# -- ranges and outliers ------------------------------------------------------------------------------------


def channel_thresholds(x: Tensor, outlier_fraction: float) -> tuple[Tensor, Tensor]:
    """Per-channel outlier thresholds of keys: the f/2 and 1 - f/2 quantiles, linearly interpolated.

    Args:
        x (Tensor): calibration tokens, [T, C], floating point.
        outlier_fraction (float): f, the share of elements to keep exact; 0 gives minimum and maximum.

    Returns:
        tuple[Tensor, Tensor]: lower and upper thresholds, each [C], fp32, on x's device.

    Raises:
        ValueError: f is outside [0, 1), x is not [T >= 1, C], or a channel holds NaN or infinity.
    """
    _check_fraction(outlier_fraction)
    if x.dim() != 2 or len(x) == 0:
        raise ValueError(f"x must be [tokens, channels] with at least one token, got shape {list(x.shape)}")
    num_tokens, num_channels = x.shape
    lower = torch.empty(num_channels)
    upper = torch.empty(num_channels)
    step = max(1, 4 * _CHUNK_ELEMENTS // num_tokens)
    for start in range(0, num_channels, step):
        # Contiguous per channel: partition works along rows.
        columns = x[:, start : start + step].float().t().contiguous().cpu().numpy()
        finite = np.isfinite(columns.min(axis=1)) & np.isfinite(columns.max(axis=1))
        if not finite.all():
            raise ValueError(
                f"x must be finite, got NaN or infinity in channel {start + int(np.argmin(finite))}; "
                "check the calibration activations"
            )
        lower[start : start + step] = _low_quantile(columns, outlier_fraction / 2)
        # Negated, the upper quantile is a lower one, and interpolates the same way.
        upper[start : start + step] = -_low_quantile(-columns, outlier_fraction / 2)
    return lower.to(x.device), upper.to(x.device)


def _low_quantile(rows: NDArray[np.float32], q: float) -> Tensor:
    """The q-quantile (q < 0.5) of each row, fp32. Partitions a copy."""
    rank = q * (rows.shape[1] - 1)
    below = math.floor(rank)
    if rank == 0:
        return torch.from_numpy(rows.min(axis=1))
    # One pivot, then the maximum of its left side: asking partition for both ranks is several times slower.
    head = np.partition(rows, below + 1, axis=1)[:, : below + 2]
    left = torch.from_numpy(head[:, :-1].max(axis=1)).double()
    right = torch.from_numpy(head[:, -1].copy()).double()
    return torch.lerp(left, right, rank - below).float()


def value_outlier_count(outlier_fraction: float, num_channels: int) -> int:
    """Outliers at each end of one token's values: n = floor(f/2 * (C - 1)) + 1, and 0 when f is 0.

    Args:
        outlier_fraction (float): f.
        num_channels (int): C, the channels of one token (of one value group).

    Raises:
        ValueError: f is outside [0, 1), or the 2n outliers would leave no inlier.
    """
    _check_fraction(outlier_fraction)
    if outlier_fraction == 0:
        return 0
    # The decimal the user wrote, not its binary neighbour: 0.29 * 100 must not come to 28.
    count = math.floor(Fraction(str(float(outlier_fraction))) / 2 * (num_channels - 1)) + 1
    if 2 * count >= num_channels:
        raise ValueError(
            f"value outliers must leave an inlier: outlier_fraction {outlier_fraction} makes 2 * {count} outliers "
            f"of {num_channels} channels; lower outlier_fraction or use fewer value groups"
        )
    return count


def zero_and_scale(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (u + l) / 2 and half width (u - l) / 2 of a range, fp32; x_norm = (x - zero) / scale."""
    lower, upper = lower.float(), upper.float()
    return (upper + lower) * 0.5, (upper - lower) * 0.5


def _check_fraction(outlier_fraction: float) -> None:
    if not 0 <= outlier_fraction < 1:
        raise ValueError(f"outlier_fraction must be at least 0 and below 1, got {outlier_fraction}; try 0.01")


# -- calibration --------------------------------------------------------------------------------------------


def key_histogram(
    keys: Tensor, lower: Tensor, upper: Tensor, weight: Tensor | None = None, *, times_scale2: bool = False
) -> WeightedHistogram:
    """Histogram of the normalized inliers of keys; merge several to calibrate on a stream.

    Args:
        keys (Tensor): pre-RoPE keys, [T, C], sink tokens left out.
        lower (Tensor): per-channel thresholds, [C].
        upper (Tensor): the same.
        weight (Tensor | None): Fisher information, [T, C]; None means 1.
        times_scale2 (bool): multiply the weight by the channel's scale squared (KVQuant's equation 3; its code
            does not), so that error is measured in units of x rather than of x_norm.

    Raises:
        ValueError: keys or weight hold NaN or infinity, or weight is negative.
    """
    zero, scale = zero_and_scale(lower, upper)
    histogram = WeightedHistogram()
    for rows in row_chunks(keys, _CHUNK_ELEMENTS):
        x = keys[rows].float()
        keep = (x >= lower) & (x <= upper)
        _add_normalized(
            histogram, x, zero, scale, keep, None if weight is None else weight[rows], times_scale2
        )
    return histogram


def value_histogram(
    values: Tensor, num_outliers: int, weight: Tensor | None = None, *, times_scale2: bool = False
) -> WeightedHistogram:
    """Histogram of the normalized inliers of values: as `key_histogram`, with ranges per token.

    Args:
        values (Tensor): [T, C] (one row per token and value group), sink tokens left out.
        num_outliers (int): n, outliers at each end of a token.
        weight (Tensor | None): Fisher information, [T, C]; None means 1.
        times_scale2 (bool): multiply the weight by the token's scale squared.

    Raises:
        ValueError: 2n >= C, values or weight hold NaN or infinity, or weight is negative.
    """
    histogram = WeightedHistogram()
    for rows in row_chunks(values, _CHUNK_ELEMENTS):
        x = values[rows].float()
        indices, lowest, highest = split_value_outliers(x, num_outliers)
        keep = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        keep.scatter_(1, indices.long(), False)
        zero, scale = zero_and_scale(lowest[:, None], highest[:, None])
        _add_normalized(
            histogram, x, zero, scale, keep, None if weight is None else weight[rows], times_scale2
        )
    return histogram


def _add_normalized(
    histogram: WeightedHistogram,
    x: Tensor,
    zero: Tensor,
    scale: Tensor,
    keep: Tensor,
    weight: Tensor | None,
    times_scale2: bool,
) -> None:
    live = (
        scale > 0
    )  # a range of width zero decodes exactly whatever the codebook: it must not pull a centroid
    x_norm = (x - zero) / torch.where(live, scale, 1.0)
    if times_scale2:
        weight = scale.square() if weight is None else weight.float() * scale.square()
    histogram.add(x_norm, weight, keep & live)


def fit_key_codebook(
    keys: Tensor,
    lower: Tensor,
    upper: Tensor,
    bits: int,
    weight: Tensor | None = None,
    *,
    times_scale2: bool = False,
) -> tuple[Tensor, WeightedHistogram]:
    """Fit a layer's key codebook; arguments as of `key_histogram`.

    Returns:
        tuple[Tensor, WeightedHistogram]: the codebook, [2**bits], fp32, and the histogram it was fitted to, for
        `qnorm_affine`.
    """
    histogram = key_histogram(keys, lower, upper, weight, times_scale2=times_scale2)
    return fit_codebook(histogram, bits), histogram


def fit_value_codebook(
    values: Tensor, num_outliers: int, bits: int, weight: Tensor | None = None, *, times_scale2: bool = False
) -> tuple[Tensor, WeightedHistogram]:
    """Fit a layer's value codebook; arguments as of `value_histogram`, returns as `fit_key_codebook`."""
    histogram = value_histogram(values, num_outliers, weight, times_scale2=times_scale2)
    return fit_codebook(histogram, bits), histogram
