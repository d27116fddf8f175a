"""Prefill over stored history on the GPU: segments of it dequantized into a workspace, read by FlashAttention.

A product of many queries is bound by arithmetic, where a library's kernel is at its best and a block that is decoded
once is read by all of them: writing and reading a segment back adds a few per cent. The workspace holds one segment,
whatever the history; what segments give is merged by log-sum-exp (Milakov and Gimelshein 2018, online softmax).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvquant.kernels import ExactStore, KeyStore, Rope, StoredLayer, ValueStore
from kvquant.kernels.prefill_plan import Segment, plan_prefill
from kvquant.kernels.triton_kernels.dequantize import copy_exact, dequantize_keys, dequantize_values
from kvquant.ragged import RaggedStep

# Keys of a segment: 64 MiB of keys and values at eight 128-channel heads, and few enough merges not to matter.
WORKSPACE_TOKENS = 16384

# (query [T, Hq, D], keys [K, H, D], values, segment, softmax scale, window) -> output [T, Hq, D], log-sum-exp [Hq, T]
AttendSegment = Callable[[Tensor, Tensor, Tensor, Segment, float, int | None], tuple[Tensor, Tensor]]


@triton.jit(do_not_specialize=["T"])
def _fold_kernel(
    total, total_lse, part, part_lse, into, T, lse_stride, part_lse_stride, HQ,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Merge a part into the running total; a log-sum-exp of either infinity says that no key was seen."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    d = tl.arange(0, DP)
    live = row < T
    at = (row.to(tl.int64) * HQ + head)[:, None] * D + d[None, :]
    there = live[:, None] & (d < D)[None, :]
    old = tl.load(total_lse + head * lse_stride + row, mask=live, other=-float("inf"))
    new = tl.load(part_lse + head * part_lse_stride + row, mask=live, other=-float("inf"))
    new = tl.where(new == float("inf"), -float("inf"), new)
    best = tl.maximum(old, new)
    shift = tl.where(best == -float("inf"), 0.0, best)
    old_weight, new_weight = tl.exp(old - shift), tl.exp(new - shift)
    weight = old_weight + new_weight
    # Each warp loads the log-sum-exps of its own rows, one warp stores those of all: not before the others have theirs.
    tl.debug_barrier()
    tl.store(total_lse + head * lse_stride + row, shift + tl.log(weight), mask=live)
    # What was never written is not read: it may be NaN.
    before = tl.load(total + at, mask=there & (old_weight > 0)[:, None], other=0.0)
    after = tl.load(part + at, mask=there, other=0.0).to(tl.float32)
    scale = tl.where(weight > 0, 1.0 / weight, 0.0)
    merged = before * (old_weight * scale)[:, None] + after * (new_weight * scale)[:, None]
    tl.store(into + at, merged.to(into.dtype.element_ty), mask=there)


def fold(total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor, into: Tensor) -> None:
    """Merge a part of some queries' attention into what was seen before.

    Args:
        total: running output, fp32 [T, Hq, D].
        total_lse: its log-sum-exp, fp32 [Hq, T] with neighbouring queries adjacent; updated. -inf: nothing was seen.
        part: the part's output, [T, Hq, D].
        part_lse: fp32 [Hq, T]; infinite of either sign: it saw nothing.
        into: where the merged output goes, [T, Hq, D]: ``total`` itself, or the result.
    """
    T, Hq, D = part.shape
    _fold_kernel[(triton.cdiv(T, 16), Hq)](
        total, total_lse, part.contiguous(), part_lse, into, T, total_lse.stride(0), part_lse.stride(0), Hq,
        D=D, DP=triton.next_power_of_2(D), ROWS=16, num_warps=4,
    )  # fmt: skip


def flash_attention(
    query: Tensor, keys: Tensor, values: Tensor, segment: Segment, softmax_scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """FlashAttention of a segment's queries over its keys, see ``AttendSegment``."""
    # One query of each sequence would take a path that turns query heads into queries, and the sums with them.
    max_queries = max(2, segment.max_queries)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        keys,
        values,
        segment.cu_queries,
        segment.cu_keys,
        max_queries,
        segment.max_keys,
        0.0,  # dropout
        segment.is_last,  # causal, aligned at the end
        False,
        scale=softmax_scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return out, lse


def prefill_refusal(query: Tensor, layer: object, softcap: float | None) -> str | None:
    """Say why prefill over dequantized segments is not for this layer; None: it is.

    Args:
        query: [T, Hq, D].
        layer: what reads its tiles.
        softcap: tanh cap of the scores, or None.
    """
    D = query.shape[-1]
    if not (isinstance(layer, StoredLayer) and isinstance(layer.keys, KeyStore | ExactStore)):
        return "it reads exact blocks and those of the nuq family"
    if D % 8 or D > 256:
        return f"head_dim must be a multiple of 8 up to 256, got {D}"
    if softcap is not None:
        return "FlashAttention has no softcap here"
    if query.is_cuda and not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no FlashAttention"
    # Last: for any reason above a model's queries come in fp32 (PrefillQuantizedAttention.query_dtype).
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention takes fp16 and bf16, got {query.dtype}"
    return None


def attend_prefill(
    query: Tensor,
    step: RaggedStep,
    layer: StoredLayer,
    rope: Rope | None,
    exact: tuple[Tensor, Tensor] | None,
    sinks: tuple[Tensor, Tensor] | None,
    *,
    block_size: int,
    softmax_scale: float,
    window: int | None = None,
    workspace_tokens: int = WORKSPACE_TOKENS,
    attend_segment: AttendSegment = flash_attention,
) -> Tensor:
    """Causal attention of new queries over the stored history and the chunk itself.

    Args:
        query: rotated at their positions, [T, Hq, D] fp16 or bf16, which is also what keys and values are rounded to.
        step, rope, exact, sinks, block_size, softmax_scale, window: as of ``attend_tiled``.
        layer: what the pool stores of the layer.
        workspace_tokens: keys that are dequantized at once, as far as the chunk and the window leave a choice.
        attend_segment: the product of one segment.

    Returns:
        [T, Hq, D] in the query's dtype.
    """
    T, Hq, D = query.shape
    assert isinstance(layer.keys, KeyStore | ExactStore)
    stored = layer.keys.data if isinstance(layer.keys, ExactStore) else layer.keys.codes
    H = stored.shape[1]
    segments = plan_prefill(
        step.past,
        step.lengths,
        block_size=block_size,
        workspace_tokens=workspace_tokens,
        own_exact=exact is not None,
        window=window,
        sink_tokens=0 if sinks is None else sinks[0].shape[1],
        device=query.device,
    )
    query = query.contiguous()
    most = max(segment.num_keys for segment in segments)
    workspace = query.new_empty(2, most, H, D)
    result = torch.empty_like(query)
    total, total_lse = result, None
    if not segments[0].is_last:
        total = torch.empty(T, Hq, D, dtype=torch.float32, device=query.device)
        total_lse = torch.full((Hq, T), -torch.inf, device=query.device)
    for segment in segments:
        keys, values = _read_segment(
            workspace[:, : segment.num_keys], segment, step.block_table, layer, rope, exact, sinks
        )
        part, lse = attend_segment(query[segment.queries], keys, values, segment, softmax_scale, window)
        if total_lse is not None:
            into = result if segment.is_last else total
            fold(total[segment.queries], total_lse[:, segment.queries], part, lse, into[segment.queries])
        elif len(segments) == 1:
            return part
        else:
            result[segment.queries] = part
    return result


def _read_segment(
    workspace: Tensor,
    segment: Segment,
    table: Tensor,
    layer: StoredLayer,
    rope: Rope | None,
    exact: tuple[Tensor, Tensor] | None,
    sinks: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Fill a workspace [2, K, H, D] with a segment's keys, rotated to their positions, and values."""
    keys, values = workspace
    _, H, D = keys.shape
    table = table if table.stride(1) == 1 else table.contiguous()
    if isinstance(layer.keys, ExactStore):
        assert isinstance(layer.values, ExactStore)
        copy_exact(segment.blocks, table, layer.keys.data, layer.values.data, (keys, values), rope)
    elif len(segment.blocks):
        assert isinstance(layer.keys, KeyStore) and isinstance(layer.values, ValueStore)
        assert layer.constants is not None
        strides = {"row_stride": H * D, "head_stride": D}
        block_size = layer.keys.codes.shape[2]
        dequantize_keys(
            layer.keys, layer.constants, segment.blocks, table, keys, rope,
            bits=layer.key_bits, block_size=block_size, **strides,
        )  # fmt: skip
        dequantize_values(
            layer.values, layer.constants, segment.blocks, table, values,
            bits=layer.value_bits, head_dim=D, **strides,
        )  # fmt: skip
    if exact is not None:
        copy_exact(segment.own, None, exact[0].contiguous(), exact[1].contiguous(), (keys, values), rope)
    if sinks is not None:
        copy_exact(segment.sinks, None, sinks[0].contiguous(), sinks[1].contiguous(), (keys, values), rope)
    return keys, values
