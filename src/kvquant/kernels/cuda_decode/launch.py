"""Decode attention over packed codes with the CUDA kernel: what it is for, and how it is called.

A program has a multiprocessor to itself, and each of its warps takes shares of (sequence, KV head) pairs on its own;
what one program's warps have in common are tables. Triton's kernels make its operands and merge its parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvquant.kernels import KeyStore, Rope, StoredLayer, ValueStore, say_once
from kvquant.kernels.cuda_decode.arguments import Arguments
from kvquant.kernels.cuda_decode.configuration import (
    BITS,
    BLOCK_SIZE,
    FEWEST_WARPS,
    HEAD_DIM,
    KERNEL,
    MOST_GROUPS,
    Configuration,
    read_source,
)
from kvquant.kernels.cuda_decode.driver import CudaDriverError, launch, load_kernel
from kvquant.kernels.cuda_decode.nvrtc import NvrtcError, compile_cubin, nvrtc_refusal
from kvquant.kernels.triton_kernels.decode import LOG2E
from kvquant.kernels.triton_kernels.decode_call import (
    attend_sinks,
    empty_parts,
    merge_parts,
    plane_bytes_of,
    prepare_call,
)
from kvquant.kernels.triton_kernels.lookup import INTERPRET
from kvquant.kernels.triton_kernels.shares import places_of, programs_for, programs_of_tiers

# Warps take further shares on their own as they end: see store_tiers. Multiprocessors differ by 8% in speed, and equal
# shares wait for the slowest; but every share costs a start, an end and a part to merge. H200, eight sequences of 32K
# tokens, 4 bits, us: in one run 175.6 with these, 180.4 with 2/16 in fifths of three blocks at least,
# 176.9 with 1/16 in sixths and 1/16 in single blocks; in another 179.5 with these, 187.5 with quarters for fifths, 199.5
# with 2/16 in quarters, which end when large ones do.
_TIERS, _FEWEST_SMALL = ((14, 1), (1, 5), (1, 8)), 2
# Of more sequences than that is for, one round of shares of about one size.
_ROUNDS, _FEWEST_BLOCKS = 1, 3
# Blocks that each warp must have, or Triton's kernel is quicker. H200, eight KV heads, us in a graph at 4, 3, 2 bits, of a
# form before that had shares of one size, as there are again of so few blocks: one sequence of 32K tokens, 2.6 blocks for
# each of 1,584 warps, 54, 56, 51 and Triton's 52, 48, 45; eight sequences of 8K, 5.2 blocks, 65, 65, 61 and 86, 85, 77.
_FEWEST_FOR_A_WARP = 3.5
OLDEST = (9, 0)  # on an A100 it compiles, and was not run


class KernelNotBuilt(RuntimeError):
    """The kernel cannot be compiled or loaded here."""


def cuda_decode_refusal(
    query: Tensor, layer: Callable[[Tensor], tuple[Tensor, Tensor]], rope: Rope | None, block_size: int
) -> str | None:
    """Say why the CUDA decode kernel is not for this layer or device; None: it is. A missing compiler is logged."""
    D = query.shape[-1]
    if not (isinstance(layer, StoredLayer) and isinstance(layer.keys, KeyStore)):
        return "it reads the packed codes of the nuq family"
    keys, values = layer.keys, layer.values
    assert isinstance(values, ValueStore)  # both sides of a layer are stored alike
    if layer.key_bits not in BITS or layer.value_bits not in BITS:
        return f"it decodes {', '.join(map(str, BITS))} bits, got {layer.key_bits} and {layer.value_bits}"
    if D != HEAD_DIM:
        return f"head_dim must be {HEAD_DIM}, got {D}"
    if block_size != BLOCK_SIZE:
        return f"cache.block_size must be {BLOCK_SIZE}, got {block_size}"
    if rope is None or rope.offset_cos.shape[-1] * 2 != D:
        return "it rotates whole heads"
    H = keys.codes.shape[1]
    if query.shape[1] > MOST_GROUPS * H:
        return f"it serves up to {MOST_GROUPS} query heads per KV head, got {query.shape[1] // H}"
    if H % values.zero.shape[-1]:
        return "a value group must hold whole heads"
    stored = (keys.outlier_value, keys.spill_value, values.outlier_value, values.zero, values.scale)
    kinds = {x.dtype for x in stored}
    if len(kinds) > 1 or kinds.isdisjoint((torch.bfloat16, torch.float16)):
        return f"what is stored beside codes must be bf16 or fp16, got {', '.join(sorted(map(str, kinds)))}"
    if keys.outlier_index.shape[-1] % 8:
        return f"it reads outliers of keys by eights, got {keys.outlier_index.shape[-1]} in a block's own row"
    if BLOCK_SIZE * values.outlier_index.shape[-1] >= 1 << 15:
        entries = BLOCK_SIZE * values.outlier_index.shape[-1]
        return f"it counts outliers of a block's values up to {(1 << 15) - 1}, got {entries}"
    if not query.is_cuda or INTERPRET:
        return "it runs on a GPU"
    reason = _device_refusal(_configuration(query, layer), query.device)
    if reason is None and (reason := nvrtc_refusal()) is not None:
        say_once(f"decoding takes Triton's kernel: {reason}")
    return reason


def is_chosen(
    query: Tensor,
    block_table: Tensor,
    layer: Callable[[Tensor], tuple[Tensor, Tensor]],
    rope: Rope | None,
    block_size: int,
    window: int | None = None,
) -> bool:
    """Whether a decode call is this kernel's: it is for it, and there may be blocks enough to keep its warps busy.

    How many there are only the device knows; what is looked at is the size of the block table, [B, M], and how many
    blocks a window reaches over.
    """
    if cuda_decode_refusal(query, layer, rope, block_size) is not None:
        return False
    assert isinstance(layer, StoredLayer) and isinstance(layer.keys, KeyStore)
    configuration = _fitted(query, layer)
    assert configuration is not None, "see _device_refusal"
    B, M = block_table.shape
    seen = M if window is None else min(M, -(-window // block_size) + 1)
    blocks = B * seen * layer.keys.codes.shape[1]
    return blocks >= _FEWEST_FOR_A_WARP * places_of(configuration.warps, query.device)


def _configuration(
    query: Tensor, layer: StoredLayer, window: int | None = None, softcap: float | None = None
) -> Configuration:
    """What a call needs, with as few warps as there may be."""
    keys, values = layer.keys, layer.values
    assert isinstance(keys, KeyStore) and isinstance(values, ValueStore)
    return Configuration(
        key_bits=layer.key_bits,
        value_bits=layer.value_bits,
        groups=query.shape[1] // keys.codes.shape[1],
        is_bfloat16=values.zero.dtype == torch.bfloat16,
        key_base=keys.outlier_index.shape[-1],
        value_entries=values.outlier_index.shape[-1],
        has_window=window is not None,
        has_softcap=softcap is not None,
    )


@functools.cache
def _with_most_warps(configuration: Configuration, shared_bytes: int) -> Configuration | None:
    return configuration.with_most_warps(shared_bytes)


def _fitted(
    query: Tensor, layer: StoredLayer, window: int | None = None, softcap: float | None = None
) -> Configuration | None:
    """What a call needs, with as many warps as its device holds; None: too small."""
    properties = torch.cuda.get_device_properties(query.device)
    return _with_most_warps(_configuration(query, layer, window, softcap), _shared_bytes(properties))


def _device_refusal(configuration: Configuration, device: torch.device) -> str | None:
    """Say why a device is too old or too small; None: it is neither."""
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < OLDEST:
        return f"it is for compute capability {OLDEST[0]}.{OLDEST[1]} and later, got {properties.major}.{properties.minor}"
    if _with_most_warps(configuration, _shared_bytes(properties)) is None:
        return (
            f"{FEWEST_WARPS} warps need {configuration.shared_bytes} bytes of shared memory at {configuration.key_bits} "
            f"and {configuration.value_bits} bits, got a GPU with {_shared_bytes(properties)}"
        )
    return None


def _shared_bytes(properties: Any) -> int:
    """Shared memory that a program of a device may ask for."""
    return properties.shared_memory_per_block_optin


@functools.cache
def _build(configuration: Configuration, device: int) -> int | str:
    """The kernel, loaded on a device; else why not, so that what fails is tried once."""
    try:
        major, minor = torch.cuda.get_device_capability(device)
        cubin = compile_cubin(read_source(), configuration.options, 10 * major + minor)
        return load_kernel(cubin, KERNEL, configuration.shared_bytes, device)
    except (NvrtcError, CudaDriverError) as error:
        return str(error)


def attend_cuda_decode(
    query: Tensor,
    block_table: Tensor,
    kv_lengths: Tensor,
    layer: StoredLayer,
    rope: Rope | None,
    sinks: tuple[Tensor, Tensor] | None,
    *,
    block_size: int,
    blocks_per_tile: int,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    programs: int | None = None,
) -> Tensor:
    """Attention of one new token of each sequence over its packed history; waits for nothing on the device.

    Arguments and result as of :func:`kvquant.kernels.triton_kernels.attention.attend_decode`; ``programs`` are shares
    of the batch's blocks, a warp's each.

    Raises:
        KernelNotBuilt: NVRTC or the driver refuses; nothing was launched.
    """
    B, _, D = query.shape
    keys, values, constants = layer.keys, layer.values, layer.constants
    assert isinstance(keys, KeyStore) and isinstance(values, ValueStore)
    assert constants is not None and rope is not None
    device = query.device
    properties = torch.cuda.get_device_properties(device)
    configuration = _fitted(query, layer, window, softcap)
    assert configuration is not None, "see _device_refusal"
    kernel = _build(configuration, device.index)
    if isinstance(kernel, str):
        raise KernelNotBuilt(kernel)

    H, M, GP = keys.codes.shape[1], block_table.shape[1], configuration.padded_groups
    places = places_of(configuration.warps, device)
    at_once = max(1, places // H)
    tiers = _TIERS if programs is None and at_once >= 2 * B else ()
    if tiers:
        programs = min(programs_of_tiers(B, at_once, tiers), B * M)
    else:
        programs = max(B, programs or programs_for(B, H, M, places, _FEWEST_BLOCKS, _ROUNDS))
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    q, rope = query.contiguous(), Rope(*(t.contiguous() for t in rope))
    factor = softmax_scale if softcap is not None else softmax_scale * LOG2E.value
    sink_tokens = 0 if sinks is None else sinks[0].shape[1]
    prepared, parts = prepare_call(
        q, kv_lengths, constants, rope, M, block_size, blocks_per_tile, factor, H, GP,
        plane_bytes_of(D, layer.key_bits), layer.key_bits, layer.value_bits,
        programs, at_once, _FEWEST_SMALL if tiers else _FEWEST_BLOCKS, window, sink_tokens, pairs=True, tiers=tiers,
        early=query.is_cuda,
    )  # fmt: skip
    heads, _, _, _, unit, angles, bases, wide_bases, slow, shares = prepared
    # The exact first tokens of each sequence are one more part.
    found = empty_parts(programs + (B if sink_tokens else 0), H, GP, D, device)
    best, total, out = found
    tensors = {
        "heads": heads, "unit": unit, "angles": angles, "slow": slow,
        "bases": bases if configuration.is_bfloat16 else wide_bases,
        "shares": shares, "block_table": table, "kv_lengths": kv_lengths,
        "key_codes": keys.codes, "key_count": keys.outlier_count,
        "key_index": keys.outlier_index, "key_value": keys.outlier_value,
        "spill_head": keys.spill_head, "spill_next": keys.spill_next,
        "spill_index": keys.spill_index, "spill_value": keys.spill_value, "key_centroids": constants.key_centroids,
        "value_codes": values.codes, "value_zero": values.zero, "value_scale": values.scale,
        "value_index": values.outlier_index, "value_value": values.outlier_value, "value_end": values.outlier_end,
        "value_centroids": constants.value_centroids,
        "part_best": best, "part_total": total, "part_out": out,
    }  # fmt: skip
    arguments = Arguments(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        taken=parts[B].data_ptr(),  # see shares.py
        softcap=float(softcap or 1.0), window=window or 0, sink_tokens=sink_tokens, table_stride=table.stride(0),
        H=H, VG=values.zero.shape[-1],
    )  # fmt: skip
    launch(
        kernel, arguments, grid=min(properties.multi_processor_count, programs * H), threads=32 * configuration.warps,
        shared_bytes=configuration.shared_bytes, device=device.index,
    )  # fmt: skip
    of_sinks = None
    if sinks is not None and sink_tokens:
        of_sinks = attend_sinks(q.float(), sinks, kv_lengths, rope, softmax_scale, softcap, window, H, GP)
    return merge_parts(query, found, parts, programs, of_sinks, early=query.is_cuda)
