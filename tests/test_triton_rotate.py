"""Rotation of a call's tokens: the models' own formula to the bit, and a kernel that rounds as PyTorch does.

As in test_triton_decode.py the kernel runs in the interpreter in a process of its own (this file as a script), and
compiled on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interpreter import interpret

# (T, H, D, R): whole heads, some channels, an odd number of pairs, more heads than a program takes
SHAPES = [(5, 4, 64, 64), (3, 3, 48, 36), (4, 2, 80, 80), (2, 33, 128, 128), (2, 5, 256, 256)]


def drawn(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens between others, as of a projection of queries, keys and values in one, and tables of their positions."""
    T, H, D, R = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, H + 2, D, generator=generator).to(dtype)[:, 1:-1]
    angle = torch.arange(1000, 1000 + T)[:, None] / 10000 ** (torch.arange(0, R, 2) / R)
    cos, sin = (1.3 * table.repeat(1, 2) for table in (angle.cos(), angle.sin()))
    return x.to(device), cos.to(device), sin.to(device)


def check_kernel(dtype: torch.dtype, out: torch.dtype, device: str) -> None:
    from kvquant.kernels.reference import rotate_tokens as truth
    from kvquant.kernels.triton_kernels.rotate import rotate_tokens

    for shape in SHAPES:
        x, cos, sin = drawn(shape, dtype, device)
        ours = rotate_tokens(x, cos, sin, out)
        assert ours.dtype == out and ours.is_contiguous()
        torch.testing.assert_close(ours, truth(x, cos, sin, out), rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_form_is_the_models_own_rounded_once(shape, dtype) -> None:
    from kvquant.kernels import get_backend
    from kvquant.models.attention_hook import rotate

    x, cos, sin = drawn(shape, dtype)
    truth = rotate(x.float(), cos[:, None], sin[:, None])
    for name in ("reference", "pytorch_fused"):
        rotate_tokens = get_backend(name).rotate_tokens
        assert torch.equal(rotate_tokens(x, cos, sin, torch.float32), truth)
        assert torch.equal(rotate_tokens(x, cos, sin, dtype), truth.to(dtype))


def test_rotation_in_the_interpreter_agrees_with_pytorch() -> None:
    pytest.importorskip("triton")
    interpret(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_rotates_as_pytorch_does(dtype) -> None:
    for out in (torch.float32, dtype):
        check_kernel(dtype, out, "cuda")


if __name__ == "__main__":
    # The interpreter rounds to neither 16-bit type as a GPU does.
    check_kernel(torch.float32, torch.float32, "cpu")
    check_kernel(torch.float16, torch.float32, "cpu")
