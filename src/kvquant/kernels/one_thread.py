"""Keeping PyTorch's operations on the calling thread, for work made of many small ones.

PyTorch splits each operation of its own among its threads and waits for all of them, 60 to 90 us where threads sleep
while they wait (OMP_WAIT_POLICY=PASSIVE, which every run sets): more than an operation on a cache-sized chunk takes.
Python threads of our own with a share of the chunks each were tried on two cores: they wait for each other's
interpreter lock between operations (1.2x the time, 1.6x the processor time of one thread).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's CPU operations on this thread alone while the context lasts; entering and leaving takes 0.2 us."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
