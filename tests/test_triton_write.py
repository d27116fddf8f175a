"""The triton kernels that write, against pytorch_fused: all that is stored is identical.

Triton's interpreter must be chosen before triton is imported, so that its cases run in a process of their own (this
file as a script); on a GPU the same cases run compiled, and larger ones.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import sys
import types

import pytest
import torch

from interpreter import interpret
from write_cases import LARGE, SMALL, Case

PARTS = 2  # of the interpreter's cases, for two cores
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def heavy_tailed(num_tokens, heads, head_dim, seed, spread=1.0):
    channels = torch.Generator().manual_seed(99)
    scale = torch.randn(heads, head_dim, generator=channels).exp()
    centre = torch.randn(heads, head_dim, generator=channels)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, heads, head_dim, generator=generator)
    tail = torch.rand(num_tokens, heads, head_dim, generator=generator).clamp(min=0.05).sqrt()
    return x / tail * scale * spread + centre


def few_values(shape, groups=1, per_end=0):
    """Many equal elements, zeros of either sign, a token of width zero, and tokens equal but for their outliers."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(-2, 3, shape, generator=generator) * torch.tensor(0.5)
    # From here on two or three elements are equal, so that an end of the range often lies among them.
    x[10:] = torch.randint(-40, 41, x[10:].shape, generator=generator) * torch.tensor(0.25)
    x = torch.where(torch.rand(shape, generator=generator) < 0.5, -x, x)
    x[3] = 0.5
    # Of these, ``per_end`` and one more or less lie apart at one end, or at both, and all others tie.
    for token, (above, below) in enumerate(((0, 0), (0, -1), (-1, 1), (None, 0), (0, None)), 4):
        x[token] = -0.75
        by_group = x[token].view(groups, -1)
        for far, more in ((3.0, above), (-3.0, below)):
            if more is not None and per_end + more > 0:
                step = by_group.shape[1] // (2 * (per_end + more))
                by_group[:, int(far < 0) :: step][:, : per_end + more] = far
    return x


def quantizer_for(case):
    from kvquant.batched_quant import BatchedKVQuantizer
    from kvquant.spec import QuantSpec

    spec = QuantSpec(
        case.bits, outlier_fraction=case.fraction, value_groups=case.groups, sink_tokens=case.sinks
    )
    drawn = (heavy_tailed(256, case.heads, case.head_dim, seed).to(DTYPES[case.dtype]) for seed in (1, 2))
    return BatchedKVQuantizer.calibrate(spec, *drawn)


def pool_for(case, quantizer, device):
    from kvquant.block_layout import BlockLayout
    from kvquant.block_pool import BlockPool

    layout = BlockLayout(
        quantizer.spec, 1, case.heads, case.head_dim, DTYPES[case.dtype], case.block_size, 60.0
    )
    per_sequence = (sum(map(max, case.calls)) + case.block_size) // case.block_size + 1
    width = len(case.calls[0])
    pool = BlockPool(layout, per_sequence * width, max_sequences=width, device=device)
    return pool, [pool.add_sequence() for _ in range(width)]


def write(quantizer, pool, step, keys, values, *, triton):
    """As ``BatchedKVQuantizer.write``, sink tokens left out."""
    if triton:
        from kvquant.kernels import triton_kernels

        ours, more = (triton_kernels.write_keys, triton_kernels.write_values), {"runs": step.runs}
    else:
        from kvquant.kernels import fused_write

        ours, more = (fused_write.write_keys, fused_write.write_values), {}
    layer, spec = pool.layers[0], quantizer.spec
    skip = step.positions < spec.sink_tokens if spec.sink_tokens else None
    for function, x, store, bits in zip(
        ours, (keys, values), (layer.keys, layer.values), (spec.key_bits, spec.value_bits), strict=True
    ):
        function(
            x,
            store,
            quantizer.constants,
            step.slot_block,
            step.slot_offset,
            skip,
            layer.error,
            bits=bits,
            **more,
        )


def check(case, device):
    """Append the calls with both backends and compare all that the pools hold, after each call."""
    quantizer = quantizer_for(case)
    backends = ((False, "cpu", quantizer), (True, device, quantizer.to(device)))
    pools = [pool_for(case, quantizer, on) for _, on, _ in backends]
    total = sum(map(sum, case.calls))
    keys, values = (
        heavy_tailed(total, case.heads, case.head_dim, seed, case.spread).to(DTYPES[case.dtype])
        for seed in (3, 4)
    )
    if case.ties:
        entries = pools[0][0].tensors["value_outlier_index"].shape[-1]
        keys = values = few_values(values.shape, case.groups, entries // case.groups // 2).to(
            DTYPES[case.dtype]
        )
    done = 0
    for lengths in case.calls:
        tokens, done = slice(done, done + sum(lengths)), done + sum(lengths)
        for (triton, on, own), (pool, rows) in zip(backends, pools, strict=True):
            named = [row for row, n in zip(rows, lengths, strict=True) if n]
            step = pool.reserve(named, [n for n in lengths if n])
            write(own, pool, step, keys[tokens].to(on), values[tokens].to(on), triton=triton)
            pool.commit()
        assert_same_pools(pools[1][0], pools[0][0])
    pool = pools[0][0]
    beyond = int(pool.tensors["key_outlier_count"].max()) - pool.layout.key_outlier_base
    assert max(0, -(-beyond // 32)) >= case.chains, f"the draw must grow a chain of {case.chains} links"


def assert_same_pools(pool, truth):
    for name, tensor in truth.tensors.items():
        mine = pool.tensors[name].cpu()
        assert torch.equal(mine, tensor), f"{name}: {int((mine != tensor).sum())} of {tensor.numel()} differ"
    assert torch.equal(pool.spill_top.cpu(), truth.spill_top), "spill_top"
    assert torch.equal(pool.error.cpu(), truth.error), "error"


def check_error(case, device, kind, side, number, token):
    """One element that cannot be stored is named in the error word by both backends."""
    quantizer = quantizer_for(case)
    words = []
    for triton, on in ((False, "cpu"), (True, device)):
        pool, rows = pool_for(case, quantizer, on)
        keys, values = (heavy_tailed(9, case.heads, case.head_dim, seed) for seed in (3, 4))
        {"key": keys, "value": values}[side][token, 1, 5] = number
        keys, values = (x.to(DTYPES[case.dtype]).to(on) for x in (keys, values))
        write(quantizer.to(on), pool, pool.reserve(rows, [9]), keys, values, triton=triton)
        words.append(pool.error[0].tolist())
    assert words[0] == words[1] == ([kind, case.head_dim + 5] if kind else [0, 0]), words


ERRORS = [
    (1, "key", torch.nan, 0),
    (1, "key", torch.inf, 6),
    (2, "value", torch.nan, 6),
    (2, "value", -torch.inf, 0),
    (2, "value", 3e5, 6),
    (0, "value", 1e5, 1),
    (0, "key", 1e5, 1),
]


def check_exhaustion(device):
    """Without enough spill chunks nothing is counted and none is taken."""
    case = Case(bits=3, calls=((16,),), block_size=16, spread=6.0)
    quantizer = quantizer_for(case)
    pools = []
    for triton, on in ((False, "cpu"), (True, device)):
        pool, rows = pool_for(case, quantizer, on)
        pool.spill_top.fill_(2)
        keys, values = (heavy_tailed(16, 2, 64, seed, 6.0).to(torch.float16).to(on) for seed in (3, 4))
        write(quantizer.to(on), pool, pool.reserve(rows, [16]), keys, values, triton=triton)
        pools.append(pool)
    assert pools[1].error[0].tolist() == pools[0].error[0].tolist() == [3, 0]
    assert int(pools[1].spill_top) == 2
    assert int(pools[1].tensors["key_outlier_count"].sum()) == 0
    assert torch.equal(pools[1].tensors["key_codes"].cpu(), pools[0].tensors["key_codes"])


def all_checks(device, cases):
    """Every check by a name."""
    for case in cases:
        yield f"stores {case}", check, (case, device)
    for dtype, fraction, error in itertools.product(DTYPES, (0.0, 0.01), ERRORS):
        # What fp32 stores as fp16 may overflow; in 16 bits the same number is infinite already, or fits.
        if dtype == "fp32" or not math.isfinite(error[2]):
            case = Case(fraction=fraction, dtype=dtype, sinks=2, calls=((9,),), block_size=16)
            yield f"error {error} fraction {fraction} {dtype}", check_error, (case, device, *error)
    yield "exhausted chunks", check_exhaustion, (device,)


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
@pytest.mark.parametrize("part", range(PARTS))
def test_the_interpreter_stores_what_pytorch_fused_stores(part):
    # bf16 is wrong in the interpreter (it truncates); where its numbers are rounded, they are compared on a GPU.
    interpret(__file__, "", str(part))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_runs_and_tokens_are_many_on_the_long_axis_of_each_grid(dtype, monkeypatch):
    import triton

    grids = []
    monkeypatch.setattr(
        triton.runtime.jit.JITFunction,
        "run",
        lambda self, *_, grid, **__: grids.append((self.fn.__name__, grid)),
    )
    many, case = 70_000, Case(dtype={v: k for k, v in DTYPES.items()}[dtype])
    quantizer = quantizer_for(case)
    pool, _ = pool_for(case, quantizer, "cpu")
    slot = torch.zeros(many, dtype=torch.int64)
    step = types.SimpleNamespace(
        runs=torch.zeros(many, 4, dtype=torch.int32), slot_block=slot, slot_offset=slot, positions=slot
    )
    x = torch.zeros(many, case.heads, case.head_dim, dtype=dtype)
    write(quantizer, pool, step, x, x, triton=True)
    assert sum(grid[0] == many for _, grid in grids) >= 3, grids
    assert all(axis <= 65_535 for _, grid in grids for axis in grid[1:]), grids


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("function", "arguments"),
    [pytest.param(*rest, id=name) for name, *rest in all_checks("cuda", SMALL + LARGE)],
)
def test_a_gpu_stores_what_pytorch_fused_stores(function, arguments):
    function(*arguments)


def main(only="", part=None):
    """Run the small cases in the interpreter, those named alike or a part of all, and name those that fail."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "run with tests/interpreter.py"
    failed = 0
    for number, (name, function, arguments) in enumerate(all_checks("cpu", SMALL)):
        if only in name and (part is None or number % PARTS == int(part)):
            try:
                function(*arguments)
            except AssertionError as wrong:
                failed += 1
                print(f"{name}: {wrong}")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
