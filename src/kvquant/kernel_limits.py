"""What the Triton kernels can run, as plain numbers: known before torch or a GPU is looked at."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from kvquant.spec import QuantSpec

TRITON_BITS = (2, 3, 4)
TRITON_BLOCK_SIZES = (32, 64, 128)
EXACT_BLOCK_SIZES = (16, 32, 64, 128)
MOST_GROUPED_HEADS = 32
OLDEST_CAPABILITY = (8, 0)


def spec_refusal(spec: QuantSpec, block_size: int) -> str | None:
    """Say what of the settings the Triton kernels do not decode, whatever the model; None: nothing.

    Args:
        spec: how keys and values are stored, by a method whose blocks are the nuq family's or exact.
        block_size: tokens per block.
    """
    sizes = EXACT_BLOCK_SIZES if spec.is_exact else TRITON_BLOCK_SIZES
    if block_size not in sizes:
        return f"decodes blocks of {_either(sizes)} tokens, got cache.block_size={block_size}"
    if spec.is_exact:
        return None
    if spec.mixes_exact:
        setting = (
            f"quant.recent_tokens={spec.recent_tokens}" if spec.recent_tokens else "quant.logit_bias=true"
        )
        return f"reads no recent tokens and knows no logit bias, got {setting}"
    for name, bits in (("key_bits", spec.key_bits), ("value_bits", spec.value_bits)):
        if bits not in TRITON_BITS:
            return f"decodes codes of {_either(TRITON_BITS)} bits, got quant.{name}={bits}"
    return None


def layer_refusal(
    spec: QuantSpec,
    block_size: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    query_heads: int,
    rotated: int | None,
) -> str | None:
    """Say why the Triton kernels do not decode a layer; None: they do.

    Args:
        spec: how its keys and values are stored.
        block_size: tokens per block.
        num_kv_heads: H.
        head_dim: D.
        query_heads: Hq.
        rotated: channels of a head that are rotated; None: not known, or none.
    """
    reason = spec_refusal(spec, block_size)
    if reason is not None:
        return reason
    D = head_dim
    if spec.is_exact:
        fits = D % 16 == 0 and 16 <= D <= 256 and (rotated or 0) % 16 == 0
        return None if fits else f"decodes heads of a multiple of 16 up to 256 channels, got head_dim={D}"
    # A plane of the keys' codes is one side of a product, which has 16 channels at least.
    narrowest = 32 if spec.key_bits == 4 else 48
    if D % 16 or not narrowest <= D <= 256:
        return (
            f"decodes heads of a multiple of 16 from 48 to 256 channels (from 32 at 4 bits), got head_dim={D}"
        )
    if rotated is not None and rotated != D:
        return f"rotates whole heads, got {rotated} rotated channels of {D}"
    if query_heads > MOST_GROUPED_HEADS * num_kv_heads:
        return f"serves up to {MOST_GROUPED_HEADS} query heads per KV head, got {query_heads} for {num_kv_heads} KV heads"
    if num_kv_heads % spec.value_groups:
        return f"decodes value groups of whole heads, got quant.value_groups={spec.value_groups} for {num_kv_heads} heads"
    return None


def _either(values: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"


def gpu_refusal() -> str | None:
    """Say why no GPU of this machine runs the Triton kernels; None: one does, or nobody can tell without torch.

    Asks the driver through NVML: asking CUDA itself would make processes forked later unable to use it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"must run on an NVIDIA GPU, got none: CUDA_VISIBLE_DEVICES is {visible!r}"
    try:
        import pynvml
    except ImportError:
        return None
    capabilities = []
    with _nvml(pynvml) as works:
        if works:
            handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
            capabilities = [tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)) for handle in handles]
    if not capabilities:
        return "must run on an NVIDIA GPU, got a machine without one"
    return capability_refusal(max(capabilities))


def capability_refusal(capability: tuple[int, ...]) -> str | None:
    """Say that a GPU is too old; None: it is not."""
    if tuple(capability) >= OLDEST_CAPABILITY:
        return None
    oldest, found = (".".join(map(str, version)) for version in (OLDEST_CAPABILITY, capability))
    return f"must run on compute capability {oldest} or later, got {found}"


@contextlib.contextmanager
def _nvml(pynvml: Any) -> Iterator[bool]:
    """NVML while the block lasts; whether there is a driver to ask."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()
