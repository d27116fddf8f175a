"""Python threads for work made of many small operations.

PyTorch splits each operation of its own among its threads and waits for all of them, 60 to 90 us where threads sleep
while they wait (OMP_WAIT_POLICY=PASSIVE, which every run sets): more than an operation on a cache-sized chunk takes.
Here each thread takes a run of rows through all operations alone; PyTorch's own threads stay out of it.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from kvquant.encoding import SERIAL_ELEMENTS

Result = TypeVar("Result")
# Operations hold the interpreter's lock for about a tenth of their time.
_MOST_WORKERS = 8
# Below this another worker costs more than it saves.
_LEAST_ELEMENTS = 1 << 17


def map_rows(function: Callable[[slice], Result], num_rows: int, row_elements: int) -> list[Result]:
    """Apply a function to runs of rows that make up 0 to ``num_rows``, in as many threads as PyTorch uses.

    Args:
        function: takes a slice of rows; runs without autograd, in the caller's inference mode.
        num_rows: T.
        row_elements: elements of one row, to tell whether several threads are worth it.

    Returns:
        the results in order of the rows. An exception of the function is raised here.
    """
    elements = num_rows * row_elements
    if elements <= SERIAL_ELEMENTS or torch.get_num_threads() == 1:
        return [function(slice(0, num_rows))]
    workers = min(torch.get_num_threads(), _MOST_WORKERS)
    # One worker is still better than this thread: its operations wake nobody.
    count = max(1, min(workers, elements // _LEAST_ELEMENTS, num_rows))
    inference = torch.is_inference_mode_enabled()

    def work(rows: slice) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return function(rows)

    edges = [num_rows * i // count for i in range(count + 1)]
    futures = [_executor(workers).submit(work, slice(a, b)) for a, b in itertools.pairwise(edges)]
    return [future.result() for future in futures]


@functools.lru_cache(maxsize=1)
def _executor(count: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch runs every operation on the calling thread alone."""
    num_threads = torch.get_num_threads()

    def start() -> None:
        # A thread's first operation takes over the process's number; only what is set after that stays.
        torch.zeros(1 << 16).add_(1)
        torch.set_num_threads(1)

    executor = ThreadPoolExecutor(count, "kvquant-kernels", initializer=start)
    # The executor starts a thread per submission while none is idle.
    barrier = threading.Barrier(count)
    for future in [executor.submit(barrier.wait) for _ in range(count)]:
        future.result()
    # Setting it in one thread also changes what threads to come and MKL start with.
    torch.set_num_threads(num_threads)
    return executor
