"""A ragged batch of one layer in packed form."""

from __future__ import annotations

import dataclasses

from kvquant.block_pool import BlockPool


@dataclasses.dataclass
class PackedKV:
    """A ragged batch of one layer in packed form: an exactly sized pool and the rows of its sequences."""

    pool: BlockPool
    rows: list[int]
    lengths: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, ranges, outliers, sinks, tables and the slack of half-filled blocks and chunks."""
        return self.pool.bytes_held

    @property
    def effective_bits(self) -> float:
        """8 * bytes held / elements of K and V."""
        layout = self.pool.layout
        return 8 * self.nbytes / (2 * sum(self.lengths) * layout.num_kv_heads * layout.head_dim)

    @property
    def key_outlier_fraction(self) -> float:
        """Fraction of key elements that were kept exactly."""
        if not self.pool.layout.chains_outliers:
            return 0.0
        kept = sum(
            int(self.pool.tensors["key_outlier_count"][:, block].sum())
            for row in self.rows
            for block in self.pool.blocks_of(row)
        )
        return kept / (sum(self.lengths) * self.pool.layout.num_kv_heads * self.pool.layout.head_dim)
