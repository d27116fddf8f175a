"""The CPU default: every operation vectorised over sequences, heads and tokens in PyTorch, or compiled by numba."""

from __future__ import annotations

from kvquant.kernels.fused_read import read_exact, read_keys, read_values
from kvquant.kernels.fused_write import close_values, write_exact, write_keys, write_values
from kvquant.kernels.reference import rotate_tokens
from kvquant.kernels.tiled_attention import attend_tiled as attend

__all__ = [
    "attend",
    "close_values",
    "read_exact",
    "read_keys",
    "read_values",
    "rotate_tokens",
    "write_exact",
    "write_keys",
    "write_values",
]
