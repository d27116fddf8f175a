"""The quantizer of one layer against its definition, against itself one sequence at a time, and to the byte."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvquant import nuq
from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_pool import BlockPool
from kvquant.errors import NonFiniteActivations, PoolExhausted
from kvquant.fitting import CalibrationTokens
from kvquant.kernels import SPILL_ENTRIES
from kvquant.packed_kv import PackedKV
from kvquant.packing import unpack
from kvquant.ragged import cumulative_lengths
from kvquant.spec import QuantSpec


def heavy_tailed(tokens: int, heads: int, dim: int, seed: int) -> Tensor:
    """The named draw of these tests: channel spreads exp(U(0, 3)) fixed by seed 7, tails 1/sqrt(U(0.05, 1))."""
    spread = torch.rand(heads, dim, generator=torch.Generator().manual_seed(7)).mul(3).exp()
    generator = torch.Generator().manual_seed(seed)
    tails = torch.rand(tokens, heads, dim, generator=generator).clamp(min=0.05).rsqrt()
    return torch.randn(tokens, heads, dim, generator=generator) * spread * tails


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor(cumulative_lengths(lengths), dtype=torch.int32)


def codes_of(packed, kind: str, bits: int, dim: int) -> Tensor:
    """Codes [T, H, D] of one sequence, out of its blocks."""
    (row,) = packed.rows
    rows = packed.pool.tensors[f"{kind}_codes"][0, packed.pool.blocks_of(row)]  # [P, H, BS, bytes]
    flat = unpack(rows, bits, dim).transpose(1, 2).flatten(0, 1)
    return flat[: packed.lengths[0]]


class TestDefinition:
    """Codes and numbers against design and paper, spelled out here without the package."""

    @pytest.mark.parametrize("fraction", [0.0, 0.01])
    @pytest.mark.parametrize("bits", [4, 3, 2])
    def test_codes_and_numbers(self, bits: int, fraction: float) -> None:
        H, D = 2, 128
        C = H * D
        calibration = [heavy_tailed(1024, H, D, seed) for seed in (1, 2)]
        keys, values = (heavy_tailed(256, H, D, seed) for seed in (3, 4))
        quantizer = BatchedKVQuantizer.calibrate(
            QuantSpec(bits=bits, outlier_fraction=fraction), *calibration
        )
        packed = quantizer.quantize(keys, values, cu([256]), spill_headroom=4)
        keys_hat, values_hat = quantizer.dequantize(packed)

        x, sample = keys.view(-1, C), calibration[0].view(-1, C)
        lower, upper = (
            torch.quantile(sample, fraction / 2, dim=0),
            torch.quantile(sample, 1 - fraction / 2, dim=0),
        )
        outlier = (x < lower) | (x > upper) if fraction else torch.zeros_like(x, dtype=torch.bool)
        zero, scale = (upper + lower) / 2, (upper - lower) / 2
        codes, expected = self.encode(x, zero, scale, quantizer.constants.key_centroids, outlier)
        assert torch.equal(codes_of(packed, "key", bits, D).view(-1, C).long(), codes)
        assert self.relative(keys_hat.view(-1, C), x) == pytest.approx(self.relative(expected, x), rel=0.01)

        x = values.view(-1, C)
        n = int(fraction / 2 * (C - 1)) + 1 if fraction else 0
        order = x.argsort(dim=1, stable=True)
        outlier = torch.zeros_like(x, dtype=torch.bool)
        outlier.scatter_(1, torch.cat([order[:, :n], order[:, C - n :]], 1), True)
        high = x.masked_fill(outlier, -torch.inf).amax(1, keepdim=True)
        low = x.masked_fill(outlier, torch.inf).amin(1, keepdim=True)
        zero, scale = (((high + low) / 2).half().float(), ((high - low) / 2).half().float())
        codes, expected = self.encode(x, zero, scale, quantizer.constants.value_centroids, outlier)
        assert torch.equal(codes_of(packed, "value", bits, D).view(-1, C).long(), codes)
        assert self.relative(values_hat.view(-1, C), x) == pytest.approx(self.relative(expected, x), rel=0.01)

    @staticmethod
    def encode(
        x: Tensor, zero: Tensor, scale: Tensor, centroids: Tensor, outlier: Tensor
    ) -> tuple[Tensor, Tensor]:
        codes = torch.zeros_like(x, dtype=torch.int64)
        for a, b in itertools.pairwise(centroids):
            codes += x > zero + scale * ((a + b) / 2)
        codes[outlier] = 0
        return codes, torch.where(outlier, x, zero + scale * centroids[codes])

    @staticmethod
    def relative(approximation: Tensor, x: Tensor) -> float:
        return float((approximation - x).norm() / x.norm())

    @pytest.mark.parametrize("bits", [4, 3, 2])
    def test_codebook_is_as_good_as_plain_k_means(self, bits: int) -> None:
        H, D = 2, 128
        keys, values = (heavy_tailed(1024, H, D, seed) for seed in (1, 2))
        quantizer = BatchedKVQuantizer.calibrate(QuantSpec(bits=bits), keys, values)
        constants = quantizer.constants
        inlier = (keys >= constants.key_lower) & (keys <= constants.key_upper)
        x = ((keys - constants.key_zero) / constants.key_scale)[inlier].double()
        plain = torch.quantile(x[::8], (torch.arange(2**bits) + 0.5).double() / 2**bits)
        for _ in range(60):
            codes = torch.bucketize(x, (plain[1:] + plain[:-1]) / 2)
            plain = torch.bincount(codes, weights=x) / torch.bincount(codes)
        ours, theirs = (
            (x - book[torch.bucketize(x, (book[1:] + book[:-1]) / 2)]).norm()
            for book in (constants.key_centroids.double(), plain)
        )
        assert float(ours / theirs) == pytest.approx(1, abs=0.01)


def key_outliers(pool: BlockPool, block: int) -> list[tuple[int, int, float]]:
    """(head, index, value) of every key outlier of a block, along its chain of spill chunks."""
    store, found = pool.layers[0].keys, []
    base = store.outlier_index.shape[-1]
    for head in range(pool.layout.num_kv_heads):
        left, chunk = int(store.outlier_count[block, head]), int(store.spill_head[block, head])
        rows = [(store.outlier_index[block, head], store.outlier_value[block, head])]
        for _ in range(max(0, left - base + SPILL_ENTRIES - 1) // SPILL_ENTRIES):
            rows.append((store.spill_index[chunk], store.spill_value[chunk]))
            chunk = int(store.spill_next[chunk])
        index, value = (torch.cat(parts)[:left].tolist() for parts in zip(*rows, strict=True))
        found += [(head, *entry) for entry in zip(index, value, strict=True)]
    return found


def bytes_of_contents(packed: PackedKV) -> int:
    """Bytes held, the pool's own table and counters left out."""
    pool = packed.pool
    return packed.nbytes - sum(t.nbytes for t in (pool.block_table, pool.spill_top, pool.error))


def assert_stored_as_alone(
    quantizer: BatchedKVQuantizer, keys: Tensor, values: Tensor, lengths: list[int]
) -> PackedKV:
    """Quantize a batch, and each of its sequences by itself; compare all that is stored and all that is read."""
    batch = quantizer.quantize(keys, values, cu(lengths), spill_headroom=8)
    together, held = quantizer.dequantize(batch), 0
    sink_tokens = quantizer.spec.sink_tokens
    for index, (start, n) in enumerate(zip(cumulative_lengths(lengths), lengths, strict=False)):
        part = slice(start, start + n)
        alone = quantizer.quantize(keys[part], values[part], cu([n]), spill_headroom=8)
        held += bytes_of_contents(alone)
        pairs = list(
            zip(alone.pool.blocks_of(alone.rows[0]), batch.pool.blocks_of(batch.rows[index]), strict=True)
        )
        for mine, theirs in pairs:
            for name in alone.pool.layout.block_shapes():
                if name != "spill_head":
                    a, b = alone.pool.tensors[name][:, mine], batch.pool.tensors[name][:, theirs]
                    assert torch.equal(a, b), name
            assert key_outliers(alone.pool, mine) == key_outliers(batch.pool, theirs)
        for hat, one, exact in zip(together, quantizer.dequantize(alone), (keys, values), strict=True):
            assert torch.equal(hat[part], one)
            sinks = min(sink_tokens, n)
            assert torch.equal(hat[part][:sinks], exact[part][:sinks])
            assert n <= sinks or not torch.equal(hat[part][sinks:], exact[part][sinks:])
    assert bytes_of_contents(batch) == held
    return batch


@pytest.mark.parametrize("sink_tokens", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_sequence_of_a_batch_is_stored_as_it_is_alone(sink_tokens: int, dtype: torch.dtype) -> None:
    spec = QuantSpec(bits=3, outlier_fraction=0.02, sink_tokens=sink_tokens)
    quantizer = BatchedKVQuantizer.calibrate(spec, heavy_tailed(512, 2, 64, 1), heavy_tailed(512, 2, 64, 2))
    lengths = [1, 63, 64, 65, 130]
    keys, values = (heavy_tailed(sum(lengths), 2, 64, seed).to(dtype) * 1.5 for seed in (3, 4))
    batch = assert_stored_as_alone(quantizer, keys, values, lengths)
    assert batch.pool.spill_top < batch.pool.num_chunks, "the draw must reach the spill chunks"


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=5),
    bits=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    fraction=st.sampled_from([0.0, 0.01, 0.1]),
    sink_tokens=st.sampled_from([0, 1, 70]),
    groups=st.sampled_from([1, 2, 8]),
)
def test_any_batch_is_stored_as_its_sequences_are_alone(lengths, bits, fraction, sink_tokens, groups) -> None:
    spec = QuantSpec(
        key_bits=bits[0],
        value_bits=bits[1],
        outlier_fraction=fraction,
        sink_tokens=sink_tokens,
        value_groups=groups,
    )
    quantizer = BatchedKVQuantizer.calibrate(spec, heavy_tailed(128, 2, 32, 1), heavy_tailed(128, 2, 32, 2))
    keys, values = (heavy_tailed(sum(lengths), 2, 32, seed) for seed in (3, 4))
    assert_stored_as_alone(quantizer, keys, values, lengths)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_outliers_come_back_exactly(dtype: torch.dtype) -> None:
    quantizer = BatchedKVQuantizer.calibrate(
        QuantSpec(bits=2), heavy_tailed(512, 2, 64, 1), heavy_tailed(512, 2, 64, 2)
    )
    keys, values = (heavy_tailed(70, 2, 64, seed).to(dtype) for seed in (3, 4))
    # Beyond fp16's 65,504 where the type holds it.
    far = 60000.0 if dtype == torch.float16 else 3e8
    keys[5, 1, 7] = values[9, 0, 3] = far
    keys_hat, values_hat = quantizer.dequantize(quantizer.quantize(keys, values, cu([70])))
    assert keys_hat[5, 1, 7] == keys[5, 1, 7] and values_hat[9, 0, 3] == values[9, 0, 3]
    constants = quantizer.constants
    outlier = (keys.float() < constants.key_lower) | (keys.float() > constants.key_upper)
    assert outlier.sum() > 50
    assert torch.equal(keys_hat[outlier], keys[outlier])
    assert torch.equal(values_hat.view(70, -1).amax(1), values.view(70, -1).amax(1))
    assert torch.equal(values_hat.view(70, -1).amin(1), values.view(70, -1).amin(1))


def test_what_does_not_fit_sixteen_bits_is_refused() -> None:
    quantizer = BatchedKVQuantizer.calibrate(
        QuantSpec(), heavy_tailed(256, 1, 64, 1), heavy_tailed(256, 1, 64, 2)
    )
    keys, values = heavy_tailed(4, 1, 64, 3), heavy_tailed(4, 1, 64, 4)
    keys[2, 0, 11] = 1e6  # fp32 input is stored as fp16
    with pytest.raises(NonFiniteActivations, match="key.*channel 11"):
        quantizer.quantize(keys, values, cu([4]))


def test_bytes_of_a_long_sequence_are_under_three_and_a_half_bits() -> None:
    H, D, T = 8, 128, 4096
    quantizer = BatchedKVQuantizer.calibrate(
        QuantSpec(bits=3, outlier_fraction=0.01, fisher_weight="none"),
        heavy_tailed(16384, H, D, 1),
        heavy_tailed(16384, H, D, 2),
    )
    packed = quantizer.quantize(heavy_tailed(T, H, D, 3), heavy_tailed(T, H, D, 4), cu([T]), block_size=64)
    pool = packed.pool
    everything = [*pool.tensors.values(), pool.block_table, pool.spill_top, pool.error]
    total = sum(t.untyped_storage().nbytes() for t in everything)
    # Every block is in use; what is free are spill chunks: two 32-entry lines, a link and a place in the stack each.
    free = int(pool.spill_top.sum()) * (32 * 2 + 32 * 2 + 4 + 4)
    assert packed.nbytes == total - free
    assert packed.effective_bits == 8 * packed.nbytes / (2 * T * H * D)
    assert 3.3 < packed.effective_bits <= 3.50
    assert 0.009 < packed.key_outlier_fraction < 0.011


@pytest.mark.parametrize("method", ["uniform", "normal_float", "nuq"])
def test_methods_and_widths(method: str) -> None:
    keys, values = heavy_tailed(300, 2, 64, 1), heavy_tailed(300, 2, 64, 2)
    errors = []
    for bits in (2, 3, 4, 6):
        quantizer = BatchedKVQuantizer.calibrate(QuantSpec(bits=bits, method=method), keys, values)
        hat = quantizer.dequantize(quantizer.quantize(keys, values, cu([300])))
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(hat, (keys, values), strict=True)])
    assert errors == sorted(errors, reverse=True)
    mixed = BatchedKVQuantizer.calibrate(QuantSpec(key_bits=4, value_bits=2, method=method), keys, values)
    hat = mixed.dequantize(mixed.quantize(keys, values, cu([300])))
    assert float((hat[0] - keys).norm() / keys.norm()) == pytest.approx(errors[2][0])
    assert float((hat[1] - values).norm() / values.norm()) == pytest.approx(errors[0][1])


def test_keys_and_values_take_their_own_bytes() -> None:
    keys, values = heavy_tailed(64, 2, 64, 1), heavy_tailed(64, 2, 64, 2)
    quantizer = BatchedKVQuantizer.calibrate(QuantSpec(bits=8, key_bits=3, value_bits=5), keys, values)
    pool = quantizer.quantize(keys, values, cu([64])).pool
    assert pool.tensors["key_codes"].nbytes == 64 * 2 * 64 * 3 // 8
    assert pool.tensors["value_codes"].nbytes == 64 * 2 * 64 * 5 // 8


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_uniform_codes_are_rounded_to_the_nearest_step(bits: int) -> None:
    keys, values = heavy_tailed(100, 2, 64, 1), heavy_tailed(100, 2, 64, 2)
    spec = QuantSpec(bits=bits, method="uniform", outlier_fraction=0.0)
    quantizer = BatchedKVQuantizer.calibrate(spec, keys, values)
    packed = quantizer.quantize(keys, values, cu([100]))
    lower, upper, steps = keys.amin(0), keys.amax(0), 2**bits - 1
    codes = ((keys - lower) / (upper - lower) * steps).round()
    assert torch.equal(codes_of(packed, "key", bits, 64).float(), codes)
    hat, _ = quantizer.dequantize(packed)
    torch.testing.assert_close(hat, lower + codes / steps * (upper - lower), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
def test_normal_float_uses_its_codebook_for_both(bits: int) -> None:
    keys, values = heavy_tailed(64, 2, 64, 1), heavy_tailed(64, 2, 64, 2)
    quantizer = BatchedKVQuantizer.calibrate(QuantSpec(bits=bits, method="normal_float"), keys, values)
    for centroids in (quantizer.constants.key_centroids, quantizer.constants.value_centroids):
        assert torch.equal(centroids, nuq.normal_float_codebook(bits))


def test_a_fitted_codebook_beats_the_fixed_ones_and_fisher_weights_move_it() -> None:
    keys, values = heavy_tailed(512, 2, 64, 1), heavy_tailed(512, 2, 64, 2)

    def normalized_error(**spec) -> float:
        quantizer = BatchedKVQuantizer.calibrate(QuantSpec(bits=2, **spec), keys, values)
        hat, _ = quantizer.dequantize(quantizer.quantize(keys, values, cu([512])))
        return float(((hat - keys) / quantizer.constants.key_scale).square().mean())

    fitted = normalized_error(fisher_weight="none")
    assert fitted < normalized_error(method="uniform") and fitted < normalized_error(method="normal_float")


class TestCalibration:
    """Which tokens and which weights thresholds and codebooks come from."""

    keys, values = heavy_tailed(512, 2, 64, 1), heavy_tailed(512, 2, 64, 2)

    def centroids(self, spec: QuantSpec, **fisher: Tensor) -> list[Tensor]:
        constants = BatchedKVQuantizer.calibrate(spec, self.keys, self.values, **fisher).constants
        return [constants.key_centroids, constants.value_centroids]

    @pytest.mark.parametrize("side", [0, 1], ids=["key", "value"])
    def test_fisher_moves_its_own_codebook_only(self, side: int) -> None:
        spec, name = QuantSpec(bits=2), ("key_fisher", "value_fisher")[side]
        weight = (self.keys, self.values)[side].square()
        plain, weighted = self.centroids(spec), self.centroids(spec, **{name: weight})
        assert not torch.equal(weighted[side], plain[side])
        assert torch.equal(weighted[1 - side], plain[1 - side])
        unweighted = self.centroids(QuantSpec(bits=2, fisher_weight="none"), **{name: weight})
        assert torch.equal(unweighted[side], plain[side])

    def test_fisher_scale2_is_fisher_times_the_squared_scale(self) -> None:
        weight = torch.rand(512, 2, 64, generator=torch.Generator().manual_seed(5))
        spec = QuantSpec(bits=3, outlier_fraction=0.0)
        scales = (
            BatchedKVQuantizer.calibrate(spec, self.keys, self.values).constants.key_scale,
            (self.values.flatten(1).amax(1) - self.values.flatten(1).amin(1))[:, None, None] / 2,
        )
        by_hand = self.centroids(
            spec, key_fisher=weight * scales[0] ** 2, value_fisher=weight * scales[1] ** 2
        )
        spec = QuantSpec(bits=3, outlier_fraction=0.0, fisher_weight="fisher_scale2")
        ours = self.centroids(spec, key_fisher=weight, value_fisher=weight)
        for a, b in zip(ours, by_hand, strict=True):
            torch.testing.assert_close(a, b)
        assert not torch.equal(ours[0], self.centroids(QuantSpec(bits=3, outlier_fraction=0.0))[0])

    def test_sink_tokens_are_left_out(self) -> None:
        positions = torch.cat([torch.arange(300), torch.arange(212)])
        first = positions < 4
        spec = QuantSpec(bits=2, sink_tokens=4)
        weight = self.keys.square()
        # Sinks so large that they would move every threshold.
        spoilt = (
            torch.where(first[:, None, None], 1e4, self.keys),
            torch.where(first[:, None, None], -1e4, self.values),
        )
        ours = BatchedKVQuantizer.calibrate(
            spec, *spoilt, key_fisher=weight, value_fisher=weight, positions=positions
        )
        without = BatchedKVQuantizer.calibrate(
            spec,
            self.keys[~first],
            self.values[~first],
            key_fisher=weight[~first],
            value_fisher=weight[~first],
        )
        for name, a, b in zip(ours.constants._fields, ours.constants, without.constants, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("method", ["nuq", "uniform"])
def test_qnorm_keeps_mean_and_deviation_of_inliers(side: str, method: str) -> None:
    # One-sided channels: without the correction, two-bit centroids lose some of the spread.
    keys, values = heavy_tailed(2048, 2, 64, 1).abs(), heavy_tailed(2048, 2, 64, 2).abs()

    def normalized_inliers(x: Tensor, hat: Tensor, quantizer: BatchedKVQuantizer) -> tuple[Tensor, Tensor]:
        if side == "keys":
            c = quantizer.constants
            inlier = (x >= c.key_lower) & (x <= c.key_upper)
            return tuple(((part - c.key_zero) / c.key_scale)[inlier] for part in (x, hat))
        x, hat = x.view(2048, -1), hat.view(2048, -1)
        n = nuq.value_outlier_count(0.01, 128)
        inlier = torch.ones_like(x, dtype=torch.bool)
        inlier.scatter_(1, nuq.split_value_outliers(x, n)[0].long(), False)
        high = x.masked_fill(~inlier, -torch.inf).amax(1, keepdim=True)
        low = x.masked_fill(~inlier, torch.inf).amin(1, keepdim=True)
        return tuple(((part - (high + low) / 2) / ((high - low) / 2))[inlier] for part in (x, hat))

    def moments(qnorm: bool) -> tuple[Tensor, Tensor]:
        spec = QuantSpec(bits=2, method=method, qnorm=qnorm, fisher_weight="none")
        quantizer = BatchedKVQuantizer.calibrate(spec, keys, values)
        hats = quantizer.dequantize(quantizer.quantize(keys, values, cu([2048])))
        x, hat = (keys, hats[0]) if side == "keys" else (values, hats[1])
        before, after = normalized_inliers(x, hat, quantizer)
        return (after.mean() - before.mean()).abs(), (after.std() / before.std() - 1).abs()

    corrected, plain = moments(True), moments(False)
    # Zero and scale of values are rounded to fp16, which moves a few of their codes.
    tolerance = 1e-3 if side == "keys" else 2e-3
    assert corrected[0] < tolerance and corrected[1] < tolerance
    assert plain[1] > 10 * corrected[1]


def test_exact_storage_round_trips() -> None:
    keys, values = (heavy_tailed(130, 2, 64, seed).bfloat16() for seed in (1, 2))
    quantizer = BatchedKVQuantizer.exact(2, 64)
    packed = quantizer.quantize(keys, values, cu([1, 129]))
    assert all(torch.equal(a, b) for a, b in zip(quantizer.dequantize(packed), (keys, values), strict=True))
    assert packed.key_outlier_fraction == 0


def test_refusals_say_what_to_do() -> None:
    keys, values = heavy_tailed(64, 2, 64, 1), heavy_tailed(64, 2, 64, 2)
    quantizer = BatchedKVQuantizer.calibrate(QuantSpec(), keys, values)
    with pytest.raises(ValueError, match=r"\[T, 2, 64\]"):
        quantizer.quantize(keys[:, :1], values[:, :1], cu([64]))
    with pytest.raises(ValueError, match="at least 1 token, got 0 at index 1"):
        quantizer.quantize(keys, values, cu([40, 0, 24]))
    with pytest.raises(ValueError, match="multiple of 8, got 60"):
        quantizer.quantize(keys, values, cu([64]), block_size=60)
    with pytest.raises(PoolExhausted, match=r"spill_headroom"):
        quantizer.quantize(keys.repeat(20, 1, 1) * 50, values.repeat(20, 1, 1), cu([1280]), spill_headroom=1)
    with pytest.raises(ValueError, match="value_groups must divide the layer's 128"):
        BatchedKVQuantizer.calibrate(QuantSpec(value_groups=3), keys, values).quantize(keys, values, cu([64]))
    with pytest.raises(ValueError, match="needs calibrated constants"):
        BatchedKVQuantizer(QuantSpec(), 2, 64, None)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the batch's 64 tokens"):
        quantizer.quantize(keys, values, cu([40, 23]))
    with pytest.raises(
        ValueError, match=r"keys and values must have one shape, got \[64, 2, 64\] and \[63, 2, 64\]"
    ):
        BatchedKVQuantizer.calibrate(QuantSpec(), keys, values[1:])
    keys[3, 1, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in channel 69"):
        BatchedKVQuantizer.calibrate(QuantSpec(), keys, values)


def test_widths_of_one_layer_share_what_is_counted(monkeypatch) -> None:
    """The same constants as fitted alone, and no second pass over the tokens; tokens that were changed count anew."""
    keys, values = torch.randn(2, 300, 2, 64, generator=torch.Generator().manual_seed(0))
    alone = [BatchedKVQuantizer.calibrate(QuantSpec(bits, qnorm=True), keys, values) for bits in (2, 4)]
    counted = []
    for name in ("key_histogram", "value_histogram", "channel_thresholds"):
        count = getattr(nuq, name)
        monkeypatch.setattr(
            nuq, name, lambda *a, count=count, name=name, **k: counted.append(name) or count(*a, **k)
        )
    tokens = CalibrationTokens(keys, values)
    for bits, one in zip((2, 4), alone, strict=True):
        together = one.fit(QuantSpec(bits, qnorm=True), tokens)
        assert all(map(torch.equal, together.constants, one.constants))
    assert sorted(counted) == ["channel_thresholds", "key_histogram", "value_histogram"]
    shifted = one.fit(QuantSpec(4, qnorm=True), dataclasses.replace(tokens, keys=keys + 1))
    assert not torch.equal(shifted.constants.key_zero, one.constants.key_zero)
