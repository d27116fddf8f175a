"""Ragged batches: where every token of one forward call comes from and where it goes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def cumulative_lengths(lengths: Sequence[int]) -> list[int]:
    """Return ``[0, n0, n0+n1, ...]`` (B + 1 entries), the host form of ``cu_seqlens``."""
    total, out = 0, [0]
    for length in lengths:
        total += length
        out.append(total)
    return out


def lengths_from_cu_seqlens(cu_seqlens: Tensor | Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """Return the length of every sequence of a ragged batch, in tokens.

    Args:
        cu_seqlens: int32 [B + 1], rising from 0 to ``num_tokens``.
        num_tokens: T, the tokens of the whole batch.

    Raises:
        ValueError: the offsets do not describe a batch of T tokens, or a sequence is empty.
    """
    offsets = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the batch's {num_tokens} tokens, got {offsets[:4]}...{offsets[-1:]}; "
            "build it from the prompts' lengths"
        )
    lengths = tuple(b - a for a, b in itertools.pairwise(offsets))
    if min(lengths) < 1:
        raise ValueError(
            f"every sequence must hold at least 1 token, got {min(lengths)} at index "
            f"{lengths.index(min(lengths))}; drop empty prompts"
        )
    return lengths


@dataclasses.dataclass(frozen=True)
class RaggedStep:
    """One forward call over a ragged batch: T new tokens of B sequences, some with a stored history.

    Host tuples drive loops and reservations; device tensors drive the kernels. Both say the same.

    Attributes:
        past: tokens stored before this call, per sequence (host).
        lengths: new tokens, per sequence (host).
        rows: rows of the block table, int64 [B].
        block_table: ids of the blocks of each sequence, int32 [B, M]; unused entries are any valid id.
        token_sequence: index into the batch of every token, int64 [T].
        positions: position of every token in its sequence, int64 [T].
        slot_block: block that takes each token, int64 [T].
        slot_offset: slot within that block, int64 [T].
        block_size: tokens per block.
        touched: ids of the blocks that take the new tokens, in order, per sequence (host); None: not known, and then
            there are no ``runs``.
    """

    past: tuple[int, ...]
    lengths: tuple[int, ...]
    rows: Tensor
    block_table: Tensor
    token_sequence: Tensor
    positions: Tensor
    slot_block: Tensor
    slot_offset: Tensor
    block_size: int
    touched: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def build(
        cls,
        past: Sequence[int],
        lengths: Sequence[int],
        rows: Tensor,
        block_table: Tensor,
        block_size: int,
        touched: Sequence[Sequence[int]] | None = None,
    ) -> RaggedStep:
        """Lay out the new tokens of a call, without a device synchronisation.

        Args:
            past: tokens stored already, per sequence.
            lengths: new tokens, per sequence.
            rows: rows of the block table, int64 [B].
            block_table: int32 [B, M] with the blocks of past and new tokens.
            block_size: tokens per block.
            touched: see the attribute.
        """
        device = block_table.device
        total = sum(lengths)
        # Built from host lists in one small copy each: nothing here waits for the device.
        length_t = torch.tensor(lengths, dtype=torch.int64).to(device, non_blocking=True)
        start_t = torch.tensor(
            [p - c for p, c in zip(past, cumulative_lengths(lengths), strict=False)], dtype=torch.int64
        ).to(device, non_blocking=True)
        sequence = torch.repeat_interleave(
            torch.arange(len(lengths), device=device), length_t, output_size=total
        )
        positions = torch.arange(total, device=device) + start_t[sequence]
        block_index = torch.div(positions, block_size, rounding_mode="floor")
        return cls(
            past=tuple(past),
            lengths=tuple(lengths),
            rows=rows,
            block_table=block_table,
            token_sequence=sequence,
            positions=positions,
            slot_block=block_table[sequence, block_index].to(torch.int64),
            slot_offset=positions - block_index * block_size,
            block_size=block_size,
            touched=None if touched is None else tuple(tuple(blocks) for blocks in touched),
        )

    @functools.cached_property
    def runs(self) -> Tensor:
        """The new tokens as runs that share a block, by rising block id: int32 [R, 4].

        A run is (block, first token in the batch, number of tokens, slot of the first token).
        """
        assert self.touched is not None, "runs need the host's block ids"
        runs = []
        for past, new, start, blocks in zip(
            self.past, self.lengths, cumulative_lengths(self.lengths), self.touched, strict=False
        ):
            first = past // self.block_size
            for k, block in enumerate(blocks):
                begin = max(past, (first + k) * self.block_size)
                end = min(past + new, (first + k + 1) * self.block_size)
                runs.append((block, start + begin - past, end - begin, begin % self.block_size))
        device = self.block_table.device
        return torch.tensor(sorted(runs), dtype=torch.int32).to(device, non_blocking=True)

    @functools.cached_property
    def kv_lengths_tensor(self) -> Tensor:
        """Tokens of every sequence once this call is stored, int32 [B] on the device."""
        return torch.tensor(self.kv_lengths, dtype=torch.int32).to(self.block_table.device, non_blocking=True)

    def first_tokens(self, count: int) -> Tensor:
        """Which new tokens stand among the first ``count`` of their sequence, in order: int64 [n] on the device.

        From the host's lengths, kept for the next layer: asking the device for a mask's places would wait for it.
        """
        if count not in self._first_tokens:
            chosen = [
                token
                for past, new, start in zip(
                    self.past, self.lengths, cumulative_lengths(self.lengths), strict=False
                )
                for token in range(start, start + min(new, max(0, count - past)))
            ]
            found = torch.tensor(chosen, dtype=torch.int64).to(self.block_table.device, non_blocking=True)
            self._first_tokens[count] = found
        return self._first_tokens[count]

    @functools.cached_property
    def _first_tokens(self) -> dict[int, Tensor]:
        return {}

    @property
    def kv_lengths(self) -> tuple[int, ...]:
        """Tokens of every sequence once this call is stored (host)."""
        return tuple(p + n for p, n in zip(self.past, self.lengths, strict=True))
