"""Note NaN and infinity in a pool's error word, on the device and without asking it."""

from __future__ import annotations

import torch
from torch import Tensor


def flag_not_finite(x: Tensor, kind: int, error: Tensor) -> None:
    """Note the first channel of [T, H, D] with NaN or infinity, unless an error is noted already.

    Args:
        x: keys or values.
        kind: ``ERROR_KEY_NOT_FINITE`` or ``ERROR_VALUE_NOT_FINITE`` of `kvquant.kernels`.
        error: int64 [2], kind and channel.
    """
    # One pass; in fp32, because many finite fp16 numbers may add up to infinity.
    bad = ~torch.isfinite(x.flatten(1).sum(dim=0, dtype=torch.float32))
    channel = bad.to(torch.uint8).argmax()
    found = torch.stack([torch.full_like(channel, kind), channel])
    error.copy_(torch.where(bad.any() & (error[0] == 0), found, error))
