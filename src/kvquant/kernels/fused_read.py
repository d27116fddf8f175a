"""Reading stored blocks back into tiles, vectorised over sequences, heads and tokens in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant.encoding import SERIAL_ELEMENTS, row_chunks
from kvquant.kernels import SPILL_ENTRIES, ExactStore, KeyStore, LayerConstants, ValueStore
from kvquant.packing import unpack


def read_exact(store: ExactStore, block_ids: Tensor) -> Tensor:
    """Return stored tiles in fp32, [S, H, P*BS, D], of the blocks ``block_ids`` [S, P]."""
    S, P = block_ids.shape
    _, H, BS, D = store.data.shape
    return store.data[block_ids].permute(0, 2, 1, 3, 4).reshape(S, H, P * BS, D).float()


def read_keys(
    store: KeyStore, constants: LayerConstants, block_ids: Tensor, *, bits: int, head_dim: int
) -> Tensor:
    """Dequantize blocks of keys to tiles, outliers restored exactly.

    Args:
        store: the layer's keys in the pool.
        constants: codebook, zero and scale of the layer.
        block_ids: P consecutive blocks for each of S sequences, int64 [S, P].
        bits: width of a code.
        head_dim: D.

    Returns:
        pre-RoPE keys, fp32 [S, H, P*BS, D]. Slots never written hold arbitrary finite numbers.
    """
    S, P = block_ids.shape
    _, H, BS, _ = store.codes.shape
    flat, tile = _channel_major_tile(S, H, P * BS, head_dim, store.codes.device)
    _lookup(store.codes, constants.key_centroids, block_ids, bits, tile)
    tile.mul_(constants.key_scale[:, :, None]).add_(constants.key_zero[:, :, None])

    sequence = torch.arange(S, device=block_ids.device).view(S, 1, 1)
    head = torch.arange(H, device=block_ids.device)
    block = torch.arange(P, device=block_ids.device).view(1, P, 1)
    origin = (sequence * H + head) * (head_dim * P * BS) + block * BS  # [S, P, H] of slot 0, channel 0

    def restore(index: Tensor, values: Tensor, count: Tensor) -> None:
        """Put entries [S, P, H, K] back; those past ``count`` [S, P, H] are absent and land behind the tile."""
        present = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        index = index.to(torch.int64).bitwise_and_(0xFFFF)
        slot = torch.div(index, head_dim, rounding_mode="floor")
        where = origin[..., None] + (index - slot * head_dim) * (P * BS) + slot
        flat[torch.where(present, where, flat.numel() - 1)] = values.float()

    count = store.outlier_count[block_ids]  # [S, P, H]
    base = store.outlier_index.shape[-1]
    if base:
        restore(store.outlier_index[block_ids], store.outlier_value[block_ids], count)
    left = count - base
    chunk = store.spill_head[block_ids].to(torch.int64)
    for _ in range(-(-int(left.max()) // SPILL_ENTRIES)):
        # Groups whose chain has ended have nothing left: their (stale) chunk is read and thrown away.
        restore(store.spill_index[chunk], store.spill_value[chunk], left)
        left = left - SPILL_ENTRIES
        chunk = store.spill_next[chunk].to(torch.int64)
    return tile.transpose(-1, -2)


def read_values(
    store: ValueStore, constants: LayerConstants, block_ids: Tensor, *, bits: int, head_dim: int
) -> Tensor:
    """Dequantize blocks of values to tiles, outliers restored exactly; shapes as in :func:`read_keys`."""
    S, P = block_ids.shape
    _, H, BS, _ = store.codes.shape
    VG, tokens = store.zero.shape[-1], P * BS
    flat, tile = _channel_major_tile(S, H, tokens, head_dim, store.codes.device)
    _lookup(store.codes, constants.value_centroids, block_ids, bits, tile)
    # Groups are runs of channels of the layer, which is how a channel-major tile lies in memory.
    by_group = tile.view(S, VG, -1, tokens)
    by_group.mul_(store.scale[block_ids].float().view(S, tokens, VG).transpose(1, 2)[:, :, None])
    by_group.add_(store.zero[block_ids].float().view(S, tokens, VG).transpose(1, 2)[:, :, None])
    if store.outlier_index.shape[-1]:
        channel, slot = _value_outlier_places(store, block_ids, head_dim)  # [S, P, BS * 2n]
        origin = torch.arange(P, device=block_ids.device).view(1, P, 1) * BS
        sequence = torch.arange(S, device=block_ids.device).view(S, 1, 1)
        where = (sequence * (H * head_dim) + channel) * tokens + origin + slot
        flat[where] = store.outlier_value[block_ids].float().view_as(where)
    return tile.transpose(-1, -2)


def _value_outlier_places(store: ValueStore, block_ids: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Channel of the layer and slot of every outlier of blocks [S, P], open or closed: int64 [S, P, BS * VG*2n] each."""
    S, P = block_ids.shape
    _, BS, K = store.outlier_index.shape
    H = store.outlier_end.shape[-1]
    number = store.outlier_index[block_ids].view(S, P, BS * K).to(torch.int64) & 0xFFFF
    end = store.outlier_end[block_ids].to(torch.int64)  # [S, P, H]
    place = torch.arange(BS * K, device=block_ids.device)
    head = torch.searchsorted(end, place.expand(S, P, -1).contiguous(), right=True)
    slot = torch.div(number, head_dim, rounding_mode="floor")
    closed = end[..., -1:] > 0
    # A slot not yet written may hold a number from when the block was closed last, which is no channel.
    channel = torch.where(
        closed, head * head_dim + number - slot * head_dim, number.clamp(max=H * head_dim - 1)
    )
    return channel, torch.where(closed, slot, torch.div(place, K, rounding_mode="floor"))


def _channel_major_tile(S: int, H: int, tokens: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A tile [S, H, D, tokens] and its flat form, which has one element more: absent entries are written there.

    Channels lie outermost because heads are narrow and tiles long: every operation then runs over whole tokens.
    """
    size = S * H * tokens * D
    flat = torch.empty(size + 1, device=device)
    return flat, flat[:size].view(S, H, D, tokens)


def _lookup(codes: Tensor, centroids: Tensor, block_ids: Tensor, bits: int, out: Tensor) -> None:
    """Gather blocks of codes, channel-major, and replace each code by its centroid in ``out`` [S, H, D, tokens]."""
    S, H, D, tokens = out.shape
    # Turned while still packed: a fraction of the bytes that turning the numbers would move.
    rows = codes[block_ids].permute(0, 2, 4, 1, 3).reshape(S, H, codes.shape[-1], tokens)
    unpacked = unpack(rows.transpose(-1, -2), bits, D).transpose(-1, -2)
    flat, numbers = unpacked.reshape(-1), out.view(-1)
    # A one-dimensional index_select with 32-bit indices was 5x faster than indexing on CPUs. In chunks, because the
    # indices take as many bytes as the numbers.
    for part in row_chunks(flat, SERIAL_ELEMENTS):
        torch.index_select(centroids, 0, flat[part].to(torch.int32), out=numbers[part])
