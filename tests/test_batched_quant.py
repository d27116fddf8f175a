"""The quantizer of one layer against its definition, against itself one sequence at a time, and to the byte."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.errors import NonFiniteActivations, PoolExhausted
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


@pytest.mark.parametrize("sink_tokens", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_sequence_of_a_batch_is_stored_as_it_is_alone(sink_tokens: int, dtype: torch.dtype) -> None:
    spec = QuantSpec(bits=3, outlier_fraction=0.02, sink_tokens=sink_tokens)
    quantizer = BatchedKVQuantizer.calibrate(spec, heavy_tailed(512, 2, 64, 1), heavy_tailed(512, 2, 64, 2))
    lengths = [1, 63, 64, 65, 130]
    keys, values = (heavy_tailed(sum(lengths), 2, 64, seed).to(dtype) for seed in (3, 4))
    batch = quantizer.quantize(keys, values, cu(lengths))
    together = quantizer.dequantize(batch)
    for index, (start, n) in enumerate(zip(cumulative_lengths(lengths), lengths, strict=False)):
        part = slice(start, start + n)
        alone = quantizer.quantize(keys[part], values[part], cu([n]))
        for name, tensor in alone.pool.tensors.items():
            if not name.startswith(("spill", "sink")):
                mine = tensor[:, alone.pool.blocks_of(alone.rows[0])]
                theirs = batch.pool.tensors[name][:, batch.pool.blocks_of(batch.rows[index])]
                assert torch.equal(mine, theirs), name
        for hat, one, exact in zip(together, quantizer.dequantize(alone), (keys, values), strict=True):
            assert torch.equal(hat[part], one)
            sinks = min(sink_tokens, n)
            assert torch.equal(hat[part][:sinks], exact[part][:sinks])
            assert n <= sinks or not torch.equal(hat[part][sinks:], exact[part][sinks:])


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


def test_a_fitted_codebook_beats_the_fixed_ones_and_fisher_weights_move_it() -> None:
    keys, values = heavy_tailed(512, 2, 64, 1), heavy_tailed(512, 2, 64, 2)

    def normalized_error(**spec) -> float:
        quantizer = BatchedKVQuantizer.calibrate(QuantSpec(bits=2, **spec), keys, values)
        hat, _ = quantizer.dequantize(quantizer.quantize(keys, values, cu([512])))
        return float(((hat - keys) / quantizer.constants.key_scale).square().mean())

    fitted = normalized_error(fisher_weight="none")
    assert fitted < normalized_error(method="uniform") and fitted < normalized_error(method="normal_float")
    weights = torch.rand(512, 2, 64, generator=torch.Generator().manual_seed(5)).pow(8)
    weighted = BatchedKVQuantizer.calibrate(QuantSpec(bits=2), keys, values, key_fisher=weights * keys.abs())
    plain = BatchedKVQuantizer.calibrate(QuantSpec(bits=2), keys, values)
    assert not torch.equal(weighted.constants.key_centroids, plain.constants.key_centroids)


def test_qnorm_keeps_mean_and_deviation_of_inliers() -> None:
    # One-sided channels: without the correction, two-bit centroids lose some of the spread.
    keys = heavy_tailed(2048, 2, 64, 1).abs()
    values = heavy_tailed(2048, 2, 64, 2)

    def moments(qnorm: bool) -> tuple[Tensor, Tensor]:
        quantizer = BatchedKVQuantizer.calibrate(
            QuantSpec(bits=2, qnorm=qnorm, fisher_weight="none"), keys, values
        )
        hat, _ = quantizer.dequantize(quantizer.quantize(keys, values, cu([2048])))
        c = quantizer.constants
        inlier = (keys >= c.key_lower) & (keys <= c.key_upper)
        before, after = (((x - c.key_zero) / c.key_scale)[inlier] for x in (keys, hat))
        return (after.mean() - before.mean()).abs(), (after.std() / before.std() - 1).abs()

    corrected, plain = moments(True), moments(False)
    assert corrected[0] < 1e-3 and corrected[1] < 1e-3
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
