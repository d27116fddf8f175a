"""The triton kernel that stores exact blocks, against the reference: blocks and error words are identical.

Triton's interpreter must be chosen before triton is imported, so that the cases run in a process of their own (this
file as a script), and compiled on a GPU.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from interpreter import interpret

# Tokens, heads, head_dim: one token, a number of channels that is no power of two, more channels than a program has.
SHAPES = [(1, 1, 64), (70, 2, 80), (9, 5, 96), (3, 32, 128)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = list(itertools.product(SHAPES, DTYPES))


def check(shape: tuple[int, int, int], dtype: torch.dtype, device: str, bad: float | None = None) -> None:
    """Store made-up tokens in slots of an order of their own, the last channels' one of the middle token ``bad``."""
    from kvquant.kernels import ERROR_VALUE_NOT_FINITE, ExactStore, reference
    from kvquant.kernels.triton_kernels import write_exact

    T, H, D = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    if bad is not None:
        x[T // 2, H - 1, D - 2] = bad
    slots = torch.randperm(8 * 16, generator=generator)[:T]
    found = []
    for write, where in ((write_exact, device), (reference.write_exact, "cpu")):
        data = torch.zeros(8, H, 16, D, dtype=dtype, device=where)
        error = torch.zeros(2, dtype=torch.int64, device=where)
        block, offset = (s.to(where) for s in (slots // 16, slots % 16))
        write(x.to(where), ExactStore(data), block, offset, ERROR_VALUE_NOT_FINITE, error)
        found.append((data.cpu().view(torch.uint8), error.tolist()))
    (ours, our_error), (theirs, their_error) = found
    assert torch.equal(ours, theirs)
    assert our_error == their_error == ([0, 0] if bad is None else [ERROR_VALUE_NOT_FINITE, H * D - 2])


def all_checks(device: str) -> None:
    for shape, dtype in CASES:
        check(shape, dtype, device)
    for bad in (float("nan"), float("inf"), -float("inf")):
        check(SHAPES[1], torch.float16, device, bad)
    check(SHAPES[3], torch.float32, device, float("nan"))


def test_the_interpreter_stores_what_the_reference_stores() -> None:
    interpret(__file__)


@pytest.mark.gpu
def test_a_gpu_stores_what_the_reference_stores() -> None:
    all_checks("cuda")


if __name__ == "__main__":
    all_checks("cpu")
