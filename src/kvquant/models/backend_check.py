"""Whether a backend runs a model's layers: refused where it was asked for by name, said once where it was chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.errors import DeviceError
from kvquant.kernel_limits import layer_refusal
from kvquant.kernels import get_backend, say_once
from kvquant.methods import method_class
from kvquant.spec import QuantSpec


def check_backend(
    backend: str,
    quantizers: Sequence[BatchedKVQuantizer],
    devices: Sequence[torch.device],
    *,
    block_size: int,
    query_heads: int,
    rotated: int | None,
) -> None:
    """Refuse a backend that cannot run some layer, and tell where ``auto`` leaves a GPU to plain PyTorch.

    Args:
        backend: name of the kernels.
        quantizers: of the layers.
        devices: where they are.
        block_size: tokens per block.
        query_heads: Hq.
        rotated: channels of a head that are rotated; None: none.

    Raises:
        DeviceError: names the layers, the reason and the backend that works.
    """
    for kind in {device.type for device in devices}:
        try:
            get_backend(backend, kind)
        except ValueError as error:
            raise DeviceError(str(error)) from None
    if backend not in ("auto", "triton"):
        return
    refused: dict[str, list[int]] = {}
    for layer, (quantizer, device) in enumerate(zip(quantizers, devices, strict=True)):
        if backend == "triton" or device.type == "cuda":
            reason = triton_refusal_of(
                quantizer.spec,
                block_size,
                num_kv_heads=quantizer.num_kv_heads,
                head_dim=quantizer.head_dim,
                query_heads=query_heads,
                rotated=rotated,
            )
            if reason is not None:
                refused.setdefault(reason, []).append(layer)
    for reason, layers in refused.items():
        where = (
            f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers from layer {layers[0]} on"
        )
        if backend == "triton":
            raise DeviceError(f"kernel=triton {reason} ({where}); try kernel=pytorch_fused")
        say_once(f"kernel=auto attends with plain PyTorch in {where}: triton {reason}")


def triton_refusal_of(
    spec: QuantSpec,
    block_size: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    query_heads: int,
    rotated: int | None,
) -> str | None:
    """Say why no Triton kernel attends to layers that are stored by ``spec``; None: one does.

    Arguments as of :func:`kvquant.kernel_limits.layer_refusal`; any method's spec is welcome.
    """
    if method_class(spec.method).own_store:
        return f"reads the blocks of the nuq family, got quant={spec.method}"
    return layer_refusal(
        spec,
        block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        query_heads=query_heads,
        rotated=rotated,
    )
