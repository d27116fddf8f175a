"""Compiled loops against the PyTorch they stand in for: all that is stored is equal, bit for bit, on any thread."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import torch

from kvquant import codebooks, compiled, nuq
from kvquant.errors import NonFiniteActivations, PoolExhausted
from kvquant.kernels import get_backend
from kvquant.one_thread import one_thread
from kvquant.spec import QuantSpec
from test_kernels import (
    append,
    assert_same_pools,
    calibrated,
    heavy_tailed,
    pool_for,
    relative_rms,
    rope_tables,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def plain(monkeypatch):
    """A switch: from its call on there is no numba."""
    return lambda: monkeypatch.setattr(compiled, "has_numba", lambda: False)


@pytest.fixture
def many_threads(monkeypatch):
    """Rows are shared out among three threads, however few they are."""
    monkeypatch.setattr(compiled, "_ELEMENTS_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def stored_twice(plain, spec, lengths, *, dtype, heads=2, head_dim=64, spread=1.0, pieces=1, headroom=4.0):
    """The same calls with and without compiled loops; both pools."""
    quantizer = calibrated(spec, head_dim, heads=heads, dtype=dtype)
    pools = []
    for switch in (lambda: None, plain):
        switch()
        pool = pool_for(quantizer, num_blocks=24, dtype=dtype, headroom=headroom)
        rows = [pool.add_sequence() for _ in lengths]
        for piece in range(pieces):
            keys, values = (
                heavy_tailed(sum(lengths), head_dim, 10 * piece + seed, heads=heads, spread=spread).to(dtype)
                for seed in (3, 4)
            )
            append(quantizer, pool, rows, lengths, keys, values, "pytorch_fused")
        pools.append(pool)
    return pools


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_ragged_batches_are_stored_equally(plain, bits, dtype):
    spec = QuantSpec(bits=bits, outlier_fraction=0.01, sink_tokens=2)
    assert_same_pools(*stored_twice(plain, spec, [1, 63, 65, 130], dtype=DTYPES[dtype]))


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 48), (3, 80), (8, 96), (2, 256), (5, 20)])
def test_any_number_of_heads_and_channels(plain, heads, head_dim):
    """80 channels at 3 bits and 20 at any do not make whole integers of eight bytes."""
    spec = QuantSpec(key_bits=3, value_bits=4, bits=4, outlier_fraction=0.02)
    assert_same_pools(
        *stored_twice(plain, spec, [7, 70], dtype=torch.bfloat16, heads=heads, head_dim=head_dim)
    )


@pytest.mark.parametrize("fraction", [0.0, 0.05])
def test_groups_of_values_and_no_outliers(plain, fraction):
    spec = QuantSpec(bits=4, outlier_fraction=fraction, value_groups=2)
    assert_same_pools(*stored_twice(plain, spec, [33, 64], dtype=torch.float16))


def test_chains_grow_over_several_calls(plain):
    """Activations six times as wide as calibration's: most keys are outliers and chains take several chunks."""
    spec = QuantSpec(bits=3, outlier_fraction=0.01)
    pools = stored_twice(plain, spec, [5, 30, 41], dtype=torch.bfloat16, spread=6.0, pieces=4, headroom=80.0)
    counts = pools[0].tensors["key_outlier_count"]
    assert int(counts.max()) > pools[0].layout.key_outlier_base + 2 * 32
    assert_same_pools(*pools)


def test_chains_grow_token_by_token(plain):
    """Some of the calls find a chain whose last chunk is just full."""
    spec = QuantSpec(bits=3, outlier_fraction=0.01)
    assert_same_pools(
        *stored_twice(plain, spec, [1, 1, 1], dtype=torch.bfloat16, spread=6.0, pieces=50, headroom=80.0)
    )


def test_running_out_of_chunks_counts_nothing(plain):
    for switch in (lambda: None, plain):
        switch()
        quantizer = calibrated(QuantSpec(bits=3, outlier_fraction=0.01), 64, dtype=torch.bfloat16)
        pool = pool_for(quantizer, num_blocks=48, dtype=torch.bfloat16, headroom=1.0)
        row = pool.add_sequence()
        x = heavy_tailed(3000, 64, 1, spread=50.0).bfloat16()
        step = pool.reserve([row], [3000])
        top = pool.spill_top.clone()
        quantizer.write(x, x, pool.layers[0], step, backend="pytorch_fused")
        assert torch.equal(pool.spill_top, top)
        assert not pool.tensors["key_outlier_count"].any()
        with pytest.raises(PoolExhausted):
            pool.commit()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_and_hurts_no_neighbour(plain, bad):
    pools = []
    for switch in (lambda: None, plain):
        switch()
        quantizer = calibrated(QuantSpec(bits=4, outlier_fraction=0.01), 64, dtype=torch.bfloat16)
        pool = pool_for(quantizer, dtype=torch.bfloat16)
        row = pool.add_sequence()
        keys, values = (heavy_tailed(9, 64, seed).bfloat16() for seed in (5, 6))
        keys[4, 1, 7] = bad
        step = pool.reserve([row], [9])
        quantizer.write(keys, values, pool.layers[0], step, backend="pytorch_fused")
        pools.append({name: pool.tensors[name].clone() for name in ("key_codes", "value_codes")})
        with pytest.raises(NonFiniteActivations, match="71"):
            pool.commit()
    others = [slot for slot in range(9) if slot != 4]
    for name, tensor in pools[0].items():
        assert torch.equal(tensor[..., others, :], pools[1][name][..., others, :]), name


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize(("heads", "head_dim", "groups"), [(1, 128, 1), (3, 80, 4), (8, 64, 2), (5, 20, 7)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_decode_attention_reads_what_pytorch_reads(plain, bits, heads, head_dim, groups):
    """Ragged histories with chains, sinks, two value groups, open and closed blocks, part of a head rotated."""
    spec = QuantSpec(bits=bits, outlier_fraction=0.02, sink_tokens=3, value_groups=2)
    quantizer = calibrated(spec, head_dim, heads=heads, dtype=torch.bfloat16)
    pool = pool_for(quantizer, block_size=32, num_blocks=16, dtype=torch.bfloat16, headroom=30.0)
    rows = [pool.add_sequence() for _ in range(3)]
    past = [1, 32, 201]
    for lengths, seed in ((past, 1), ([1, 1, 1], 7)):
        x = [
            heavy_tailed(sum(lengths), head_dim, seed + i, heads=heads, spread=2.0).bfloat16() for i in (0, 1)
        ]
        step = append(quantizer, pool, rows, lengths, *x, "pytorch_fused")
    assert int(pool.tensors["key_outlier_count"].max()) > pool.layout.key_outlier_base
    store = pool.layers[0]
    query = torch.randn(3, heads * groups, head_dim, generator=torch.Generator().manual_seed(3)).bfloat16()

    def attend(**settings):
        sinks = (store.sink_keys[step.rows], store.sink_values[step.rows])
        return get_backend("pytorch_fused").attend(
            query.float(),
            step,
            quantizer.reader(store, backend="pytorch_fused"),
            rope_tables(64, 4, head_dim // 4 * 2),
            None,
            sinks,
            block_size=32,
            blocks_per_tile=2,
            softmax_scale=head_dim**-0.5 / 4,
            **settings,
        )

    cases: list[dict] = [{}, {"window": 40}, {"softcap": 2.0}]
    ours = [attend(**settings) for settings in cases]
    plain()
    for settings, found in zip(cases, ours, strict=True):
        assert relative_rms(found, attend(**settings)) < 1e-5, settings


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [1, 2, 5, 10_000])
@pytest.mark.parametrize(("channels", "n"), [(7, 1), (64, 5), (97, 3), (1024, 6)])
def test_ties_are_split_equally(plain, dtype, levels, channels, n):
    generator = torch.Generator().manual_seed(levels)
    x = torch.randint(-levels, levels, (37, channels), generator=generator).to(DTYPES[dtype])
    x[::3] *= -0.0  # all zeros, of both signs
    ours = nuq.split_value_outliers(x, n)
    plain()
    for a, b in zip(ours, nuq.split_value_outliers(x, n), strict=True):
        assert torch.equal(a, b)
        assert not torch.signbit(ours[1][ours[1] == 0]).any()


def test_kept_machine_code_belongs_to_the_sources_of_all_loops(monkeypatch):
    from kvquant.compiled import disk_cache
    from kvquant.compiled.select_loops import sort_few

    sort_few(np.zeros(3, np.int64))
    (signature, *_), target = sort_few.signatures, sort_few.targetdescr.target_context
    assert isinstance(sort_few._cache, disk_cache.SharedCache)
    assert sort_few._cache.load_overload(signature, target) is not None
    monkeypatch.setattr(disk_cache, "_SOURCES", "others")
    assert sort_few._cache.load_overload(signature, target) is None


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch):
    from kvquant.compiled import disk_cache
    from kvquant.compiled.select_loops import sort_few

    def full(*args):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(disk_cache.fcntl, "flock", full)
    keys = np.array([3, 1, 2], np.int32)  # a type that nothing else sorts
    sort_few(keys)
    assert keys.tolist() == [1, 2, 3]


@pytest.mark.parametrize("count", [0, 1, 2, 30, 49, 50, 149, 151, 4096])
def test_any_number_is_sorted(count):
    from kvquant.compiled.select_loops import sort_few

    keys = np.random.default_rng(count).integers(-(1 << 40), 1 << 40, count)
    expected = np.sort(keys)
    sort_few(keys)
    assert np.array_equal(keys, expected)


def test_ranges_of_rows_cover_all_once(many_threads):
    with one_thread():  # what PyTorch's own operations run under
        found = compiled.in_parts(10, 10, lambda first, last: (first, last))
    assert found == [(0, 3), (3, 6), (6, 10)]
    assert compiled.in_parts(2, 2, lambda first, last: last - first) == [1, 1]


def test_little_work_stays_on_its_thread():
    assert compiled.in_parts(5, 5, lambda first, last: (first, last)) == [(0, 5)]


def test_an_error_in_another_thread_is_raised(many_threads):
    def work(first, last):
        if first:
            raise ValueError(f"row {first}")

    with pytest.raises(ValueError, match="row"):
        compiled.in_parts(9, 9, work)


def test_bits_are_seen_as_integers_in_the_order_of_the_floats():
    x = torch.tensor([-float("inf"), -2.5, -1e-30, -0.0, 0.0, 1e-30, 2.5, float("inf")])
    assert compiled.ordered_bounds(x).tolist() == sorted(compiled.ordered_bounds(x).tolist())
    assert compiled.ordered_bounds(x)[3] == compiled.ordered_bounds(x)[4] == 0
    assert compiled.raw(x).dtype == np.int32
    assert compiled.raw(x.half()).dtype == np.int16


def test_without_numba_pytorch_says_so_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled.has_numba.cache_clear()
    with caplog.at_level(logging.WARNING, "kvquant.compiled"):
        assert not any(compiled.can_compile(torch.zeros(3)) for _ in range(3))
    compiled.has_numba.cache_clear()
    assert [record.getMessage().startswith("numba cannot be used") for record in caplog.records] == [True]


def test_other_elements_take_pytorch():
    assert compiled.can_compile(torch.zeros(2, dtype=torch.bfloat16))
    assert not compiled.can_compile(torch.zeros(2, dtype=torch.float64))
    assert not compiled.can_compile(torch.zeros(2, device="meta"))


@pytest.mark.parametrize("kind", ["random", "equally heavy", "with gaps"])
def test_the_best_clusters_are_the_same(plain, kind: str) -> None:
    rng = np.random.default_rng(1)
    weight = np.ones(700) if kind == "equally heavy" else rng.random(700) ** 4 + 1e-9
    points = np.linspace(-1, 1, 700) if kind == "equally heavy" else np.sort(rng.normal(size=700))
    if kind == "with gaps":
        points = points.round(1)
    starts = codebooks._optimal_cluster_starts(weight, weight * points, 64)
    plain()
    assert np.array_equal(starts, codebooks._optimal_cluster_starts(weight, weight * points, 64))
