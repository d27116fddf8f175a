"""One set of operations, several backends, chosen by name.

Every backend is a module with the functions named in ``OPERATIONS``, of equal signatures: tensors, named tuples of
tensors, and ints; never a config. ``reference`` is the plain truth, ``pytorch_fused`` the vectorised CPU default,
``triton`` (the package ``triton_kernels``) the GPU default.

Shapes use the letters of the whole package: B sequences, T tokens of the ragged batch, H KV heads, G query heads per
KV head, D head_dim, C = H*D channels, N blocks in the pool, BS block_size.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kvquant.kernel_limits import capability_refusal
from kvquant.ragged import RaggedStep

log = logging.getLogger(__name__)

BACKENDS = ("reference", "pytorch_fused", "triton")
OPERATIONS = (
    "write_keys",
    "write_values",
    "write_exact",
    "close_values",
    "read_keys",
    "read_values",
    "read_exact",
    "attend",
)
OLDEST_TRITON = (3, 6)  # of those the kernels ran with; 3.2 lacks gather and small products
SPILL_ENTRIES = 32  # outliers in one spill chunk; 32 two-byte values are one 64-byte line

# What a kernel writes into the pool's error word; 0 means that all is well.
ERROR_KEY_NOT_FINITE, ERROR_VALUE_NOT_FINITE, ERROR_OUT_OF_SPILL = 1, 2, 3


class ExactStore(NamedTuple):
    """One side (keys or values) of one layer, unquantized."""

    data: Tensor  # [N, H, BS, D] model dtype


class KeyStore(NamedTuple):
    """The quantized keys of one layer. Outliers belong to a (block, head) and are in token order.

    The first ``base`` outliers of a (block, head) lie in its own row; further ones in chunks of 32 from a free stack
    that the layer's blocks share, linked from ``spill_head`` through ``spill_next``. Entry k of a (block, head) is
    stored iff k < count, so links beyond the count are dead and dropping entries is lowering the count.
    """

    codes: Tensor  # [N, H, BS, row_bytes] uint8
    outlier_count: Tensor  # [N, H] int32
    outlier_index: Tensor  # [N, H, base] int16 holding unsigned slot * D + channel
    outlier_value: Tensor  # [N, H, base] 16-bit float
    spill_head: Tensor  # [N, H] int32, first chunk
    spill_next: Tensor  # [num_chunks] int32
    spill_index: Tensor  # [num_chunks, 32] int16
    spill_value: Tensor  # [num_chunks, 32]
    spill_free: Tensor  # [num_chunks] int32, a stack of free chunks
    spill_top: Tensor  # [1] int32, height of that stack


class ValueStore(NamedTuple):
    """The quantized values of one layer. A token has VG groups with 2n outliers each.

    In an open block (one that tokens may still join) row t holds token t's outliers, channels ascending, and the index
    is the channel of the layer. In a closed block the same entries are ordered by head, then token, and the index is
    slot * D + channel of the head, so that the program of one head reads its own entries and no others.
    """

    codes: Tensor  # [N, H, BS, row_bytes] uint8
    zero: Tensor  # [N, BS, VG] 16-bit float
    scale: Tensor  # [N, BS, VG]
    outlier_index: Tensor  # [N, BS, VG * 2n] int16 holding an unsigned number
    outlier_value: Tensor  # [N, BS, VG * 2n]
    outlier_end: (
        Tensor  # [N, H] int32, where each head's entries end in a closed block; all 0: the block is open
    )


class MethodStore(NamedTuple):
    """Keys and values of one layer in the tensors that a method of its own has declared."""

    tensors: dict[str, Tensor]  # each [N, ...]


class RecentStore(NamedTuple):
    """The last R tokens of every sequence, exact; position p lies in place p % R as long as its tag says so."""

    keys: Tensor  # [rows, R, H, D] model dtype
    values: Tensor  # [rows, R, H, D]
    position: Tensor  # [rows, R] int32, the position each place holds


class LayerConstants(NamedTuple):
    """What calibration fixed for one layer (fp32)."""

    key_lower: Tensor  # [H, D]; keys outside [lower, upper] are outliers
    key_upper: Tensor  # [H, D]
    key_zero: Tensor  # [H, D]
    key_scale: Tensor  # [H, D]
    key_midpoints: Tensor  # [2^bits - 1] between centroids, normalized
    key_centroids: Tensor  # [2^bits], with Q-Norm applied
    value_midpoints: Tensor  # [2^bits - 1] between centroids, normalized
    value_centroids: Tensor  # [2^bits], with Q-Norm applied


class LayerStore(NamedTuple):
    """All that the pool holds for one layer."""

    keys: KeyStore | ExactStore | MethodStore
    values: ValueStore | ExactStore | MethodStore
    sink_keys: Tensor  # [rows, sink_tokens, H, D] model dtype, exact; sink_tokens may be 0
    sink_values: Tensor  # [rows, sink_tokens, H, D]
    error: Tensor  # [2] int64: kind of the first error (0: none), channel
    recent: RecentStore | None = None  # None where no recent token stays exact
    extra: dict[str, Tensor] | None = None  # further tensors [N, ...] of a method, by name


class Rope(NamedTuple):
    """Rotary tables for keys at rest: position = tile base + offset, R(q - k) = R(q - base) R(offset).

    Rotating the query back by the tile's base and the keys by their offset inside the tile needs one small table per
    tile size instead of a table row per cached token.
    """

    offset_cos: Tensor  # [tile, R/2] fp32 for offsets inside a tile, with the model's attention scaling
    offset_sin: Tensor  # [tile, R/2]
    base_cos: Tensor  # [tiles, R/2] fp32 for tile bases 0, tile, 2*tile, ...; without the scaling
    base_sin: Tensor  # [tiles, R/2]


@dataclasses.dataclass(frozen=True)
class StoredLayer:
    """One layer's part of the pool with what it takes to read it; calling it dequantizes whole blocks.

    Backends that dequantize tile by tile call it; those that read packed codes take it apart.
    """

    kernels: ModuleType
    keys: KeyStore | ExactStore | MethodStore
    values: ValueStore | ExactStore | MethodStore
    constants: LayerConstants | None
    key_bits: int
    value_bits: int
    head_dim: int

    def __call__(self, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pre-RoPE keys and the values of the blocks ``block_ids`` [S, P], fp32 [S, H, P*BS, D] each."""
        if isinstance(self.keys, ExactStore) or isinstance(self.values, ExactStore):
            return self.kernels.read_exact(self.keys, block_ids), self.kernels.read_exact(
                self.values, block_ids
            )
        D = self.head_dim
        return (
            self.kernels.read_keys(self.keys, self.constants, block_ids, bits=self.key_bits, head_dim=D),
            self.kernels.read_values(
                self.values, self.constants, block_ids, bits=self.value_bits, head_dim=D
            ),
        )


def get_backend(name: str, device_type: str = "cpu") -> ModuleType:
    """Return the backend module called ``name``; ``auto`` picks the default of the device.

    Raises:
        ValueError: the name is unknown or the backend cannot run here; says which would.
    """
    if name == "auto":
        reason = triton_refusal(device_type) if device_type == "cuda" else None
        name = "triton" if device_type == "cuda" and reason is None else "pytorch_fused"
        if reason is not None:
            say_once(f"kernel=auto runs plain PyTorch on the GPU: triton {reason}")
    if name not in BACKENDS:
        raise ValueError(f"kernel must be one of auto, {', '.join(BACKENDS)}, got {name!r}; try auto")
    if name == "triton":
        reason = triton_refusal(device_type)
        if reason:
            raise ValueError(f"kernel=triton {reason}; try kernel=pytorch_fused, which runs on {device_type}")
        name = "triton_kernels"
    return importlib.import_module(f"kvquant.kernels.{name}")


@functools.lru_cache(maxsize=64)
def say_once(message: str) -> None:
    """Log that something slower runs than could; the same words once a process, whatever the number of layers."""
    log.warning("%s", message)


@functools.lru_cache(maxsize=4)
def triton_refusal(device_type: str) -> str | None:
    """Say why the triton backend cannot run on a device; None: it can."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"needs triton {'.'.join(map(str, OLDEST_TRITON))} or later, got {version}"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # triton's interpreter, which tests use
    if device_type != "cuda":
        return f"must run on an NVIDIA GPU, got {device_type}"
    return capability_refusal(torch.cuda.get_device_capability())


def run_argument(kernels: ModuleType, step: RaggedStep) -> dict[str, Tensor]:
    """The argument by which a backend that works block by block learns which tokens share one; else nothing."""
    return {"runs": step.runs} if getattr(kernels, "TAKES_RUNS", False) else {}
