"""The CUDA decode kernel on a CPU, against fp64 over the same blocks, dequantized: as good as the input's dtype is.

g++ compiles the kernel with lanes as fibers (``cuda_on_cpu.h``). Whatever the order in which lanes run, and whether
asynchronous copies come at once or as late as they may, the same bits must come out. What is made before the kernel and
becomes of its parts runs in Triton's interpreter, so that the cases have a process of their own (this file as a script).
"""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from interpreter import interpret
from test_triton_decode import Case, decode_call

CASES = {
    "4 bits, ragged": Case((1, 70, 130), bits=4, head_dim=128, groups=2, dtype=torch.float16),
    "3 bits, one query head": Case((63, 64, 65), bits=3, head_dim=128),
    "2 bits, chains": Case((130,), bits=2, head_dim=128, groups=8, fraction=0.05, spilled=True),
    "keys and values apart": Case((65,), bits=4, value_bits=2, head_dim=128, heads=1, groups=7),
    "wide values": Case((65,), bits=3, value_bits=4, head_dim=128, heads=1, groups=8),
    "sinks": Case((2, 65), bits=3, head_dim=128, groups=5, sinks=3),
    "sinks, what they left": Case((40, 130), bits=4, head_dim=128, groups=8, sinks=3),
    "window and cap": Case((200, 9), bits=4, head_dim=128, heads=1, groups=8, window=50, softcap=5.0),
    # Triton's interpreter cuts bf16 results short instead of rounding them, which the bound has room for here.
    "bf16": Case((65, 300), bits=3, head_dim=128, groups=4, dtype=torch.bfloat16),
    "value groups": Case((100,), bits=4, head_dim=128, groups=4, value_groups=2),
    "no outliers": Case((100,), bits=4, head_dim=128, groups=8, fraction=0.0),
    "scaled rotation": Case((100,), bits=3, head_dim=128, groups=3, scaling=1.3),
    "slow pairs, 3 bits": Case(
        (70, 130), head_dim=128, groups=4, theta=500_000.0, scaling=1.3, dtype=torch.bfloat16
    ),
    "slow pairs, 4 bits, three heads": Case(
        (70, 130), bits=4, value_bits=3, head_dim=128, groups=3, theta=1e6, dtype=torch.bfloat16
    ),
    "slow pairs, 4 bits, eight heads": Case(
        (100,), bits=4, head_dim=128, heads=1, groups=8, theta=1e6, dtype=torch.bfloat16
    ),
    "slow pairs, 3 bits, eight heads": Case(
        (130,), head_dim=128, heads=1, groups=8, theta=1e6, dtype=torch.bfloat16
    ),
    "slow pairs, one head": Case((130,), head_dim=128, heads=4, theta=1e6, dtype=torch.bfloat16),
    "slow pairs, 2 bits": Case((1, 130), bits=2, head_dim=128, groups=8, theta=1e6, dtype=torch.bfloat16),
    "4 bits, bf16": Case((64, 150), bits=4, head_dim=128, groups=4, theta=1e6, dtype=torch.bfloat16),
    # Values' ranges differ by 2^7 from token to token, and outliers grow by 2^4 from block to block.
    "one program, many sizes": Case((500,), bits=3, head_dim=128, groups=4, dtype=torch.bfloat16),
    # Heads without value outliers in front of one with 103 of a block and one with 153.
    "crowded heads": Case((150,), bits=4, head_dim=128, heads=4, groups=4, fraction=0.005, quiet_heads=2),
    # An outlier of these keys adds thousands to a score's logarithm.
    "outliers, wide scores": Case((100,), bits=4, head_dim=128, heads=4, groups=4, fraction=0.05),
    # Twelve warps take a second share, of one block to three.
    "many shares": Case((64 * 34, 700, 64, 1), bits=4, head_dim=128, heads=1, groups=4),
    # A warp's share is all of it: more blocks than are described at once, and scores that grow far.
    "one program": Case((1100,), bits=2, head_dim=128, heads=1, groups=8),
    # Wide scores have errors that single heads make, a hundred times the median one: of 120 heads (420 to 700 tokens) the
    # ratio is 1.16 in all and 1.66 in the median, of eight it is anything (3.6 at 700 tokens, 0.6 at 600).
    "one program, wide scores": Case((600,), bits=4, head_dim=128, heads=1, groups=8),
}
# Lanes forwards and copies at once; backwards and late; from changing ones on, and late.
SCHEDULES = ((0, False), (1, True), (7, True))
# What must be noticed in a case, by an error or by a result that depends on the schedule.
MUTATIONS = {
    "one program, wide scores": {
        "keys are not waited for": ("      wait_for_older_copies();  // of keys\n", ""),
        "values are not waited for": ("      wait_for_older_copies();  // of values\n", ""),
        "blocks are read before they are described": ("      if (left == 1) copies_arrive();\n", ""),
        "a score's outliers are lost": (
            "s[t + i][x] += (float)(int)word[i] * back",
            "",
        ),
        "sums are not scaled anew": ("        sums[i][x] *= fade * keep;\n", ""),
    },
    "many shares": {
        "a share is taken before it is known": (
            "    wait_for_older_copies();  // of what the share's scores need\n",
            "",
        ),
        "a share's row is not waited for": (
            "            copies_arrive();\n            if (share_ends &&",
            "            if (share_ends &&",
        ),
    },
    "one program, many sizes": {
        "outliers are not relative to the largest range": (
            " * reciprocal(limit) * seen.size",
            " * reciprocal(limit)",
        ),
        "their sums are not emptied before they grow": (
            "difference > w.real(HEAP_MOST) || (column & 15) == 0",
            "w.real(HEAP_MOST) == 0.f",
        ),
    },
    "crowded heads": {
        "a head's last ones are lost": (" + 32 * NEAR;\n  }", " + 32 * NEAR + 48;\n  }"),
        "a block whose first heads have none is taken for an open one": (
            "block.last > 0 || a.value_end[(u64)id * a.H + a.H - 1] > 0",
            "block.last > 0",
        ),
    },
    "slow pairs, 4 bits, three heads": {
        "columns of faster pairs that must be empty are not": (
            "    nothing = rows + 256 + 8;",
            "    nothing = own;",
        ),
        "lanes do not exchange codes": ("of_lane_across(upper ? row[i].x : row[i].z, 2)", "row[i].z"),
    },
    "outliers, wide scores": {"large outliers are cut short": ("134217728.f", "67108864.f")},
}


def attend(call: Any, order: int, late: bool, source: str | None = None) -> torch.Tensor:
    """The kernel's output."""
    import cuda_on_cpu
    from kvquant.kernels.cuda_decode import launch

    chosen: list[Any] = []

    def build(configuration: Any, device: Any) -> int:
        chosen.append(configuration)
        return 0

    def run(kernel: int, arguments: Any, *, grid: int, **_: Any) -> None:
        cuda_on_cpu.run(chosen[-1], arguments, grid=grid, order=order, late=late, source=source)

    # One or two multiprocessors of an H200.
    device = SimpleNamespace(
        multi_processor_count=call.multiprocessors, shared_memory_per_block_optin=227 << 10
    )
    torch.cuda.get_device_properties = lambda _: device  # type: ignore[assignment, return-value]
    launch._build, launch.launch = build, run  # type: ignore[assignment]
    step = call.step
    arguments = (call.query, step.block_table, step.kv_lengths_tensor, call.layer, call.rope, call.sinks)
    return launch.attend_cuda_decode(*arguments, programs=call.programs, **call.settings)


def call_of(name: str) -> Any:
    """The call of a case."""
    call = decode_call(CASES[name], "cpu")
    call.programs = {"one": 1, "many": 20}.get(name.split()[0])
    call.multiprocessors = 1 if name.startswith("many") else 2
    if name.endswith("left"):
        leave_anything(call)
    if name.endswith("many sizes"):
        scale_values(call)
    if name.startswith("crowded"):  # all tokens count alike
        call.query.div_(16)
    if name.endswith("wide scores"):
        call.query.mul_(16 if name.startswith("outliers") else 8)
    return call


def leave_anything(call: Any) -> None:
    """Overwrite the value outliers of sink tokens, which are kept apart, by infinity."""
    values, sinks = call.layer.values, call.sinks[0].shape[1]
    for row, length in zip(call.step.block_table, call.step.kv_lengths, strict=True):
        block = int(row[0])
        if length < 64:  # open: in the order of tokens
            values.outlier_value[block, :sinks] = float("inf")
        else:
            end = int(values.outlier_end[block, -1])
            numbers = values.outlier_index[block].flatten()[:end].to(torch.int64) & 0xFFFF
            values.outlier_value[block].view(-1)[:end][numbers // 128 < sinks] = float("inf")


def scale_values(call: Any) -> None:
    """Multiply each token's stored values by a power of two, and a block's outliers by sixteen times the last one's."""
    values, generator = call.layer.values, torch.Generator().manual_seed(1)
    for row, length in zip(call.step.block_table, call.step.kv_lengths, strict=True):
        for column in range(-(-length // 64)):
            block, kept = int(row[column]), min(64, length - column * 64)
            power = torch.randint(-6, 2, (64,), generator=generator)
            for range_of in (values.scale, values.zero):
                range_of[block, :kept] *= torch.exp2(power)[:kept, None]
            entries, factor = values.outlier_value[block], torch.exp2(power + 4 * column)
            if kept < 64:  # open: in the order of tokens
                entries[:kept] *= factor[:kept, None]
            else:
                end = int(values.outlier_end[block, -1])
                numbers = values.outlier_index[block].flatten()[:end].to(torch.int64) & 0xFFFF
                entries.view(-1)[:end] *= factor[numbers // 128]


def error_of(call: Any, ours: torch.Tensor) -> float:
    """The relative RMS error of an output, in units of that of the same computation in the input's dtype."""
    truth, in_dtype = call.dense(torch.float64).double(), call.dense(call.query.dtype).double()
    return float((ours.double() - truth).norm() / (in_dtype - truth).norm())


if shutil.which("g++") is None:
    pytest.skip("g++ compiles the kernel", allow_module_level=True)
pytest.importorskip("triton", reason="Triton's interpreter makes the kernel's operands")


@pytest.mark.parametrize("part", [0, 1])
def test_decode_is_as_good_as_the_dtype_whatever_the_order_of_lanes(part: int) -> None:
    interpret(__file__, *list(CASES)[part::2])


def test_what_is_wrong_in_the_kernel_is_noticed() -> None:
    interpret(__file__, "--mutations")


def test_slow_pairs_are_as_good_as_exact_ones() -> None:
    interpret(__file__, "--slow")


def check(name: str) -> None:
    call = call_of(name)
    first, *others = (attend(call, *schedule) for schedule in SCHEDULES)
    error = error_of(call, first)
    print(name, error)
    assert error <= 2, name
    assert all(torch.equal(first, other) for other in others), f"{name}: depends on the order of lanes"


def check_slow_pairs() -> None:
    """A sine that is a line and a cosine that is 1 change little, and less than that they change: they are used."""
    import cuda_on_cpu

    exact = cuda_on_cpu.mutated("const bool slow = BF16 && a.slow[32] != 0;", "const bool slow = false;")
    for name in (name for name in CASES if name.startswith("slow")):
        call = call_of(name)
        one, other = (attend(call, 0, False, source).double() for source in (None, exact))
        # With tokens' places wrong it is twice as much.
        assert 0 < float((one - other).norm() / other.norm()) < 1.2e-3, name


def check_mutations() -> None:
    import cuda_on_cpu

    for name, mutations in MUTATIONS.items():
        call = call_of(name)
        for what, (old, new) in mutations.items():
            source = cuda_on_cpu.mutated(old, new)
            first = attend(call, *SCHEDULES[0], source=source)
            others = (attend(call, *schedule, source=source) for schedule in SCHEDULES[1:])
            assert not error_of(call, first) <= 2 or not all(torch.equal(first, x) for x in others), what


if __name__ == "__main__":
    if sys.argv[1:] == ["--mutations"]:
        check_mutations()
    elif sys.argv[1:] == ["--slow"]:
        check_slow_pairs()
    else:
        for chosen_name in sys.argv[1:]:
            check(chosen_name)
