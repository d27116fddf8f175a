"""Ids of blocks: which are free, and how many sequences hold each of the others."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

from kvquant.errors import PoolExhausted


class BlockIds:
    """A free list with reference counts over ids 0 to N - 1; all on the host.

    Args:
        num_blocks: N.

    Attributes:
        free: ids nobody holds, the next one to hand out first.
        references: holders of each id.
    """

    def __init__(self, num_blocks: int) -> None:
        self.free = collections.deque(range(num_blocks))
        self.references = [0] * num_blocks

    def __len__(self) -> int:
        return len(self.references)

    def check(self, needed: int, freed: int = 0) -> None:
        """Raise unless ``needed`` ids can be taken once ``freed`` more are free.

        Raises:
            PoolExhausted: says how many are missing and which setting raises the limit.
        """
        free = len(self.free) + freed
        if needed > free:
            raise PoolExhausted(
                f"the block pool needs {needed} more blocks and has {free} of {len(self)} free ({needed - free} missing); "
                "raise cache.num_blocks or cache.memory_budget_gib"
            )

    def take(self, count: int) -> list[int]:
        """Hand out ids, each with one holder.

        Raises:
            PoolExhausted: not enough are free; none is taken.
        """
        self.check(count)
        taken = [self.free.popleft() for _ in range(count)]
        for block in taken:
            self.references[block] = 1
        return taken

    def put_back(self, taken: Sequence[int]) -> None:
        """Undo the latest :meth:`take`: the free list is as it was, in order too."""
        for block in reversed(taken):
            self.references[block] = 0
            self.free.appendleft(block)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to each."""
        for block in blocks:
            self.references[block] += 1

    def drop(self, blocks: Iterable[int]) -> list[int]:
        """Take a holder from each; returns the ids that nobody holds any more, which are free from now on."""
        freed = []
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                freed.append(block)
        self.free.extend(freed)
        return freed

    def freed_by(self, blocks: Iterable[int]) -> list[int]:
        """The ids that :meth:`drop` would free."""
        dropped = collections.Counter(blocks)
        return [block for block, holders in dropped.items() if self.references[block] == holders]
