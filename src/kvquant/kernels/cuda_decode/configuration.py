"""What decode.cu is compiled for, and how much shared memory that takes. Plain numbers: neither PyTorch nor a GPU."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

SOURCE = Path(__file__).with_name("decode.cu")
KERNEL = "decode"
HEAD_DIM, BLOCK_SIZE = 128, 64
BITS = (2, 3, 4)
MOST_GROUPS = 8  # columns of a tensor core's product
CHAIN = 32  # entries of a chain's first chunk, which are copied with a block's own
FEWEST_WARPS = 4
# Twelve warps leave a thread 168 registers; sixteen, with 128, would keep sums in local memory.
_MOST_WARPS = 12

# As in layout.cuh
_TABLE_AT, _RESERVED = 1 << 16, 1 << 10  # the look-up table's address, and what of shared memory is not ours
_TABLE, _NARROW_TABLE = 1 << 16, 0x7800
_ANGLES = BLOCK_SIZE * 64 * 4
_LISTS = 768
_GAP = 32
# One in six blocks of a head has more than 128 outliers of values (1%, of the bench's made-up values);
# copies begin up to fifteen before them (fetch.cuh).
_FEWEST_VALUE_PLACES, _MOST_VALUE_PLACES = 128, 176
_OUT_ROW, _QUERY_ROW = 129, 320


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One way to compile the kernel.

    Args:
        key_bits: 2, 3 or 4.
        value_bits: 2, 3 or 4.
        groups: query heads per KV head, up to 8.
        is_bfloat16: whether stored 16-bit numbers are bf16, else fp16.
        key_base: outliers of keys in a block's own row, a multiple of eight.
        value_entries: outliers of values per token.
        has_window: whether a sliding window hides tokens.
        has_softcap: whether scores are capped.
        value_places: outliers of a head's values of a block that there is room for, 128 or 176; others take longer.
        warps: of a program, each with a share of its own.
    """

    key_bits: int
    value_bits: int
    groups: int
    is_bfloat16: bool
    key_base: int
    value_entries: int
    has_window: bool = False
    has_softcap: bool = False
    value_places: int = _FEWEST_VALUE_PLACES
    warps: int = FEWEST_WARPS

    @property
    def padded_groups(self) -> int:
        """Query heads that there is room for: a power of two."""
        return 1 << (self.groups - 1).bit_length()

    @property
    def key_places(self) -> int:
        """Outliers of keys of a block that there is room for; three for each lane at least."""
        return max(96, self.key_base + CHAIN)

    @property
    def warp_bytes(self) -> int:
        """Shared memory of a warp alone (W_BYTES)."""
        GN = self.padded_groups
        values = BLOCK_SIZE * 16 * self.value_bits + (4 * _GAP if self._has_gaps(self.value_bits) else 0)
        bases_and_ranges = (256 if self.is_bfloat16 else 512) + 256
        entries = 2 * 2 * self.key_places + 2 * 2 * self.value_places
        last = GN - 1
        if self.key_bits == 3:
            scores = last * 72 + last // 4 * 8 + 72
        else:
            scores = (
                last % 2 * 68 + last // 2 * 144 + (last // 2 * 8 + last // 2 % 2 * 12 if GN > 4 else 0) + 68
            )
        scores_and_sums = (scores + GN * _OUT_ROW) * 4
        queries = _up(values + bases_and_ranges + entries + scores_and_sums, 32) + _QUERY_ROW * GN
        gaps = 7 * _GAP if self._has_gaps(self.key_bits) else 0
        keys = BLOCK_SIZE * 16 * self.key_bits + gaps if self.key_bits < 4 else 0
        firsts, state = 64, 64
        line = 32 if self._has_gaps(self.value_bits) else 128
        return _up(_up(queries + 4 * 256 + firsts + state, line) + keys, line)

    def _has_gaps(self, bits: int) -> bool:
        """Whether rows of codes have gaps in shared memory, so that they lie in different banks (GAPS)."""
        return bits < 4 and self.key_bits != 3

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a program."""
        table = _NARROW_TABLE if self.key_bits == self.value_bits == 3 else _TABLE
        below = (_TABLE_AT - _RESERVED - _ANGLES - _LISTS) // self.warp_bytes  # warps in front of the table
        return _TABLE_AT - _RESERVED + table + max(0, self.warps - below) * self.warp_bytes

    def with_most_warps(self, shared_bytes: int) -> Configuration | None:
        """As many warps as a program of ``shared_bytes`` holds; None: fewer than are worth it."""
        for warps in range(_MOST_WARPS, FEWEST_WARPS - 1, -1):
            for places in (_MOST_VALUE_PLACES, _FEWEST_VALUE_PLACES):
                chosen = dataclasses.replace(self, warps=warps, value_places=places)
                if chosen.shared_bytes <= shared_bytes:
                    return chosen
        return None

    @property
    def options(self) -> tuple[str, ...]:
        """What the compiler is told."""
        macros = {
            "KB": self.key_bits,
            "VB": self.value_bits,
            "G": self.groups,
            "GN": self.padded_groups,
            "BF16": int(self.is_bfloat16),
            "WARPS": self.warps,
            "K_BASE": self.key_base,
            "K_PLACES": self.key_places,
            "V_ENTRIES": self.value_entries,
            "V_PLACES": self.value_places,
            "HAS_WINDOW": int(self.has_window),
            "HAS_SOFTCAP": int(self.has_softcap),
        }
        return (*(f"-D{name}={value}" for name, value in macros.items()), "-lineinfo")


def read_source() -> str:
    """``decode.cu`` with what it includes, each file once, in place: a source that includes nothing."""
    seen: set[str] = set()

    def read(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = SOURCE.with_name(name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'^#include "(.+)"\n', lambda found: read(found[1]), text, flags=re.MULTILINE)

    return read(SOURCE.name)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
