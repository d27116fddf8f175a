"""Preallocated blocks for the keys and values of many sequences: reserve, commit, free, fork, crop.

A block id is one slot of ``block_size`` tokens in every layer of the group. Ids are handed out on the host from the
sequences' lengths before anything is written, so running out raises first and changes nothing; the device only ever
sees block tables. The pool never reallocates and never copies what it holds (a fork copies one open block).
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from kvquant import spill_chains, value_order
from kvquant.block_layout import BlockLayout
from kvquant.errors import NonFiniteActivations, PoolExhausted
from kvquant.kernels import (
    ERROR_OUT_OF_SPILL,
    ERROR_VALUE_NOT_FINITE,
    ExactStore,
    KeyStore,
    LayerStore,
    MethodStore,
    RecentStore,
    ValueStore,
)
from kvquant.ragged import RaggedStep

# Per layer. The expected number averages over many blocks; in a pool of a few, one odd sentence is not the average.
_MIN_CHUNKS = 64


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
        L = layout.num_layers
        # Zeros, not empty: a slot never written must still index inside its block.
        self.tensors: dict[str, Tensor] = {
            name: torch.zeros(L, num_blocks, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in layout.block_shapes().items()
        }
        per_block = layout.spill_chunks_per_block
        self.num_chunks = max(num_blocks * per_block, _MIN_CHUNKS) if per_block else 0
        for name, (shape, dtype) in layout.chunk_shapes().items():
            self.tensors[name] = torch.zeros(L, self.num_chunks, *shape, dtype=dtype, device=device)
        for name, (shape, dtype) in layout.row_shapes().items():
            self.tensors[name] = torch.zeros(L, max_sequences, *shape, dtype=dtype, device=device)
        columns = num_blocks if max_blocks_per_sequence is None else max_blocks_per_sequence
        self.block_table = torch.zeros(max_sequences, columns, dtype=torch.int32, device=device)
        self.spill_top = torch.full((L, 1), self.num_chunks, dtype=torch.int32, device=device)
        self.error = torch.zeros(L, 2, dtype=torch.int64, device=device)
        if self.num_chunks:
            # Popped from the top: the lowest ids go first.
            stack = torch.arange(self.num_chunks - 1, -1, -1, dtype=torch.int32, device=device)
            self.tensors["spill_free"].copy_(stack.expand(L, -1))
        self._free_blocks = collections.deque(range(num_blocks))
        self._references = [0] * num_blocks
        self._blocks: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._passed: dict[int, int] = {}  # blocks given back at the start of each sequence
        self._free_rows = list(range(max_sequences))  # a heap
        self._pending: _Reservation | None = None
        self.layers = [self._layer(index) for index in range(L)]

    def _layer(self, index: int) -> LayerStore:
        t = {name: tensor[index] for name, tensor in self.tensors.items()}
        keys: KeyStore | ExactStore | MethodStore
        values: ValueStore | ExactStore | MethodStore
        if self.layout.spec.is_exact:
            keys, values = ExactStore(t["keys"]), ExactStore(t["values"])
        elif not self.layout.chains_outliers:
            keys = values = MethodStore({name: t[name] for name in self.layout.block_shapes()})
        else:
            keys = KeyStore(
                codes=t["key_codes"],
                outlier_count=t["key_outlier_count"],
                outlier_index=t["key_outlier_index"],
                outlier_value=t["key_outlier_value"],
                spill_head=t["spill_head"],
                spill_next=t["spill_next"],
                spill_index=t["spill_index"],
                spill_value=t["spill_value"],
                spill_free=t["spill_free"],
                spill_top=self.spill_top[index],
            )
            values = ValueStore(
                codes=t["value_codes"],
                zero=t["value_zero"],
                scale=t["value_scale"],
                outlier_index=t["value_outlier_index"],
                outlier_value=t["value_outlier_value"],
                outlier_end=t["value_outlier_end"],
            )
        recent = None
        if "recent_keys" in t:
            recent = RecentStore(t["recent_keys"], t["recent_values"], t["recent_position"])
        extra = {name: t[name] for name, _, _ in self.layout.extra}
        return LayerStore(keys, values, t["sink_keys"], t["sink_values"], self.error[index], recent, extra)

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
            raise PoolExhausted(
                f"the pool holds at most {self.max_sequences} sequences and all are in use; free one or raise max_sequences"
            )
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
        return self.num_blocks - len(self._free_blocks)

    def blocks_of(self, row: int) -> list[int]:
        """Ids of the blocks a sequence holds, in order."""
        return list(self._blocks[row])

    def free(self, row: int) -> None:
        """Close a sequence and give back the blocks that no other sequence shares."""
        self.rollback()
        self._release(self._blocks.pop(row))
        del self._lengths[row], self._passed[row]
        heapq.heappush(self._free_rows, row)

    def fork(self, row: int) -> int:
        """Open a sequence that shares the full blocks of ``row`` and copies its open one; returns the new row.

        Raises:
            PoolExhausted: no block (or spill chunk, or row) is left for the copy; nothing has changed.
        """
        self.rollback()
        passed = self._passed[row]
        shared = self._lengths[row] // self.layout.block_size - passed
        has_tail = self._lengths[row] % self.layout.block_size > 0
        if has_tail and not self._free_blocks:
            raise PoolExhausted(_exhausted(1, 0, self.num_blocks))
        new = self.add_sequence()
        blocks = self._blocks[row][:shared]
        if has_tail:
            try:
                blocks.append(self._copy_block(self._blocks[row][shared]))
            except PoolExhausted:
                self.free(new)
                raise
        for block in blocks[:shared]:
            self._references[block] += 1
        self._blocks[new], self._lengths[new], self._passed[new] = blocks, self._lengths[row], passed
        self._write_table(new, passed, blocks)
        for name in self.layout.row_shapes():
            self.tensors[name][:, new] = self.tensors[name][:, row]
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
        if inside and self._references[blocks[keep - 1]] > 1:
            original = blocks[keep - 1]
            blocks[keep - 1] = self._copy_block(original)
            self._references[original] -= 1
            self._write_table(row, passed + keep - 1, blocks[keep - 1 : keep])
        before = self._lengths[row]
        self._blocks[row], self._lengths[row] = blocks[:keep], length
        self._release(blocks[keep:])
        if inside and self.layout.chains_outliers:
            spill_chains.crop(self.layers, blocks[keep - 1], inside, self.layout.head_dim)
        if inside and self._orders_values and length + self.layout.block_size - inside <= before:
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

    # ---- one forward call ------------------------------------------------------------------------------------

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
        needed = [
            self.layout.blocks_for(p + n) - self._passed[row] - len(self._blocks[row])
            for row, p, n in zip(rows, past, lengths, strict=True)
        ]
        if sum(needed) > len(self._free_blocks):
            raise PoolExhausted(_exhausted(sum(needed), len(self._free_blocks), self.num_blocks))
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
            taken = [self._free_blocks.popleft() for _ in range(count)]
            for block in taken:
                self._references[block] = 1
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
        errors = self.error.tolist()
        found = [
            (layer, kind, channel)
            for layer, (kind, channel) in zip(self.layer_numbers, errors, strict=True)
            if kind
        ]
        if found:
            self.rollback()
            raise _as_exception(*found[0], self.layout)

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
            for block in reversed(taken):
                self._references[block] = 0
                self._free_blocks.appendleft(block)

    # ---- bytes -----------------------------------------------------------------------------------------------

    @property
    def bytes_total(self) -> int:
        """Bytes of every tensor of the pool."""
        everything = [*self.tensors.values(), self.block_table, self.spill_top, self.error]
        return sum(t.untyped_storage().nbytes() for t in everything)

    @property
    def bytes_free(self) -> int:
        """Bytes of free blocks, free spill chunks and sink buffers of free rows (waits for the device)."""
        chunks = int(self.spill_top.sum()) * self.layout.chunk_bytes
        sinks = sum(self.tensors[name].nbytes for name in self.layout.row_shapes()) // self.max_sequences
        return len(self._free_blocks) * self.layout.block_bytes + chunks + len(self._free_rows) * sinks

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
        freed = []
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                freed.append(block)
        if freed and self.layout.chains_outliers:
            spill_chains.release(self.layers, freed)
        self._free_blocks.extend(freed)

    def _copy_block(self, source: int) -> int:
        """Copy a block with its spill chunks into a fresh one, which gets one reference."""
        if not self._free_blocks:
            raise PoolExhausted(_exhausted(1, 0, self.num_blocks))
        target = self._free_blocks.popleft()
        self._references[target] = 1
        for name in self.layout.block_shapes():
            self.tensors[name][:, target] = self.tensors[name][:, source]
        if self.layout.chains_outliers and not spill_chains.copy(self.layers, source, target):
            self.tensors["key_outlier_count"][:, target] = 0
            self._references[target] = 0
            self._free_blocks.appendleft(target)
            raise PoolExhausted(
                "no spill chunk is left for a copy of an open block; raise cache.spill_headroom"
            )
        return target


def _exhausted(needed: int, free: int, total: int) -> str:
    return (
        f"the block pool needs {needed} more blocks and has {free} of {total} free ({needed - free} missing); "
        "raise cache.num_blocks or cache.memory_budget_gib"
    )


def _as_exception(layer: int, kind: int, channel: int, layout: BlockLayout) -> Exception:
    if kind == ERROR_OUT_OF_SPILL:
        return PoolExhausted(
            f"layer {layer} has more key outliers than its spill chunks hold; raise cache.spill_headroom "
            f"(now {layout.spill_headroom}) or recalibrate on text like this"
        )
    side = "value" if kind == ERROR_VALUE_NOT_FINITE else "key"
    return NonFiniteActivations(
        f"{side} activations must be finite and fit 16 bits, got NaN, infinity or more than the stored type holds in "
        f"layer {layer}, channel {channel} (head {channel // layout.head_dim}); check the model's dtype"
    )
