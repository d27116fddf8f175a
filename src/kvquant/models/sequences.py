"""The sequences that a cache holds: one pool for each group of layers, in step with each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from kvquant.block_pool import BlockPool
from kvquant.errors import PoolExhausted
from kvquant.models.pools import LayerGroup, PoolSize, allocate_pools, key_elements, key_outliers


class StoredSequences:
    """Sequences in batch order, each with the same row and length in every pool.

    Args:
        groups: layers that share blocks; a pool each.
        num_blocks: blocks to allocate.
        memory_budget_gib: or as many as fit this; both None: every sequence at its full length.
        max_length: tokens of a sequence at most.
        max_sequences: sequences at most; None: those of the first call, or 64 where a size is given.
        call_tokens: see :class:`PoolSize`.

    Attributes:
        rows: the open sequences, in batch order.

    Raises:
        PoolExhausted: the size asked for does not fit the memory; says what would.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        *,
        num_blocks: int | None,
        memory_budget_gib: float | None,
        max_length: int,
        max_sequences: int | None,
        call_tokens: int | None,
    ) -> None:
        self.rows: list[int] = []
        self._groups = groups
        self._num_blocks, self._memory_budget_gib = num_blocks, memory_budget_gib
        self._max_length, self._max_sequences, self._call_tokens = max_length, max_sequences, call_tokens
        self._pools: list[BlockPool] = []
        if num_blocks is not None or memory_budget_gib is not None:
            self._allocate(max_sequences or 64)

    # ---- verbs -----------------------------------------------------------------------------------------------

    def open(self, num_sequences: int) -> list[int]:
        """Open empty sequences; returns their rows.

        Raises:
            PoolExhausted: the pool has no room for their tables.
        """
        if not self._pools:
            self._allocate(self._max_sequences or num_sequences)
        taken, most = len(self.rows), self._pools[0].max_sequences
        if taken + num_sequences > most:
            raise PoolExhausted(
                f"the cache holds at most {most} sequences, got {taken} and {num_sequences} more; raise max_sequences"
            )
        new = []
        for _ in range(num_sequences):
            opened = [pool.add_sequence() for pool in self._pools]
            assert len(set(opened)) == 1, "pools of one cache hand out rows in step"
            new.append(opened[0])
        self.rows += new
        return new

    def free(self, row: int) -> None:
        """Close a sequence and give its blocks back."""
        self.rows.remove(row)
        for pool in self._pools:
            pool.free(row)

    def fork(self, row: int) -> int:
        """Open a sequence with the same history; full blocks are shared. Returns its row."""
        forked = []
        try:
            for pool in self._pools:
                forked.append((pool, pool.fork(row)))
        except PoolExhausted:
            for pool, new in forked:
                pool.free(new)
            raise
        self.rows.append(forked[0][1])
        return forked[0][1]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens of every sequence; 0 drops nothing, as in transformers.

        Raises:
            ValueError: a positive number, or a sliding window has given back blocks that the rest would need;
                nothing has changed.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the negative number of tokens to remove, got {tokens_to_remove}; "
                f"try crop({-tokens_to_remove}) to remove {tokens_to_remove}"
            )
        if tokens_to_remove == 0:
            return
        keep = {row: max(0, self.length(row) + tokens_to_remove) for row in self.rows}
        for pool, row in itertools.product(self._pools, self.rows):
            pool.check_crop(row, keep[row])
        for pool, row in itertools.product(self._pools, self.rows):
            pool.crop(row, keep[row])

    def select(self, places: list[int]) -> None:
        """Let the batch be these of its present sequences; a sequence chosen again is forked.

        Raises:
            PoolExhausted: ``max_sequences`` or the blocks do not suffice for the forks; nothing has changed.
        """
        before = list(self.rows)
        chosen = [before[place] for place in places]
        for pool in self._pools:
            pool.check_select(before, chosen)
        for place in set(range(len(before))) - set(places):
            self.free(before[place])  # first, so that rows and blocks suffice for the forks
        seen: set[int] = set()
        after = []
        for place in places:
            after.append(self.fork(before[place]) if place in seen else before[place])
            seen.add(place)
        self.rows = after

    def length(self, row: int) -> int:
        """Tokens stored for a sequence."""
        return self._pools[0].length(row)

    def has_room(
        self,
        claims: Sequence[tuple[int | None, int]],
        *,
        in_steps: bool = False,
        spare_fraction: float = 0.0,
    ) -> bool:
        """Whether sequences could take so many new tokens each; outlier chunks are not foreseen.

        Args:
            claims: (row, new tokens); a row of None is a sequence yet to be opened.
            in_steps: the tokens may come in several calls of ``call_tokens``, not all in one.
            spare_fraction: share of each pool's blocks that must stay free.
        """
        opened = sum(row is None for row, _ in claims)
        call_tokens = self._call_tokens if in_steps else None
        for pool in self._pools:
            needed = sum(pool.blocks_to_grow(row, n, call_tokens=call_tokens) for row, n in claims)
            spare = math.ceil(spare_fraction * pool.num_blocks)
            if needed + spare > pool.blocks_free or len(self.rows) + opened > pool.max_sequences:
                return False
        return True

    def reset(self) -> None:
        """Forget every sequence; the pool stays."""
        for pool in self._pools:
            pool.free_all()
        self.rows.clear()

    # ---- bytes -----------------------------------------------------------------------------------------------

    @property
    def bytes_held(self) -> int:
        """Bytes held for the stored sequences, see :attr:`BlockPool.bytes_held`."""
        return sum(pool.bytes_held for pool in self._pools)

    @property
    def bytes_free(self) -> int:
        """Bytes allocated and not held."""
        return sum(pool.bytes_free for pool in self._pools)

    @property
    def effective_bits(self) -> float:
        """8 * bytes held / elements of K and V held."""
        return 8 * self.bytes_held / max(2 * key_elements(self._pools, self.rows), 1)

    @property
    def key_outlier_fraction(self) -> float:
        """Fraction of stored key elements kept exactly."""
        return key_outliers(self._pools, self.rows) / max(key_elements(self._pools, self.rows), 1)

    @property
    def pools(self) -> list[BlockPool]:
        """The block pools, one per group of layers stored alike."""
        return self._pools

    def _allocate(self, max_sequences: int) -> None:
        size = PoolSize(
            self._num_blocks, self._memory_budget_gib, self._max_length, max_sequences, self._call_tokens
        )
        self._pools = allocate_pools(self._groups, size)
