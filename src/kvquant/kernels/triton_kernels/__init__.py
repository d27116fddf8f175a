"""The GPU default: Triton kernels that write blocks, dequantize them, and attend straight to packed or exact ones.

What has no kernel of its own is the vectorised PyTorch form, on the GPU as well: reading exact blocks, and putting full
blocks in order.
"""

from __future__ import annotations

from kvquant.kernels.fused_read import read_exact
from kvquant.kernels.fused_write import close_values
from kvquant.kernels.triton_kernels.attention import attend
from kvquant.kernels.triton_kernels.dequantize import read_keys, read_values
from kvquant.kernels.triton_kernels.prefill import prefill_refusal
from kvquant.kernels.triton_kernels.rotate import rotate_tokens
from kvquant.kernels.triton_kernels.write_exact import write_exact
from kvquant.kernels.triton_kernels.write_keys import write_keys
from kvquant.kernels.triton_kernels.write_values import write_values

TAKES_RUNS = True

__all__ = [
    "TAKES_RUNS",
    "attend",
    "close_values",
    "prefill_refusal",
    "read_exact",
    "read_keys",
    "read_values",
    "rotate_tokens",
    "write_exact",
    "write_keys",
    "write_values",
]
