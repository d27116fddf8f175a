"""Exact blocks (``quant=none``): copy tokens to their slots and look for NaN and infinity, in one launch.

In plain PyTorch that is some ten small kernels, which would make the full-precision cache slower than it need be, and
everything that is compared with it look better than it is.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvquant.kernels import ExactStore
from kvquant.kernels.triton_kernels.codes import is_finite, report

_CHANNELS = 2048  # of one program at most: 16 of each of its threads


@triton.jit(do_not_specialize=["kind"])
def _copy_tokens(
    x, data, slot_block, slot_offset, error, kind,
    BS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < C
    number = tl.load(x + token * C + channel, mask=inside, other=0.0)
    block = tl.load(slot_block + token).to(tl.int64)
    slot = tl.load(slot_offset + token).to(tl.int64)
    row = (block * (C // D) + channel // D) * BS + slot
    tl.store(data + row * D + channel % D, number.to(data.dtype.element_ty), mask=inside)
    report(error, kind, tl.min(tl.where(is_finite(number), C, channel), 0), C)


def write_exact(
    x: Tensor, store: ExactStore, slot_block: Tensor, slot_offset: Tensor, kind: int, error: Tensor
) -> None:
    """Store keys or values as they are.

    Args:
        x: [T, H, D] in the store's dtype.
        store: the layer's side of the pool, contiguous.
        slot_block: block of each token, int64 [T].
        slot_offset: slot within the block, int64 [T].
        kind: what the error word shall say of NaN and infinity, ``ERROR_KEY_NOT_FINITE`` or ``ERROR_VALUE_NOT_FINITE``.
        error: the pool's error word, int64 [2].
    """
    T, H, D = x.shape
    C = H * D
    channels = min(_CHANNELS, triton.next_power_of_2(C))
    _copy_tokens[(T, triton.cdiv(C, channels))](
        x.contiguous(), store.data, slot_block, slot_offset, error, kind,
        BS=store.data.shape[2], D=D, C=C, CHANNELS=channels, num_warps=4,
    )  # fmt: skip
