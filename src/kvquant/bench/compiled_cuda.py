"""What the CUDA decode kernel compiles to, without a GPU."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from kvquant.bench.machine_code import inspect_cubin
from kvquant.bench.shapes import LayerShape
from kvquant.block_layout import BlockLayout
from kvquant.kernels.cuda_decode.configuration import BLOCK_SIZE, Configuration, read_source
from kvquant.kernels.cuda_decode.nvrtc import compile_cubin
from kvquant.spec import QuantSpec

# Shared memory that a program may ask for, by compute capability times ten: H100 and H200.
SHARED_BYTES = {90: 227 << 10}
# Of a thread; with NVRTC 12.8 it is up to 24.
MOST_STACK_BYTES = 48


def configuration_of(spec: QuantSpec, shape: LayerShape, architecture: int) -> Configuration:
    """What a bf16 layer of a shape is compiled for."""
    layout = BlockLayout(spec, 1, shape.kv_heads, shape.head_dim, torch.bfloat16, BLOCK_SIZE)
    fewest = Configuration(
        key_bits=spec.key_bits,  # type: ignore[arg-type]
        value_bits=spec.value_bits,  # type: ignore[arg-type]
        groups=shape.query_heads // shape.kv_heads,
        is_bfloat16=True,
        key_base=layout.key_outlier_base,
        value_entries=layout.value_outliers,
    )
    chosen = fewest.with_most_warps(SHARED_BYTES[architecture])
    assert chosen is not None, "a supported shape fits both"
    return chosen


def inspect_cuda_decode(configuration: Configuration, architecture: int) -> dict[str, Any]:
    """Compile the kernel and count what matters in its machine code."""
    cubin = compile_cubin(read_source(), configuration.options, architecture)
    return {
        "kernel": "cuda_decode",
        "warps": configuration.warps,
        **inspect_cubin(cubin),
        "shared_bytes": configuration.shared_bytes,
        "source": hashlib.sha256(cubin).hexdigest(),
    }
