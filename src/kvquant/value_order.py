"""Order of value outliers inside blocks: by token while a block is open, by head once it is closed.

See :class:`kvquant.kernels.ValueStore` for what both orders mean.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvquant.kernels import get_backend


def close(tensors: Mapping[str, Tensor], blocks: list[int], head_dim: int) -> None:
    """Order the outliers of full blocks by head, in every layer of a pool.

    Args:
        tensors: a pool's tensors, [L, N, ...] each.
        blocks: blocks that have just become full.
        head_dim: D.
    """
    index = tensors["value_outlier_index"]
    ids = torch.tensor(blocks, dtype=torch.int64).to(index.device, non_blocking=True)
    get_backend("auto", index.device.type).close_values(
        index, tensors["value_outlier_value"], tensors["value_outlier_end"], ids, head_dim=head_dim
    )


def reopen(tensors: Mapping[str, Tensor], block: int, head_dim: int) -> None:
    """Undo :func:`close` for a block that was cropped, so that tokens can join it again."""
    index, value, end = (tensors[f"value_outlier_{name}"][:, block] for name in ("index", "value", "end"))
    L, BS, K = index.shape
    entry = index.reshape(L, BS * K).to(torch.int64) & 0xFFFF
    slot = torch.div(entry, head_dim, rounding_mode="floor")
    place = torch.arange(BS * K, device=entry.device).expand(L, -1).contiguous()
    head = torch.searchsorted(end.to(torch.int64).contiguous(), place, right=True)
    # Stable, so that a token's heads, and the channels of each, stay in rising order.
    order = torch.argsort(slot, stable=True)
    channel = head * head_dim + entry - slot * head_dim
    tensors["value_outlier_index"][:, block] = channel.gather(1, order).view(L, BS, K).to(torch.int16)
    tensors["value_outlier_value"][:, block] = value.reshape(L, -1).gather(1, order).view(L, BS, K)
    tensors["value_outlier_end"][:, block] = 0
