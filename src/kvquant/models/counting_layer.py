"""What transformers sees of a layer of our cache: a counter of columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class CountingLayer(CacheLayerMixin):
    """Hands new keys and values through and counts columns.

    Args:
        num_columns: returns the columns that the cache has seen.
        check_in_call: raises unless our attention is about to run.
    """

    def __init__(self, num_columns: Callable[[], int], check_in_call: Callable[[], None]) -> None:
        super().__init__()
        self._num_columns, self._check_in_call = num_columns, check_in_call

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated per layer."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values; the attention function stores them.

        Raises:
            ModelError: the model runs its own attention, which would see no history.
        """
        self._check_in_call()
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included: what generate() counts positions with."""
        return self._num_columns()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask, if one were built."""
        return self._num_columns() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum of its own: the pool is the limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same under the name that transformers used before 5.20."""
        return -1
