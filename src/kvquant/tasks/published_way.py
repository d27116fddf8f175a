"""KVQuant's simulated quantizer as published: normalize, stack one |x - c| per centroid, take argmin.

Values get their outlier thresholds from torch.quantile per token. It stores nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant.kernels import LayerConstants


def published_keys(x: Tensor, constants: LayerConstants) -> Tensor:
    """Quantize and dequantize keys [T, C]."""
    lower, upper = constants.key_lower.view(-1), constants.key_upper.view(-1)
    zero, scale = constants.key_zero.view(-1), constants.key_scale.view(-1)
    outlier = (x < lower) | (x > upper)
    nearest = _stack_and_argmin((x - zero) / scale, constants.key_centroids)
    return torch.where(outlier, x, nearest * scale + zero)


def published_values(x: Tensor, constants: LayerConstants, outlier_fraction: float) -> Tensor:
    """Quantize and dequantize values [T, C]."""
    tail = outlier_fraction / 2
    lower, upper = torch.quantile(x, torch.tensor([tail, 1 - tail], device=x.device), dim=1)[:, :, None]
    outlier = (x < lower) | (x > upper)
    inliers = torch.where(outlier, torch.nan, x)
    low, high = inliers.nan_to_num(torch.inf).amin(1), inliers.nan_to_num(-torch.inf).amax(1)
    zero, scale = ((high + low) / 2)[:, None], ((high - low) / 2)[:, None]
    nearest = _stack_and_argmin((x - zero) / scale, constants.value_centroids)
    return torch.where(outlier, x, nearest * scale + zero)


def _stack_and_argmin(x_norm: Tensor, centroids: Tensor) -> Tensor:
    distances = torch.stack([(x_norm - c).abs() for c in centroids])
    return centroids[distances.argmin(0)]
