"""Sparse matrices that grow one token at a time in O(1): what a block keeps of its outliers, in plain form.

A compressed sparse matrix that is concatenated token by token copies everything it holds each time. Here tokens
are appended to blocks of `block_size` tokens; each block owns its offsets and a preallocated base of entries, so
growing means allocating one more block and copying nothing. Where a block's entries exceed its base, overflow
chunks are chained to that block: nothing is dropped, and no block closes early, so that token t is always in
block t // block_size.

`BlockedCSCMatrix` (a column is a token) is for keys, `BlockedCSRMatrix` (a row is a token) for values; both are
one implementation over the appended axis (tokens) and the other axis (indices).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_CHUNK_ENTRIES = 32
# Outliers kept of 1% come to 1.2% on held-out text, so the default base seldom overflows there.
_DEFAULT_DENSITY = 0.0125


@dataclass
class _Entries:
    indices: Tensor  # [capacity], int16, to be read as unsigned
    values: Tensor  # [capacity], 16 bits


@dataclass
class _Block:
    offsets: Tensor  # [block_size + 1], int32, within the block
    chunks: list[_Entries]  # the base, then overflow chunks
    num_tokens: int = 0
    nnz: int = 0
    capacity: int = field(init=False)

    def __post_init__(self) -> None:
        self.capacity = sum(len(chunk.indices) for chunk in self.chunks)

    def tensors(self) -> list[Tensor]:
        return [self.offsets] + [part for chunk in self.chunks for part in (chunk.indices, chunk.values)]


class _BlockedMatrix:
    """Append-only blocks of tokens; subclasses say which axis is which."""

    def __init__(
        self,
        other_name: str,
        other_size: int,
        block_size: int,
        max_nnz_per_block: int | None,
        device: str | torch.device,
        dtype: torch.dtype,
    ) -> None:
        if not 1 <= other_size <= 1 << 16:
            raise ValueError(
                f"{other_name} must be from 1 to 65536 (indices take 16 bits), got {other_size}; "
                "split wider tokens into groups"
            )
        if block_size < 1:
            raise ValueError(f"block_size must be positive, got {block_size}; try 256")
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"dtype must be a 16-bit float, got {dtype}; use torch.float16 or torch.bfloat16"
            )
        if max_nnz_per_block is None:
            max_nnz_per_block = _round_up(int(_DEFAULT_DENSITY * block_size * other_size) + 1)
        if max_nnz_per_block < 1:
            raise ValueError(
                f"max_nnz_per_block must be positive, got {max_nnz_per_block}; None picks a default"
            )
        self.block_size = block_size
        self.max_nnz_per_block = max_nnz_per_block
        self.device = torch.device(device)
        self.dtype = dtype
        self._other_name = other_name
        self._other_size = other_size
        self._blocks = [self._new_block()]
        self._num_tokens = 0
        self._nnz = 0

    # -- what it holds --

    @property
    def total_nnz(self) -> int:
        """Entries stored, zeros that were appended included."""
        return self._nnz

    @property
    def num_blocks_allocated(self) -> int:
        """Blocks held, at least one."""
        return len(self._blocks)

    def memory_allocated_bytes(self) -> int:
        """Bytes of all storage held, overflow chunks and unused room included."""
        return sum(part.untyped_storage().nbytes() for block in self._blocks for part in block.tensors())

    def reset(self) -> None:
        """Forget all tokens and go back to one block, whose base storage is kept."""
        first = self._blocks[0]
        self._blocks = [_Block(first.offsets, first.chunks[:1])]
        self._num_tokens = 0
        self._nnz = 0

    # -- append --

    def append_tokens(self, indices: Tensor, values: Tensor, offsets: Tensor) -> None:
        """Append a batch of tokens given in compressed form; validated first, so an error changes nothing.

        Args:
            indices (Tensor): position of each entry in its token, [nnz], any integer type, any order.
            values (Tensor): the entries, [nnz], floating point; rounded to the matrix's dtype.
            offsets (Tensor): where each token's entries start, and the end, [tokens + 1], any integer type.

        Raises:
            ValueError: lengths or offsets do not fit together, an index is out of range or occurs twice in one
                token, or a value is NaN, infinite or too large for the matrix's dtype.
        """
        indices, values, offsets = self._checked(indices, values, offsets)
        num_new = len(offsets) - 1
        # Block by block on the host; only the offsets at block borders are read back.
        token = 0
        while token < num_new:
            block = self._open_block()
            count = min(num_new - token, self.block_size - block.num_tokens)
            if count == num_new:
                start, end = 0, len(indices)
            else:
                start, end = int(offsets[token]), int(offsets[token + count])
            self._write(
                block, indices[start:end], values[start:end], offsets[token : token + count + 1] - start
            )
            token += count

    def _append_token(self, indices: Tensor | Sequence[int], values: Tensor | Sequence[float]) -> None:
        index_tensor, value_tensor = self._as_entries(indices, values)
        self.append_tokens(index_tensor, value_tensor, torch.tensor([0, index_tensor.numel()]))

    def _append_tokens_batch(
        self, indices_list: Sequence[Tensor | Sequence[int]], values_list: Sequence[Tensor | Sequence[float]]
    ) -> None:
        if len(indices_list) != len(values_list):
            raise ValueError(
                f"a batch must have as many index lists as value lists, got {len(indices_list)} and "
                f"{len(values_list)}; pass one of each per token"
            )
        if not indices_list:
            return
        entries = [self._as_entries(*pair) for pair in zip(indices_list, values_list, strict=True)]
        for token, (indices, values) in enumerate(entries):
            if indices.shape != values.shape:
                raise ValueError(
                    f"token {token} of the batch must have as many indices as values, got {indices.numel()} and "
                    f"{values.numel()}"
                )
        offsets = torch.tensor([0] + [indices.numel() for indices, _ in entries]).cumsum(0)
        self.append_tokens(torch.cat([e[0] for e in entries]), torch.cat([e[1] for e in entries]), offsets)

    def _as_entries(
        self, indices: Tensor | Sequence[int], values: Tensor | Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        # An empty list has no type of its own.
        index_tensor = (
            indices if isinstance(indices, Tensor) else torch.tensor(indices or [], dtype=torch.int64)
        )
        value_tensor = (
            values if isinstance(values, Tensor) else torch.tensor(values or [], dtype=torch.float32)
        )
        return index_tensor.to(self.device), value_tensor.to(self.device)

    def _checked(self, indices: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Validated int32 indices ascending within each token, values in the stored type, int32 offsets."""
        for name, tensor in (("indices", indices), ("offsets", offsets)):
            if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
                raise ValueError(
                    f"{name} must be a 1-D integer tensor, got {tensor.dtype} of shape {list(tensor.shape)}"
                )
        if values.shape != indices.shape or not values.is_floating_point():
            raise ValueError(
                f"values must be floating point, one for each of the {len(indices)} indices, got {values.dtype} "
                f"of shape {list(values.shape)}"
            )
        indices = indices.to(self.device, torch.int32)
        values = values.to(self.device)
        offsets = offsets.to(self.device, torch.int32)
        nnz = len(indices)
        lengths = offsets.diff()
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != nnz or bool((lengths < 0).any()):
            raise ValueError(
                f"offsets must ascend from 0 to the number of entries, {nnz}; pass the running total of the "
                "tokens' entry counts, with a 0 in front"
            )
        if nnz == 0:
            return indices, values.to(self.dtype), offsets

        low, high = (int(end) for end in indices.aminmax())
        if low < 0 or high >= self._other_size:
            raise ValueError(
                f"indices must be from 0 to {self._other_name} - 1 = {self._other_size - 1}, got {low} to {high}"
            )
        stored = values.to(self.dtype)
        if not bool(stored.isfinite().all()):
            bad = int(torch.argmin(stored.isfinite().int()))
            raise ValueError(
                f"values must be finite in {self.dtype}, got {float(values[bad])} at index {int(indices[bad])}; "
                "torch.bfloat16 holds larger values than torch.float16, NaN and infinity must be dealt with upstream"
            )
        if len(lengths) == 1:
            keys = indices
        else:
            token = torch.repeat_interleave(lengths.long(), output_size=nnz)
            keys = token * (1 << 16) + indices
        steps = keys.diff()
        if bool((steps <= 0).any()):
            keys, order = keys.sort()
            repeated = keys.diff() == 0
            if bool(repeated.any()):
                twice = int(keys[int(torch.argmax(repeated.int()))]) & 0xFFFF
                raise ValueError(
                    f"indices must not repeat within a token, got {twice} twice; sum the two values first"
                )
            indices, stored = indices[order], stored[order]
        return indices, stored, offsets

    def _open_block(self) -> _Block:
        if self._blocks[-1].num_tokens == self.block_size:
            self._blocks.append(self._new_block())
        return self._blocks[-1]

    def _new_block(self) -> _Block:
        offsets = torch.zeros(self.block_size + 1, dtype=torch.int32, device=self.device)
        return _Block(offsets, [self._new_entries(self.max_nnz_per_block)])

    def _new_entries(self, capacity: int) -> _Entries:
        return _Entries(
            torch.empty(capacity, dtype=torch.int16, device=self.device),
            torch.empty(capacity, dtype=self.dtype, device=self.device),
        )

    def _write(self, block: _Block, indices: Tensor, values: Tensor, offsets: Tensor) -> None:
        missing = block.nnz + len(indices) - block.capacity
        if missing > 0:
            # At least an eighth of the base, so that a block that overflows all the time still has few chunks.
            chunk = self._new_entries(_round_up(max(missing, self.max_nnz_per_block // 8)))
            block.chunks.append(chunk)
            block.capacity += len(chunk.indices)
        written, chunk_start = 0, 0
        for chunk in block.chunks:
            chunk_end = chunk_start + len(chunk.indices)
            position = block.nnz + written
            if written < len(indices) and position < chunk_end:
                count = min(len(indices) - written, chunk_end - position)
                place = slice(position - chunk_start, position - chunk_start + count)
                chunk.indices[place] = indices[
                    written : written + count
                ]  # int16 wraps: read back as unsigned
                chunk.values[place] = values[written : written + count]
                written += count
            chunk_start = chunk_end
        num_new = len(offsets) - 1
        block.offsets[block.num_tokens + 1 : block.num_tokens + num_new + 1] = offsets[1:] + block.nnz
        block.num_tokens += num_new
        block.nnz += len(indices)
        self._num_tokens += num_new
        self._nnz += len(indices)

    # -- read --

    def _compressed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets [tokens + 1], indices [nnz], both int64, and values [nnz], ascending within each token."""
        offsets = [torch.zeros(1, dtype=torch.int64, device=self.device)]
        indices, values = [], []
        nnz = 0
        for block in self._blocks:
            offsets.append(block.offsets[1 : block.num_tokens + 1].long() + nnz)
            left = block.nnz
            for chunk in block.chunks:
                count = min(left, len(chunk.indices))
                indices.append(chunk.indices[:count])
                values.append(chunk.values[:count])
                left -= count
            nnz += block.nnz
        return torch.cat(offsets), torch.cat(indices).long() & 0xFFFF, torch.cat(values)

    def _coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token, index and value of each entry."""
        offsets, indices, values = self._compressed()
        return torch.repeat_interleave(offsets.diff(), output_size=len(indices)), indices, values


def _round_up(entries: int) -> int:
    return -(-entries // _CHUNK_ENTRIES) * _CHUNK_ENTRIES


class BlockedCSCMatrix(_BlockedMatrix):
    """Sparse [num_rows, tokens] matrix in blocks of columns; a column is a token (key outliers).

    Args:
        num_rows (int): entries of a dense column, at most 65536.
        block_size (int): tokens per block.
        max_nnz_per_block (int | None): entries preallocated per block, beyond which chunks are chained; None
            makes room for 1.25% of a dense block.
        device: where the storage lives.
        dtype (torch.dtype): stored type of the values, torch.float16 or torch.bfloat16.

    Raises:
        ValueError: a size is out of range or dtype is not a 16-bit float.
    """

    def __init__(
        self,
        num_rows: int,
        block_size: int = 256,
        max_nnz_per_block: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__("num_rows", num_rows, block_size, max_nnz_per_block, device, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(num_rows, tokens)."""
        return self._other_size, self._num_tokens

    @property
    def total_columns(self) -> int:
        """Tokens appended."""
        return self._num_tokens

    def append_token(self, row_indices: Tensor | Sequence[int], values: Tensor | Sequence[float]) -> None:
        """Append one column; arguments as of `append_tokens`, both [nnz], tensors or lists."""
        self._append_token(row_indices, values)

    def append_tokens_batch(
        self,
        row_indices_list: Sequence[Tensor | Sequence[int]],
        values_list: Sequence[Tensor | Sequence[float]],
    ) -> None:
        """Append several columns, given as one list of row indices and one of values per token."""
        self._append_tokens_batch(row_indices_list, values_list)

    def to_dense(self) -> Tensor:
        """The dense matrix, [num_rows, tokens], in the stored type."""
        columns, rows, values = self._coordinates()
        dense = values.new_zeros(self.shape)
        dense[rows, columns] = values
        return dense

    def to_standard_csc(self) -> tuple[Tensor, Tensor, Tensor]:
        """Plain CSC: (col_offsets [tokens + 1] int64, row_indices [nnz] int64, ascending, values [nnz])."""
        return self._compressed()

    def to_torch(self) -> Tensor:
        """The matrix as a torch.sparse_csc tensor."""
        return torch.sparse_csc_tensor(*self._compressed(), size=self.shape, check_invariants=True)


class BlockedCSRMatrix(_BlockedMatrix):
    """Sparse [tokens, num_cols] matrix in blocks of rows; a row is a token (value outliers).

    Args:
        num_cols (int): entries of a dense row, at most 65536.
        block_size, max_nnz_per_block, device, dtype: as of `BlockedCSCMatrix`.

    Raises:
        ValueError: a size is out of range or dtype is not a 16-bit float.
    """

    def __init__(
        self,
        num_cols: int,
        block_size: int = 256,
        max_nnz_per_block: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__("num_cols", num_cols, block_size, max_nnz_per_block, device, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, num_cols)."""
        return self._num_tokens, self._other_size

    @property
    def total_rows(self) -> int:
        """Tokens appended."""
        return self._num_tokens

    def append_token(self, col_indices: Tensor | Sequence[int], values: Tensor | Sequence[float]) -> None:
        """Append one row; arguments as of `append_tokens`, both [nnz], tensors or lists."""
        self._append_token(col_indices, values)

    def append_tokens_batch(
        self,
        col_indices_list: Sequence[Tensor | Sequence[int]],
        values_list: Sequence[Tensor | Sequence[float]],
    ) -> None:
        """Append several rows, given as one list of column indices and one of values per token."""
        self._append_tokens_batch(col_indices_list, values_list)

    def to_dense(self) -> Tensor:
        """The dense matrix, [tokens, num_cols], in the stored type."""
        rows, columns, values = self._coordinates()
        dense = values.new_zeros(self.shape)
        dense[rows, columns] = values
        return dense

    def to_standard_csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """Plain CSR: (row_offsets [tokens + 1] int64, col_indices [nnz] int64, ascending, values [nnz])."""
        return self._compressed()

    def to_torch(self) -> Tensor:
        """The matrix as a torch.sparse_csr tensor."""
        return torch.sparse_csr_tensor(*self._compressed(), size=self.shape, check_invariants=True)
