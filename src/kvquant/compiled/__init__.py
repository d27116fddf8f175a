"""Loops over tokens that numba compiles: what plain PyTorch does in forty passes over memory, these do in one.

A code is fifteen comparisons of an element that is in a register already; PyTorch, one operation at a time, reads and
writes a cache-sized array for each. Measured on two cores (bf16 [1024, 4096], 4 bits + 1%, keys and values): 6 ns an
element in PyTorch, of which no single operation takes more than a sixth.

The loops that quantize are integer arithmetic on the elements' bits, so that results are PyTorch's bit for bit, whatever
compiles them; everything in floating point (ranges, boundaries, rounding to storage) is left to PyTorch. Only decode
attention is in floats, and agrees as attention does: to rounding. numba brings its own
LLVM: no compiler is needed where this runs, and what it compiles is kept on disk (beside the sources, or in the user's
cache). Tensors on other devices, other dtypes, or a Python without numba take the PyTorch path.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvquant.one_thread import threads_outside

log = logging.getLogger(__name__)

# Raw bits by size of an element; the floats among them are 16-bit and fp32.
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
# Elements that are worth waking another thread for, which takes some 60 us.
_ELEMENTS_PER_THREAD = 1 << 18


def can_compile(x: Tensor) -> bool:
    """Whether there are compiled loops for such elements here; without numba it is said once that there are none."""
    return x.device.type == "cpu" and x.dtype in _BITS and has_numba()


@functools.lru_cache(maxsize=1)
def has_numba() -> bool:
    """Whether numba can be used; a warning the first time if it cannot."""
    try:
        importlib.import_module("numba")
    except ImportError as error:
        log.warning(
            "numba cannot be used (%s): quantizing on this CPU runs in plain PyTorch, with equal results and several "
            "times slower; pip install numba",
            error,
        )
        return False
    return True


def loop(function: Callable[..., Any]) -> Any:
    """Compile a loop when it is first called, without Python's lock, and keep the result on disk where that can be."""
    return _compile(function)


def float_loop(function: Callable[..., Any]) -> Any:
    """:func:`loop` whose sums may be taken in another order, and products and sums rounded together."""
    return _compile(function, fastmath={"reassoc", "contract"})


def _compile(function: Callable[..., Any], **options: Any) -> Any:
    import numba

    from kvquant.compiled.disk_cache import SharedCache

    dispatcher = numba.njit(nogil=True, **options)(function)
    try:
        dispatcher._cache = SharedCache(function)
    except RuntimeError as error:  # neither the sources' folder nor the user's cache can be written
        log.warning("compiled again in every process: %s", error)
    return dispatcher


def raw(x: Tensor) -> NDArray[Any]:
    """The memory of a CPU tensor as numpy sees it: floats as integers of their size."""
    x = x.detach()
    return x.view(_BITS[x.dtype]).numpy() if x.dtype in _BITS else x.numpy()


def ordered_bounds(bounds: Tensor) -> NDArray[Any]:
    """Bounds from `encoding.ordered_floor` or `ordered_range` as integers in the order of the floats, contiguous."""
    bounds = bounds.detach().contiguous()
    if bounds.dtype != torch.float32:
        return bounds.numpy()
    bits = bounds.view(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits).numpy()


def byte_ones(num_codes: int, narrowest: int) -> int:
    """1 in each byte of an integer of eight, where every plane of a row is whole such integers; else 1, for bytes."""
    return 0x0101010101010101 if num_codes * narrowest % 64 == 0 else 1


def magnitude_mask(x: NDArray[Any]) -> int:
    """All bits of an element but the sign's."""
    return int(np.iinfo(x.dtype).max)


def in_parts(num_rows: int, num_elements: int, work: Callable[[int, int], Any]) -> list[Any]:
    """Call `work(start, stop)` on ranges of rows, on as many threads as PyTorch has and as is worth it.

    Args:
        num_rows: rows to share out.
        num_elements: of all rows together.
        work: releases Python's lock (a `loop`), and writes nothing that another range reads.

    Returns:
        what each range gave, in order.
    """
    count = max(1, min(threads_outside(), num_rows, num_elements // _ELEMENTS_PER_THREAD))
    ends = [num_rows * i // count for i in range(count + 1)]
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(part: int) -> None:
        try:
            results[part] = work(ends[part], ends[part + 1])
        except BaseException as error:  # raised on below, in the calling thread
            errors.append(error)

    # Threads of this call alone: starting one takes no longer than waking one, and none is left over a fork.
    threads = [threading.Thread(target=run, args=(part,)) for part in range(1, count)]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
