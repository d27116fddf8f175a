"""The kernel's argument, a struct of pointers and numbers."""

from __future__ import annotations

import ctypes

POINTERS = (
    # Made before the kernel (kvquant.kernels.triton_kernels.prepare)
    "heads", "unit", "bases", "angles", "slow", "shares",
    # Of the call
    "block_table", "kv_lengths",
    # Keys
    "key_codes", "key_count", "key_index", "key_value",
    "spill_head", "spill_next", "spill_index", "spill_value", "key_centroids",
    # Values
    "value_codes", "value_zero", "value_scale", "value_index", "value_value", "value_end", "value_centroids",
    # A number that starts at 0, by which warps take shares, and how many there are of each head; what warps find
    "taken", "part_best", "part_total", "part_out",
)  # fmt: skip
INTEGERS = ("window", "sink_tokens", "table_stride", "H", "VG")


class Arguments(ctypes.Structure):
    """``struct Arguments`` of decode.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int) for name in INTEGERS),
    ]
