"""Preallocated blocks for the keys and values of many sequences: reserve, commit, free, fork, crop.

A block id is one slot of ``block_size`` tokens in every layer of the group. Ids are handed out on the host from the
sequences' lengths before anything is written, so running out raises first and changes nothing; the device only ever
sees block tables. The tensors themselves are in :mod:`kvquant.block_storage`; nothing that is held is ever copied (a
fork copies one open block).
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from kvquant import value_order
from kvquant.block_ids import BlockIds
from kvquant.block_layout import BlockLayout
from kvquant.block_storage import BlockStorage
from kvquant.errors import PoolExhausted
from kvquant.ragged import RaggedStep

_NO_CHUNK = "no spill chunk is left for a copy of an open block; raise cache.spill_headroom"


@dataclasses.dataclass
class _Reservation:
    """What :meth:`BlockPool.rollback` needs to undo a call."""

    rows: list[int]
    lengths: list[int]
    new_blocks: dict[int, list[int]]
    tails: list[int]
    tail_counts: Tensor | None
    spill_top: Tensor | None


class BlockPool:
    """Blocks of one layer group (layers with the same heads, head_dim, window and spec).

    Args:
        layout: shapes of a block.
        num_blocks: blocks to allocate, N.
        max_sequences: rows of the block table.
        max_blocks_per_sequence: columns of the block table; default: all blocks.
        window: sliding window of the layers in tokens: blocks that no later token can see are given back when a call
            is committed, and the table keeps counting from the sequence's start. None: everything stays.
        layer_numbers: what errors call the layers, default 0, 1, ...
        device: where everything lives.
    """

    def __init__(
        self,
        layout: BlockLayout,
        num_blocks: int,
        *,
        max_sequences: int,
        max_blocks_per_sequence: int | None = None,
        window: int | None = None,
        layer_numbers: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_blocks < 1 or max_sequences < 1:
            raise PoolExhausted(
                f"a pool needs at least 1 block and 1 sequence, got {num_blocks} and {max_sequences}; "
                "raise cache.num_blocks or cache.memory_budget_gib"
            )
        self.layout, self.num_blocks, self.max_sequences = layout, num_blocks, max_sequences
        self.window = window
        self.layer_numbers = range(layout.num_layers) if layer_numbers is None else layer_numbers
        self.device = torch.device(device)
        self.storage = BlockStorage(layout, num_blocks, max_sequences, self.device)
        self.tensors, self.layers = self.storage.tensors, self.storage.layers
        self.spill_top, self.error = self.storage.spill_top, self.storage.error
        self.num_chunks = self.storage.num_chunks
        columns = num_blocks if max_blocks_per_sequence is None else max_blocks_per_sequence
        self.block_table = torch.zeros(max_sequences, columns, dtype=torch.int32, device=device)
        self._ids = BlockIds(num_blocks)
        self._blocks: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._passed: dict[int, int] = {}  # blocks given back at the start of each sequence
        self._free_rows = list(range(max_sequences))  # a heap
        self._pending: _Reservation | None = None

    @property
    def _orders_values(self) -> bool:
        """Whether full blocks put their value outliers in order by head."""
        return "value_outlier_end" in self.tensors and self.tensors["value_outlier_index"].shape[-1] > 0

    # ---- sequences -------------------------------------------------------------------------------------------

    def add_sequence(self) -> int:
        """Open an empty sequence; returns its row in the block table.

        Raises:
            PoolExhausted: all rows are taken.
        """
        self.rollback()
        if not self._free_rows:
            raise PoolExhausted(_too_many(self.max_sequences))
        # The lowest: pools that open and close the same rows hand out the same ones, whatever the order was.
        row = heapq.heappop(self._free_rows)
        self._blocks[row], self._lengths[row], self._passed[row] = [], 0, 0
        return row

    def length(self, row: int) -> int:
        """Tokens of a sequence, those that have passed out of the window included."""
        return self._lengths[row]

    def tokens_held(self, row: int) -> int:
        """Tokens of a sequence whose blocks are still held."""
        return self._lengths[row] - self._passed[row] * self.layout.block_size

    @property
    def sequences(self) -> list[int]:
        """Rows of all open sequences."""
        return list(self._blocks)

    @property
    def blocks_in_use(self) -> int:
        """Blocks that at least one sequence holds."""
        return self.num_blocks - len(self._ids.free)

    @property
    def blocks_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._ids.free)

    def blocks_of(self, row: int) -> list[int]:
        """Ids of the blocks a sequence holds, in order."""
        return list(self._blocks[row])

    def free(self, row: int) -> None:
        """Close a sequence and give back the blocks that no other sequence shares."""
        self.rollback()
        self._release(self._blocks.pop(row))
        del self._lengths[row], self._passed[row]
        heapq.heappush(self._free_rows, row)

    def free_all(self) -> None:
        """Close every sequence; unlike :meth:`free` it waits for nothing."""
        self.rollback()
        for row, blocks in self._blocks.items():
            self._ids.drop(blocks)
            heapq.heappush(self._free_rows, row)
        for held in (self._blocks, self._lengths, self._passed):
            held.clear()
        self.storage.release_all_blocks()

    def fork(self, row: int) -> int:
        """Open a sequence that shares the full blocks of ``row`` and copies its open one; returns the new row.

        Raises:
            PoolExhausted: no block (or spill chunk, or row) is left for the copy; nothing has changed.
        """
        self.rollback()
        passed = self._passed[row]
        shared = self._lengths[row] // self.layout.block_size - passed
        has_tail = self._lengths[row] % self.layout.block_size > 0
        self._ids.check(int(has_tail))
        new = self.add_sequence()
        blocks = self._blocks[row][:shared]
        if has_tail:
            try:
                blocks.append(self._copy_block(self._blocks[row][shared]))
            except PoolExhausted:
                self.free(new)
                raise
        self._ids.share(blocks[:shared])
        self._blocks[new], self._lengths[new], self._passed[new] = blocks, self._lengths[row], passed
        self._write_table(new, passed, blocks)
        self.storage.copy_row(row, new)
        return new

    def crop(self, row: int, length: int) -> None:
        """Keep the first ``length`` tokens of a sequence; blocks past them go back.

        Raises:
            ValueError: the sequence is shorter than ``length``, or a sliding window has given back what it needs.
            PoolExhausted: the block it now ends in is shared and no block is left for a copy.
        """
        self.rollback()
        self.check_crop(row, length)
        passed, inside = self._passed[row], length % self.layout.block_size
        keep = self.layout.blocks_for(length) - passed
        blocks = self._blocks[row]
        if inside and self._ids.references[blocks[keep - 1]] > 1:
            original = blocks[keep - 1]
            blocks[keep - 1] = self._copy_block(original)
            self._ids.drop([original])
            self._write_table(row, passed + keep - 1, blocks[keep - 1 : keep])
        before = self._lengths[row]
        self._blocks[row], self._lengths[row] = blocks[:keep], length
        self._release(blocks[keep:])
        if inside:
            self.storage.crop_block(blocks[keep - 1], inside)
            if self._orders_values and length + self.layout.block_size - inside <= before:
                value_order.reopen(self.tensors, blocks[keep - 1], self.layout.head_dim)

    def check_crop(self, row: int, length: int) -> None:
        """Raise what :meth:`crop` would raise for a length it refuses.

        Raises:
            ValueError: the sequence is shorter, or its next token would see a block that was given back.
        """
        if not 0 <= length <= self._lengths[row]:
            raise ValueError(
                f"crop length must be 0 to {self._lengths[row]} (the sequence's tokens), got {length}"
            )
        if self._passed_at(length) < self._passed[row]:
            assert self.window is not None
            shortest = self._passed[row] * self.layout.block_size + self.window - 1
            raise ValueError(
                f"crop length must be at least {shortest} here, got {length}: blocks that left the sliding window of "
                f"{self.window} tokens are given back; free the sequence and append its text again"
            )

    def check_select(self, rows: Sequence[int], chosen: Sequence[int]) -> None:
        """Raise if there is no room to continue ``chosen`` in place of ``rows``: drop some, then fork others.

        Args:
            rows: sequences, distinct.
            chosen: some of them; one that is named again is to be forked.

        Raises:
            PoolExhausted: rows, blocks or spill chunks do not suffice for the forks; nothing has changed.
        """
        self.rollback()
        if len(self._blocks) - len(rows) + len(chosen) > self.max_sequences:
            raise PoolExhausted(_too_many(self.max_sequences))
        freed = self._ids.freed_by(block for row in set(rows) - set(chosen) for block in self._blocks[row])
        copied = [
            self._blocks[row][-1]
            for row, times in collections.Counter(chosen).items()
            if self._lengths[row] % self.layout.block_size
            for _ in range(times - 1)
        ]
        self._ids.check(len(copied), freed=len(freed))
        chunks = self.storage.chunks_of(copied) - self.storage.chunks_of(freed)
        if copied and bool((chunks > self.spill_top[:, 0]).any()):
            raise PoolExhausted(_NO_CHUNK)

    # ---- one forward call ------------------------------------------------------------------------------------

    def blocks_to_grow(self, row: int | None, new_tokens: int, *, call_tokens: int | None = None) -> int:
        """Blocks that a sequence needs beyond those it holds to take more tokens.

        Args:
            row: the sequence; None: one that is not open yet.
            new_tokens: tokens to come.
            call_tokens: they come in calls of at most so many tokens, between which a window gives blocks back;
                None: in one call.
        """
        past, passed, held = 0, 0, 0
        if row is not None:
            past, passed, held = self._lengths[row], self._passed[row], len(self._blocks[row])
        wanted = self.layout.blocks_for(past + new_tokens) - passed
        if self.window is not None and call_tokens is not None:
            wanted = min(wanted, self.layout.blocks_in_window(self.window, min(new_tokens, call_tokens)))
        return max(0, wanted - held)

    def reserve(self, rows: Sequence[int], lengths: Sequence[int]) -> RaggedStep:
        """Set blocks aside for new tokens of some sequences and say where each token goes.

        A reservation left pending by a call that failed is rolled back first.

        Args:
            rows: the sequences, distinct.
            lengths: new tokens of each, at least 1.

        Raises:
            PoolExhausted: not enough blocks; says how many are missing. Nothing has changed.
        """
        self.rollback()
        if len(set(rows)) != len(rows):
            raise ValueError(f"a call may name each sequence once, got {list(rows)}")
        past = [self._lengths[row] for row in rows]
        needed = [self.blocks_to_grow(row, n) for row, n in zip(rows, lengths, strict=True)]
        self._ids.check(sum(needed))
        columns = self.block_table.shape[1]
        for p, n in zip(past, lengths, strict=True):
            if self.layout.blocks_for(p + n) > columns:
                raise PoolExhausted(
                    f"a sequence may hold {columns * self.layout.block_size} tokens here, got {p + n}; raise max_length"
                )
        tails = [
            self._blocks[row][-1] for row, p in zip(rows, past, strict=True) if p % self.layout.block_size
        ]
        exact = not self.layout.chains_outliers
        counts = None if exact else self.tensors["key_outlier_count"]
        self._pending = _Reservation(
            rows=list(rows),
            lengths=list(lengths),
            new_blocks={},
            tails=tails,
            tail_counts=counts[:, tails].clone() if counts is not None and tails else None,
            spill_top=None if exact else self.spill_top.clone(),
        )
        fresh: list[int] = []
        for row, count in zip(rows, needed, strict=True):
            taken = self._ids.take(count)
            self._pending.new_blocks[row] = taken
            self._write_table(row, self._passed[row] + len(self._blocks[row]), taken)
            self._blocks[row].extend(taken)
            fresh.extend(taken)
        if counts is not None and fresh:
            counts[:, fresh] = 0
        if "value_outlier_end" in self.tensors and fresh:
            self.tensors["value_outlier_end"][:, fresh] = 0
        table_width = max(self.layout.blocks_for(p + n) for p, n in zip(past, lengths, strict=True))
        rows_t = torch.tensor(rows, dtype=torch.int64).to(self.device, non_blocking=True)
        table = self.block_table[rows_t, :table_width]
        BS = self.layout.block_size
        touched = [
            self._blocks[row][p // BS - self._passed[row] : self.layout.blocks_for(p + n) - self._passed[row]]
            for row, p, n in zip(rows, past, lengths, strict=True)
        ]
        return RaggedStep.build(past, lengths, rows_t, table, BS, touched)

    def commit(self) -> None:
        """:meth:`check`, then :meth:`advance`."""
        self.check()
        self.advance()

    def check(self) -> None:
        """Read the error word of the pending call, the one place that does.

        Raises:
            NonFiniteActivations: a key or value was NaN, infinite or too large for its 16-bit storage.
            PoolExhausted: outlier chunks ran out. In both cases the call is rolled back first.
        """
        error = self.storage.first_error(self.layer_numbers)
        if error is not None:
            self.rollback()
            raise error

    def advance(self) -> None:
        """Make the pending call's tokens part of their sequences; apart from :meth:`check` for several pools."""
        assert self._pending is not None, "commit without reserve"
        filled = []
        for row, new in zip(self._pending.rows, self._pending.lengths, strict=True):
            full_before = self._lengths[row] // self.layout.block_size - self._passed[row]
            self._lengths[row] += new
            full_after = self._lengths[row] // self.layout.block_size - self._passed[row]
            filled += self._blocks[row][full_before:full_after]
            self._give_back(row)
        self._pending = None
        # Not before the error word was read: an open block is what a failed call is rolled back to.
        if filled and self._orders_values:
            value_order.close(self.tensors, filled, self.layout.head_dim)

    def rollback(self) -> None:
        """Undo the pending reservation, if there is one: blocks, spill chunks and counts are as before it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self.error.zero_()
        if pending.tail_counts is not None:
            self.tensors["key_outlier_count"][:, pending.tails] = pending.tail_counts
        if pending.spill_top is not None:
            self.spill_top.copy_(pending.spill_top)
        # Backwards, so that the free list is as it was, in order too.
        for row, taken in reversed(pending.new_blocks.items()):
            del self._blocks[row][len(self._blocks[row]) - len(taken) :]
            self._ids.put_back(taken)

    # ---- bytes -----------------------------------------------------------------------------------------------

    @property
    def bytes_total(self) -> int:
        """Bytes of every tensor of the pool."""
        return self.storage.nbytes + self.block_table.untyped_storage().nbytes()

    @property
    def bytes_free(self) -> int:
        """Bytes of free blocks, free spill chunks and sink buffers of free rows (waits for the device)."""
        blocks = len(self._ids.free) * self.layout.block_bytes
        sinks = len(self._free_rows) * self.layout.sequence_bytes
        return blocks + self.storage.free_chunk_bytes + sinks

    @property
    def bytes_held(self) -> int:
        """Bytes held for the stored sequences: blocks with their slack, spill chunks, sinks, tables, counters."""
        return self.bytes_total - self.bytes_free

    # ---- private ---------------------------------------------------------------------------------------------

    def _passed_at(self, length: int) -> int:
        """Blocks that a sequence of ``length`` tokens needs no more: its next token sees none of their positions."""
        if self.window is None:
            return 0
        return max(0, length - self.window + 1) // self.layout.block_size

    def _give_back(self, row: int) -> None:
        """Release the blocks that the window has passed; block 0 stands in for them in the table, always masked."""
        passed = self._passed_at(self._lengths[row])
        count = passed - self._passed[row]
        if count > 0:
            self.block_table[row, self._passed[row] : passed] = 0
            self._release(self._blocks[row][:count])
            del self._blocks[row][:count]
            self._passed[row] = passed

    def _write_table(self, row: int, first: int, blocks: list[int]) -> None:
        if blocks:
            new = torch.tensor(blocks, dtype=torch.int32).to(self.device, non_blocking=True)
            self.block_table[row, first : first + len(blocks)] = new

    def _release(self, blocks: list[int]) -> None:
        """Drop one reference to each block; unreferenced ones and their spill chunks become free."""
        self.storage.release_blocks(self._ids.drop(blocks))

    def _copy_block(self, source: int) -> int:
        """Copy a block with its spill chunks into a fresh one, which gets one reference."""
        (target,) = taken = self._ids.take(1)
        if not self.storage.copy_block(source, target):
            self._ids.put_back(taken)
            raise PoolExhausted(_NO_CHUNK)
        return target


def _too_many(most: int) -> str:
    return f"the pool holds at most {most} sequences and all are in use; free one or raise max_sequences"
