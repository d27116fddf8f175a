"""Keeping PyTorch's operations on the calling thread, for work made of many small ones.

PyTorch splits each operation of its own among its threads and waits for all of them, 60 to 90 us where threads sleep
while they wait (OMP_WAIT_POLICY=PASSIVE, which every run sets): more than an operation on a cache-sized chunk takes.
Python threads of our own with a share of such chunks each were tried on two cores: they wait for each other's
interpreter lock between operations (1.2x the time, 1.6x the processor time of one thread).
Compiled loops (`kvquant.compiled`) are long enough to be shared out, and still may take as many threads as PyTorch has.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_outside = threading.local()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's CPU operations on this thread alone while the context lasts; entering and leaving takes 0.2 us."""
    before, outer = torch.get_num_threads(), getattr(_outside, "count", None)
    _outside.count = threads_outside()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _outside.count = outer


def threads_outside() -> int:
    """PyTorch's number of threads, as it is outside of :func:`one_thread`."""
    return getattr(_outside, "count", None) or torch.get_num_threads()
