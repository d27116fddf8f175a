"""The CUDA decode kernel on a GPU against fp64 over the same blocks, dequantized, as Triton's.

What can be known of it without a GPU is tested in test_cuda_compile.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

pytest.importorskip(
    "triton", reason="what is made before the kernel needs triton, which is for Linux on x86-64"
)

import test_triton_decode
from kvquant.kernels.cuda_decode import launch
from kvquant.kernels.triton_kernels import attention
from test_triton_decode import Case, decode_call

BF16 = {"head_dim": 128, "dtype": torch.bfloat16}
# Triton's kernel has these cases too, as far as this one is for them.
SHARED = {
    name: case
    for name, case in {**test_triton_decode.SMALL, **test_triton_decode.LARGE}.items()
    if case.head_dim == 128 and case.block_size == 64 and case.rotated and case.groups <= 8
}
ON_GPU = {
    **SHARED,
    **{
        f"ragged, {bits} bits, {str(dtype)[6:]}": Case(
            (1, 63, 64, 65, 500, 2100), bits=bits, head_dim=128, heads=8, groups=4, dtype=dtype
        )
        for bits, dtype in ((4, torch.float16), (3, torch.bfloat16), (2, torch.float16))
    },
    "window and cap": Case((200, 9, 900), bits=4, heads=2, groups=8, window=150, softcap=5.0, **BF16),
    "window of narrow codes": Case((200, 9, 900), bits=2, heads=2, groups=2, window=70, **BF16),
    "value groups, mixed": Case((100, 300), bits=4, value_bits=2, heads=2, groups=4, value_groups=2, **BF16),
    "narrow keys": Case((100, 300), bits=2, value_bits=4, heads=2, groups=3, **BF16),
    "mixed narrow": Case((100, 300), bits=3, value_bits=2, heads=2, groups=7, **BF16),
    "no outliers": Case((100, 300), bits=2, heads=2, groups=4, fraction=0.0, **BF16),
    "many outliers, 3 bits": Case((100, 300), heads=2, groups=4, fraction=0.05, spilled=True, **BF16),
    "many outliers, 4 bits": Case((100, 300), bits=4, heads=2, groups=4, fraction=0.05, spilled=True, **BF16),
    "scaled rotation": Case((100, 300), bits=4, heads=2, groups=4, scaling=1.3, **BF16),
    **{
        f"slow pairs, {bits} bits": Case(
            (70, 900, 300), bits=bits, heads=8, groups=4, theta=500_000.0, scaling=1.3, **BF16
        )
        for bits in (4, 3, 2)
    },
}


@functools.cache
def call_of(name: str) -> Any:
    """A case's stored tokens, for calls that change nothing."""
    return decode_call(ON_GPU[name], "cuda")


def ours(call: Any, programs: int | None = None) -> torch.Tensor:
    """The CUDA kernel's output, in place of Triton's."""
    assert launch.cuda_decode_refusal(call.query, call.layer, call.rope, 64) is None
    table, lengths = call.step.block_table, call.step.kv_lengths_tensor
    arguments = (call.query, table, lengths, call.layer, call.rope, call.sinks)
    return launch.attend_cuda_decode(*arguments, programs=programs, **call.settings)


@pytest.fixture
def instead_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_triton_decode.Call, "ours", ours)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_decode_is_as_good_as_the_dtype(name: str) -> None:
    call = call_of(name)
    truth, in_dtype = call.dense(torch.float64), call.dense(ON_GPU[name].dtype).double()
    errors = {n: float((ours(call, n).double() - truth).norm()) for n in (1, 7, None)}
    assert all(error <= 2 * float((in_dtype - truth).norm()) for error in errors.values()), errors


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_decode_gives_the_same_bits_every_time(name: str) -> None:
    first, *others = (ours(call_of(name)) for _ in range(4))
    assert bool(first.isfinite().all()) and all(torch.equal(first, other) for other in others)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_graph_sees_the_tokens_that_came_after_it(bits: int) -> None:
    case = Case((5, 62, 70, 500), bits=bits, heads=2, groups=4, **BF16)
    call = decode_call(case, "cuda")
    before = ours(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(call)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, before)
    step = call.pool.reserve(call.rows, [1] * len(call.rows))
    token = torch.randn(len(call.rows), case.heads, case.head_dim, dtype=case.dtype, device="cuda")
    call.write(token, step)
    call.pool.commit()
    later = dataclasses.replace(call, step=step, query=call.query.flip(0))
    expected = ours(later)
    call.step.kv_lengths_tensor.copy_(step.kv_lengths_tensor)
    call.query.copy_(later.query)
    for _ in range(2):
        graph.replay()
        assert torch.equal(captured, expected) and not torch.equal(captured, before)


@pytest.mark.gpu
def test_a_kernel_is_first_built_inside_a_capture() -> None:
    call = call_of("one token")
    expected = ours(call)
    launch._build.cache_clear()
    launch.load_kernel.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(call)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_other_streams_are_used() -> None:
    call = call_of("llama 3 shape")
    expected = ours(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = ours(call)
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("instead_of_triton")
@pytest.mark.parametrize("name", ["llama 3 shape", "ragged, 2 bits, float16", "sinks", "no outliers"])
def test_not_finite_tokens_leave_their_neighbours_as_they_were(name: str) -> None:
    before, after = test_triton_decode.not_finite_beside(ON_GPU[name], "cuda")
    assert bool(before.isfinite().all()) and torch.equal(before, after)


@pytest.mark.gpu
def test_attend_takes_this_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    call, taken = call_of("window and cap"), []
    attend = launch.attend_cuda_decode
    monkeypatch.setattr(
        launch, "attend_cuda_decode", lambda *given, **named: taken.append(1) or attend(*given, **named)
    )
    monkeypatch.setattr(launch, "_FEWEST_FOR_A_WARP", 0)
    found = attention.attend(call.query, call.step, call.layer, call.rope, None, call.sinks, **call.settings)
    assert taken == [1] and torch.equal(found, ours(call))
