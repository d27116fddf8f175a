"""Choose and launch: decode calls read packed codes, prefill dequantizes segments for FlashAttention, and what neither
can do is dequantized tile by tile in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from kvquant.kernels import KeyStore, Rope, StoredLayer, ValueStore, say_once
from kvquant.kernels.cuda_decode import launch as cuda_decode
from kvquant.kernels.tiled_attention import attend_tiled
from kvquant.kernels.triton_kernels import decode, scratch
from kvquant.kernels.triton_kernels.decode_call import (
    attend_sinks,
    empty_parts,
    merge_parts,
    plane_bytes_of,
    prepare_call,
)
from kvquant.kernels.triton_kernels.exact_decode import attend_exact_decode, exact_refusal
from kvquant.kernels.triton_kernels.lookup import INTERPRET
from kvquant.kernels.triton_kernels.prefill import attend_prefill, prefill_refusal
from kvquant.kernels.triton_kernels.shares import places_of, programs_for
from kvquant.ragged import RaggedStep

DECODE_BITS = (2, 3, 4)
# Six programs of 64 threads share a multiprocessor with as many registers each. H200, 8 sequences of 32K tokens, us at
# 4, 3, 2 bits: 269, 253, 233, seven programs with 144 registers 277, 271, 226; in another run 260, 251, 222, eight with
# 128, which spill, 278, 267, 244.
_REGISTERS, _RESIDENT = 168, 6
# Of a program. H200, 4 bits, us of a call at 1, 2, 3, 4 rounds of programs (shares.py): 297, 272, 260, 264 where a
# place of the device has 41 blocks, 98, 90, 86, 86 where it has ten, but 54, 57, 62, 64 where it has five.
_FEWEST_BLOCKS = 3


def attend(
    query: Tensor,
    step: RaggedStep,
    read_tile: Callable[[Tensor], tuple[Tensor, Tensor]],
    rope: Rope | None,
    exact: tuple[Tensor, Tensor] | None,
    sinks: tuple[Tensor, Tensor] | None,
    *,
    block_size: int,
    blocks_per_tile: int,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of a call; arguments and result as of :func:`kvquant.kernels.tiled_attention.attend_tiled`.

    A call of one new token per sequence reads packed codes, with the CUDA kernel where it is chosen
    (:func:`kvquant.kernels.cuda_decode.launch.is_chosen`), else with Triton's (:func:`attend_decode`), or exact blocks
    (:func:`attend_exact_decode`); any other call is :func:`attend_prefill`'s. What a refusal has something against goes
    tile by tile, and of prompts that is said.
    """
    if max(step.lengths) == 1:
        in_cuda = cuda_decode.is_chosen(query, step.block_table, read_tile, rope, block_size, window)
        in_triton = ((decode_refusal, attend_decode), (exact_refusal, attend_exact_decode))
        ways = [way for refusal, way in in_triton if refusal(query, read_tile, rope, block_size) is None]
        for decode_with in (*([cuda_decode.attend_cuda_decode] if in_cuda else []), *ways[:1]):
            try:
                return decode_with(
                    query,
                    step.block_table,
                    step.kv_lengths_tensor,
                    read_tile,  # type: ignore[arg-type]
                    rope,
                    sinks,
                    block_size=block_size,
                    blocks_per_tile=blocks_per_tile,
                    softmax_scale=softmax_scale,
                    window=window,
                    softcap=softcap,
                )
            except cuda_decode.KernelNotBuilt as error:
                say_once(f"decoding takes Triton's kernel: {error}")
    if query.is_cuda:
        reason = prefill_refusal(query, read_tile, softcap)
        if reason is None:
            return attend_prefill(
                query,
                step,
                read_tile,  # type: ignore[arg-type]
                rope,
                exact if max(step.lengths) > 1 else None,
                sinks,
                block_size=block_size,
                softmax_scale=softmax_scale,
                window=window,
            )
        if max(step.lengths) > 1:
            say_once(f"prompts are attended to with plain PyTorch on the GPU, tile by tile: {reason}")
    return attend_tiled(
        query,
        step,
        read_tile,
        rope,
        exact,
        sinks,
        block_size=block_size,
        blocks_per_tile=blocks_per_tile,
        softmax_scale=softmax_scale,
        window=window,
        softcap=softcap,
    )


def decode_refusal(
    query: Tensor, layer: Callable[[Tensor], tuple[Tensor, Tensor]], rope: Rope | None, block_size: int
) -> str | None:
    """Say why the decode kernel is not for this layer; None: it is."""
    D = query.shape[-1]
    if not (isinstance(layer, StoredLayer) and isinstance(layer.keys, KeyStore)):
        return "it reads the packed codes of the nuq family"
    assert isinstance(layer.values, ValueStore)  # both sides of a layer are stored alike
    if layer.key_bits not in DECODE_BITS or layer.value_bits not in DECODE_BITS:
        return (
            f"it decodes {', '.join(map(str, DECODE_BITS))} bits, got {layer.key_bits} and {layer.value_bits}"
        )
    # A field of the keys' plane is one side of a product, which has 16 channels at least.
    if D % 16 or D > 256 or triton.next_power_of_2(plane_bytes_of(D, layer.key_bits)) < 16:
        return f"head_dim must be a multiple of 16 from 48 to 256 (from 32 at 4 bits), got {D}"
    if block_size not in (32, 64, 128):  # triton 3.6 fails to compile products of 16 tokens
        return f"cache.block_size must be 32, 64 or 128, got {block_size}"
    if rope is not None and rope.offset_cos.shape[-1] * 2 != D:
        return "it rotates whole heads"
    if layer.keys.codes.shape[1] % layer.values.zero.shape[-1]:
        return "a value group must hold whole heads"
    if query.shape[1] > 32 * layer.keys.codes.shape[1]:
        return (
            f"it serves up to 32 query heads per KV head, got {query.shape[1] // layer.keys.codes.shape[1]}"
        )
    return None


def attend_decode(
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

    Args:
        query: rotated at their positions, [B, Hq, D].
        block_table: int32 [B, M].
        kv_lengths: stored tokens of each sequence, its own included, int32 [B].
        layer: what the pool stores of the layer.
        rope, sinks, block_size, blocks_per_tile, softmax_scale, window, softcap: as of ``attend_tiled``.
        programs: among how many the batch's blocks are shared, for each KV head; None: as many as keep the device busy.

    Returns:
        [B, Hq, D] in the query's dtype.
    """
    B, Hq, D = query.shape
    keys, values, constants = layer.keys, layer.values, layer.constants
    assert isinstance(keys, KeyStore) and isinstance(values, ValueStore) and constants is not None
    H, M = keys.codes.shape[1], block_table.shape[1]
    G = Hq // H
    GP = max(8, triton.next_power_of_2(G))  # columns of a tensor core's product
    places = places_of(_RESIDENT, query.device)
    programs = max(B, programs or programs_for(B, H, M, places, _FEWEST_BLOCKS))
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    q = query.contiguous()
    factor = softmax_scale if softcap is not None else softmax_scale * decode.LOG2E.value
    KW = plane_bytes_of(D, layer.key_bits)
    rope = None if rope is None else Rope(*(t.contiguous() for t in rope))
    sink_tokens = 0 if sinks is None else sinks[0].shape[1]
    prepared, parts = prepare_call(
        q, kv_lengths, constants, rope, M, block_size, blocks_per_tile, factor, H, GP, KW,
        layer.key_bits, layer.value_bits, programs, max(1, places // H), _FEWEST_BLOCKS,
        window, sink_tokens,
    )  # fmt: skip
    # The exact first tokens of each sequence are one more part.
    best, total, out = empty_parts(programs + (B if sink_tokens else 0), H, GP, D, query.device)
    VW = plane_bytes_of(D, layer.value_bits)
    K_BASE = keys.outlier_index.shape[-1]
    outliers = K_BASE > 0 or values.outlier_index.shape[-1] > 0
    matrix = scratch.matrix_bytes(D, block_size, prepared[0].shape[1], GP) if outliers else 0
    # On a GPU each program has its own, in shared memory, and this is not looked at.
    memory = torch.zeros(scratch.scratch_bytes(matrix), dtype=torch.uint8) if INTERPRET else best
    decode._decode_kernel[(H, programs)](
        *prepared, memory, *((constants.key_zero,) * 2 if rope is None else (rope.offset_cos, rope.offset_sin)),
        table, kv_lengths,
        keys.codes, keys.outlier_count, keys.outlier_index, keys.outlier_value,
        keys.spill_head, keys.spill_next, keys.spill_index, keys.spill_value, constants.key_centroids,
        values.codes, values.zero, values.scale, values.outlier_index, values.outlier_value, values.outlier_end,
        constants.value_centroids,
        best, total, out,
        float(softcap or 1.0), window or 0, sink_tokens, table.stride(0),
        H, values.zero.shape[-1], 1 << 16,
        G=G, GP=GP, D=D, BS=block_size, KB=layer.key_bits, VB=layer.value_bits,
        KW=KW, VW=VW, K_ROW=keys.codes.shape[-1], V_ROW=values.codes.shape[-1],
        # Places for pairs of entries of keys: of a block's own row and its first chunk of 32 more.
        K_BASE=K_BASE, K_PLACES=max(128, triton.next_power_of_2(K_BASE + 32)), V_ENTRIES=values.outlier_index.shape[-1],
        ROTATED=rope is not None, HALF_QUERY=query.dtype == torch.float16,
        HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
        SCRATCH=scratch.declaration(matrix), MATRIX=matrix, num_warps=decode.WARPS, num_stages=1, maxnreg=_REGISTERS,
    )  # fmt: skip
    of_sinks = None
    if sinks is not None and sink_tokens:
        of_sinks = attend_sinks(q.float(), sinks, kv_lengths, rope, softmax_scale, softcap, window, H, GP)
    return merge_parts(query, (best, total, out), parts, programs, of_sinks)
