"""Decode attention over exact blocks of the triton backend against the tiled attention over the same blocks.

As in test_triton_decode.py the cases run in the interpreter in a process of their own (this file as a script), and
compiled, with larger ones, on a GPU.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from interpreter import interpret


@dataclasses.dataclass(frozen=True)
class Case:
    """One token of each sequence over ``lengths`` stored ones, its own included."""

    lengths: tuple[int, ...]
    head_dim: int = 64
    heads: int = 2
    groups: int = 1
    window: int | None = None
    softcap: float | None = None
    rotated: int | None = None  # channels that are rotated; None: all
    scaling: float = 1.0
    block_size: int = 64
    dtype: torch.dtype = torch.float16


SMALL = {
    "ragged, groups": Case((1, 64, 130), groups=2),
    "in the model's fp32": Case((63, 65), dtype=torch.float32),
    "window and cap": Case((200, 9), heads=1, groups=3, window=50, softcap=5.0),
    "no rotation": Case((100,), head_dim=80, rotated=0),
    "part of a head rotated": Case((90,), head_dim=96, heads=1, groups=2, rotated=32),
    "scaled rotation": Case((100,), head_dim=80, heads=1, groups=2, scaling=1.3),
    "small blocks": Case((15, 16, 33), heads=1, head_dim=128, block_size=16),
}
LARGE = {
    "llama 3 shape": Case((1, 500, 2100), head_dim=128, heads=8, groups=4, dtype=torch.bfloat16),
    "llama 2 shape": Case((63, 64, 65), head_dim=128, heads=32, dtype=torch.bfloat16),
    "wide heads": Case((130, 1000), head_dim=256, heads=4, groups=2, dtype=torch.bfloat16),
    "large blocks": Case((130, 1000), head_dim=128, heads=4, groups=2, block_size=128),
    "long windows": Case((4000, 1100), head_dim=128, heads=4, groups=6, dtype=torch.bfloat16, window=1024),
}
# What a product of numbers of each type comes to; rounded keys, queries and weights, as the type has them.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def results(case: Case, device: str, programs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's output and the tiled attention's, [B, Hq, D] fp32. Slots that hold no token hold NaN."""
    from kvquant.kernels import ExactStore, Rope, StoredLayer, get_backend
    from kvquant.kernels.tiled_attention import attend_tiled
    from kvquant.kernels.triton_kernels.exact_decode import attend_exact_decode, exact_refusal
    from kvquant.ragged import RaggedStep

    H, D, BS, B = case.heads, case.head_dim, case.block_size, len(case.lengths)
    generator = torch.Generator().manual_seed(0)
    width = -(-max(case.lengths) // BS)
    # Blocks in an order of their own, with one that nobody holds.
    table = torch.randperm(B * width + 1, generator=generator)[:-1].view(B, width).int()
    stores = []
    for _ in range(2):
        data = torch.randn(B * width + 1, H, BS, D, generator=generator).to(case.dtype)
        written = torch.zeros(B * width + 1, BS, dtype=torch.bool)
        for row, length in zip(table.long(), case.lengths, strict=True):
            first = 0 if case.window is None else max(0, length - case.window)
            held = torch.arange(width * BS).view(width, BS)
            written[row] = (held < length) & (held >= first // BS * BS)
        data[~written[:, None].expand(-1, H, -1)] = torch.nan
        stores.append(ExactStore(data.to(device)))
    layer = StoredLayer(get_backend("pytorch_fused"), *stores, None, 16, 16, D)
    rope = None
    R = D if case.rotated is None else case.rotated
    if R:
        frequency = 1 / 10000 ** (torch.arange(0, R, 2) / R)
        offset, base = (torch.arange(n)[:, None] * f * frequency for n, f in ((2 * BS, 1), (40, 2 * BS)))
        tables = (offset.cos() * case.scaling, offset.sin() * case.scaling, base.cos(), base.sin())
        rope = Rope(*(t.to(device) for t in tables))
    query = torch.randn(B, H * case.groups, D, generator=generator).to(case.dtype).to(device)
    settings = {
        "block_size": BS,
        "blocks_per_tile": 2,
        "softmax_scale": D**-0.5,
        "window": case.window,
        "softcap": case.softcap,
    }
    step = RaggedStep.build(
        [n - 1 for n in case.lengths], [1] * B, torch.arange(B, device=device), table.to(device), BS
    )
    assert exact_refusal(query, layer, rope, BS) is None
    truth = attend_tiled(query.float(), step, layer, rope, None, None, **settings)
    ours = attend_exact_decode(
        query, step.block_table, step.kv_lengths_tensor, layer, rope, None, programs=programs, **settings
    )
    return ours.float(), truth


def check(case: Case, device: str, programs: int) -> None:
    ours, truth = results(case, device, programs)
    error = float((ours - truth).norm() / truth.norm())
    assert error < TOLERANCE[case.dtype], f"{case}, {programs} programs: {error:.1e}"


def test_decode_in_the_interpreter_agrees_with_tiled_attention() -> None:
    interpret(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 7])
@pytest.mark.parametrize("case", [*SMALL.values(), *LARGE.values()], ids=[*SMALL, *LARGE])
def test_decode_on_a_gpu_agrees_with_tiled_attention(case: Case, programs: int) -> None:
    check(case, "cuda", programs)


if __name__ == "__main__":
    for small in SMALL.values():
        for number in (1, 7):
            check(small, "cpu", number)
