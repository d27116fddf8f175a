"""What the decode kernels over packed codes have in common: what is made before them, and what becomes of their parts."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvquant.kernels import LayerConstants, Rope
from kvquant.kernels.triton_kernels import decode, merge, prepare
from kvquant.kernels.triton_kernels.shares import Tiers, empty_shares, padded
from kvquant.packing import packed_row_bytes, plane_widths


def plane_bytes_of(head_dim: int, bits: int) -> int:
    """Bytes of the widest plane of a row of 2, 3 or 4-bit codes: the channels of one field."""
    return packed_row_bytes(head_dim, max(plane_widths(bits)))


def prepare_call(
    query: Tensor,
    kv_lengths: Tensor,
    constants: LayerConstants,
    rope: Rope | None,
    columns: int,
    block_size: int,
    blocks_per_tile: int,
    factor: float,
    H: int,
    GP: int,
    plane_bytes: int,
    bits: int,
    value_bits: int,
    programs: int,
    at_once: int,
    fewest_blocks: int,
    window: int | None,
    sink_tokens: int,
    pairs: bool = False,
    tiers: Tiers = (),
    early: bool = False,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """A decode kernel's first ten arguments (see prepare.py), a few KiB per head, half a KiB per block, and parts.

    Args:
        query: [B, Hq, D].
        kv_lengths: int32 [B].
        constants, rope, window: as of a decode call.
        columns: of the block table, M.
        block_size, blocks_per_tile: tokens of a block, blocks of a rotary tile.
        factor: of scores.
        H, GP: KV heads, and columns of a product for their query heads.
        plane_bytes: of the keys' widest plane, see :func:`plane_bytes_of`.
        bits, value_bits: of a code.
        programs, at_once, fewest_blocks: how blocks are shared, see shares.py.
        sink_tokens: first tokens that are kept apart.
        pairs: cosines and sines side by side, and angles from the middle of a block: of the CUDA kernel.
        tiers: of shares of blocks, see :func:`kvquant.kernels.triton_kernels.shares.store_tiers`; none: all are alike.
        early: the kernel after this one is launched before this one ends.
    """
    B, Hq, D = query.shape
    BH, wide, half = B * H, torch.float32, torch.float16
    words_per_lane, halves = -(-plane_bytes // 16), 1 if bits == 4 else 2
    units = words_per_lane * halves
    rows = min(block_size, 64)  # keys are rotated by their place among as many
    bases = 0 if rope is None else columns * block_size // rows

    def empty(*shape: int, dtype: torch.dtype = half) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=query.device)

    heads = empty(BH, GP + 3, D) if pairs else empty(BH, units, GP, 4, 8)
    prepared = (
        heads,
        heads if pairs else empty(BH, D, GP),
        heads if pairs else empty(BH, units, 4, 16),
        heads if pairs else empty(BH, D, dtype=wide),
        empty(BH, 2, dtype=wide),
        empty(units, rows // 16, 64, 8),
        empty(max(bases, 1), units, 4, 8),
        empty(max(bases, 1), D, dtype=wide),
        empty(36, dtype=torch.int32),
    )
    shares, parts = empty_shares(B, programs, query.device)
    tables = (constants.key_zero,) * 4 if rope is None else tuple(rope)
    prepare._prepare_kernel[(B + BH + (0 if rope is None else rows) + bases,)](
        query, constants.key_zero, constants.key_scale, constants.key_centroids, constants.value_centroids, *tables,
        kv_lengths, *prepared, shares, parts,
        BH, H, blocks_per_tile * block_size // rows, float(factor), programs, at_once, window or 0, sink_tokens,
        G=Hq // H, GP=GP, D=D, DP=triton.next_power_of_2(D), ROWS=rows, W=plane_bytes,
        CPL=words_per_lane, NP=halves, PLACES=triton.next_power_of_2(units * 16), KB=bits, VB=value_bits, BS=block_size,
        SEQUENCES=padded(B), FEWEST=fewest_blocks, HAS_WINDOW=window is not None, PAIRS=pairs, TIERS=tiers,
        COUNT=len(tiers), EARLY=early, num_warps=4, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return (*prepared, shares), parts


def attend_sinks(
    query: Tensor,
    sinks: tuple[Tensor, Tensor],
    kv_lengths: Tensor,
    rope: Rope | None,
    softmax_scale: float,
    softcap: float | None,
    window: int | None,
    H: int,
    GP: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend over the exact first tokens, as one more part: best, total [B, H, GP], output [B, H, GP, D]."""
    B, Hq, D = query.shape
    keys, values = (x.float().transpose(1, 2) for x in sinks)  # [B, H, S, D]
    S = keys.shape[2]
    if rope is not None:
        half = D // 2
        cos, sin = rope.offset_cos[:S], rope.offset_sin[:S]
        first, second = keys[..., :half], keys[..., half:]
        keys = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    scores = query.view(B, H, Hq // H, D) @ keys.transpose(-1, -2) * softmax_scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    position = torch.arange(S, device=query.device)
    visible = position < kv_lengths[:, None]
    if window is not None:
        visible = visible & (position >= kv_lengths[:, None] - window)
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf) * decode.LOG2E.value
    best = scores.amax(-1)
    weights = torch.exp2(scores - best.masked_fill(best == -torch.inf, 0.0)[..., None])
    pad = (0, GP - Hq // H)
    best = torch.nn.functional.pad(best, pad)
    total = torch.nn.functional.pad(weights.sum(-1), pad)
    return best, total, torch.nn.functional.pad(weights @ values, (0, 0, *pad))


def empty_parts(rows: int, H: int, GP: int, D: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what ``rows`` programs of each KV head find: best, total [rows, H, GP], output [rows, H, GP, D], fp32."""
    best, total = (torch.empty(rows, H, GP, dtype=torch.float32, device=device) for _ in range(2))
    return best, total, torch.empty(rows, H, GP, D, dtype=torch.float32, device=device)


def merge_parts(
    query: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    parts: Tensor,
    programs: int,
    of_sinks: tuple[Tensor, Tensor, Tensor] | None,
    early: bool = False,
) -> Tensor:
    """Add up what programs found: [B, Hq, D] in the query's dtype.

    Args:
        query: [B, Hq, D]; its shape and dtype are looked at.
        found: see :func:`empty_parts`; of ``programs`` rows, and of B more where there are sinks.
        parts: int32 [B + 1, 2], see shares.py.
        programs: rows of ``found`` that are of programs.
        of_sinks: what :func:`attend_sinks` gave, written behind them; None: there are none.
        early: launch the merge before the kernel before it ends, which it then waits for.
    """
    B, Hq, D = query.shape
    H, GP = found[0].shape[1:]
    if of_sinks is not None:
        for whole, last in zip(found, of_sinks, strict=True):
            whole[programs:] = last
    merged = torch.empty_like(query, memory_format=torch.contiguous_format)
    wide = 2 if programs > 32 * B else 1
    merge._merge_kernel[(B * Hq,)](
        *found, parts, merged, programs, H, SINKS=int(of_sinks is not None),
        G=Hq // H, GP=GP, D=D, DP=triton.next_power_of_2(D), STEP=32 * wide, EARLY=early,
        num_warps=4 * wide, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return merged
