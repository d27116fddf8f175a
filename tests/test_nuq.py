import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant import encoding, nuq, value_outliers

seeds = st.integers(0, 1 << 30)


def heavy_tailed(num_tokens, num_channels, seed):
    """Student-t with 4 degrees of freedom, channels of very different scale and centre (as pre-RoPE keys are)."""
    rng = np.random.default_rng(seed)
    scale, centre = np.exp(rng.normal(size=num_channels)), rng.normal(size=num_channels)
    return torch.from_numpy(rng.standard_t(4, size=(num_tokens, num_channels)) * scale + centre).float()


def histogram_of(x, weight=None, num_bins=4096):
    histogram = nuq.WeightedHistogram(num_bins)
    histogram.add(x, weight)
    return histogram


# -- codebooks --


def split_cost(points, weight, starts):
    ends = [*starts[1:], len(points)]
    cost = 0.0
    for start, end in zip(starts, ends, strict=True):
        p, w = points[start:end], weight[start:end]
        cost += float((w * (p - (w * p).sum() / w.sum()) ** 2).sum())
    return cost


def codebook_cost(points, weight, codebook):
    return float((weight * ((points[:, None] - codebook.double().numpy()) ** 2).min(axis=1)).sum())


@settings(max_examples=60, deadline=None)
@given(seed=seeds, num_points=st.integers(1, 10), bits=st.sampled_from([1, 2]))
def test_fit_is_optimal_against_brute_force(seed, num_points, bits):
    rng = np.random.default_rng(seed)
    points = np.sort(rng.uniform(-1, 1, num_points))
    weight = rng.exponential(size=num_points) ** 3
    histogram = histogram_of(torch.from_numpy(points), torch.from_numpy(weight), num_bins=1 << 20)
    codebook = nuq.fit_codebook(histogram, bits)
    num_clusters = min(2**bits, num_points)
    best = min(
        split_cost(points, weight, (0, *inner))
        for inner in itertools.combinations(range(1, num_points), num_clusters - 1)
    )
    assert codebook_cost(points, weight, codebook) <= best * (1 + 1e-5) + 1e-9 * weight.sum()


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("shape", ["uniform", "spiky", "gapped"])
def test_fit_is_optimal_against_plain_dynamic_programming(bits, shape):
    rng = np.random.default_rng(7)
    points = (
        np.sort(rng.uniform(-1, 1, 150)) if shape == "uniform" else np.sort(rng.choice([-0.9, 0.1, 0.8], 150))
    )
    points = np.sort(np.clip(points + (0 if shape == "uniform" else rng.normal(size=150) * 0.03), -1, 1))
    weight = np.exp(rng.normal(size=150) * (4 if shape == "spiky" else 0.5))
    codebook = nuq.fit_codebook(
        histogram_of(torch.from_numpy(points), torch.from_numpy(weight), num_bins=1 << 20), bits
    )

    cost = np.zeros((151, 151))  # of one cluster holding points start..end-1
    for start in range(150):
        w, p = weight[start:], points[start:]
        total, first, second = np.cumsum(w), np.cumsum(w * p), np.cumsum(w * p * p)
        cost[start, start + 1 :] = second - first**2 / total
    best = np.full(151, np.inf)
    best[0] = 0
    for _ in range(2**bits):
        best = np.array([np.inf] + [(best[:end] + cost[:end, end]).min() for end in range(1, 151)])
    assert codebook_cost(points, weight, codebook) == pytest.approx(best[150], rel=1e-4, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, num_points=st.integers(0, 300), bits=st.integers(1, 8))
def test_codebook_is_always_ascending_finite_and_in_range(seed, num_points, bits):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-20, 21, (num_points,), generator=generator) / 20
    codebook = nuq.fit_codebook(histogram_of(x), bits)
    assert codebook.shape == (2**bits,) and codebook.dtype == torch.float32
    assert bool(codebook.isfinite().all()) and bool((codebook.diff() >= 0).all())
    assert codebook.abs().max() <= 1
    if len(x.unique()) <= 2**bits:
        assert torch.isin(x.unique(), codebook).all()


def test_fit_with_zero_weights_counts_them_as_equal():
    x = torch.linspace(-1, 0.5, 1000)
    assert torch.equal(
        nuq.fit_codebook(histogram_of(x, torch.zeros(1000)), 3), nuq.fit_codebook(histogram_of(x), 3)
    )


def test_fit_survives_tiny_and_uneven_weights():
    x = torch.linspace(-1, 1, 4001)
    for weight in (torch.full((4001,), 1e-30), torch.logspace(-30, 0, 4001), torch.logspace(0, -30, 4001)):
        codebook = nuq.fit_codebook(histogram_of(x, weight), 4)
        assert bool(codebook.isfinite().all()) and bool((codebook.diff() > 0).all())


@settings(max_examples=20, deadline=None)
@given(seed=seeds, cut=st.integers(0, 500))
def test_histograms_of_parts_merge_to_that_of_the_whole(seed, cut):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.rand(500, generator=generator) * 2.2 - 1.1, torch.rand(500, generator=generator)
    whole, left = histogram_of(x, weight), histogram_of(x[:cut], weight[:cut])
    left.merge(histogram_of(x[cut:], weight[cut:]))
    for name in ("weight", "weighted_sum", "count", "count_sum", "sum_of_squares"):
        np.testing.assert_allclose(getattr(left, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert whole.count.sum() == 500
    assert whole.weighted_sum.sum() == pytest.approx(float((x.double() * weight.double()).sum()))


def test_histogram_is_the_same_whatever_the_chunk(monkeypatch):
    x, weight, keep = torch.rand(40, 30) * 2 - 1, torch.rand(40, 1), torch.rand(40, 30) < 0.8
    whole, chunked = nuq.WeightedHistogram(), nuq.WeightedHistogram()
    whole.add(x, weight, keep)
    monkeypatch.setattr(nuq, "_CHUNK_ELEMENTS", 7)
    chunked.add(x, weight, keep)
    assert whole.count.sum() == int(keep.sum())
    np.testing.assert_allclose(chunked.weighted_sum, whole.weighted_sum, rtol=1e-12, atol=1e-15)


def test_histogram_refuses_what_cannot_be_counted():
    with pytest.raises(ValueError, match="x must be finite"):
        nuq.WeightedHistogram().add(torch.tensor([0.0, math.nan]))
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight must be finite and not negative"):
            nuq.WeightedHistogram().add(torch.zeros(2), torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="equally many bins, got 4096 and 8"):
        nuq.WeightedHistogram().merge(nuq.WeightedHistogram(8))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("make", [nuq.uniform_codebook, nuq.normal_float_codebook])
def test_fixed_codebooks_ascend_from_minus_one_to_one(make, bits):
    codebook = make(bits)
    assert codebook.shape == (2**bits,) and codebook.dtype == torch.float32
    assert codebook[0] == -1 and codebook[-1] == 1 and bool((codebook.diff() > 0).all())


def test_normal_float_at_4_bits_is_qloras_table():
    # bitsandbytes' NF4 constants, of which QLoRA's appendix E prints the same.
    nf4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    nf4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    torch.testing.assert_close(nuq.normal_float_codebook(4), torch.tensor(nf4), atol=2e-5, rtol=0)


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_bits_outside_1_to_8_are_refused(bits):
    for call in (
        nuq.uniform_codebook,
        nuq.normal_float_codebook,
        lambda b: nuq.fit_codebook(histogram_of(torch.ones(3)), b),
    ):
        with pytest.raises(ValueError, match="bits must be an integer from 1 to 8"):
            call(bits)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_qnorm_keeps_mean_and_standard_deviation(bits):
    x = (heavy_tailed(2000, 1, 3).flatten() / 30).clamp(-1, 1)
    histogram = histogram_of(x, torch.rand(2000, generator=torch.Generator().manual_seed(4)))
    codebook = nuq.fit_codebook(histogram, bits)
    gain, offset = nuq.qnorm_affine(histogram, codebook)
    zero, one = torch.zeros(1), torch.ones(1)
    decoded = nuq.decode(
        nuq.encode(x, zero, one, nuq.midpoints(codebook)), zero, one, codebook * gain + offset
    )
    # A bin that straddles a boundary is counted on one side: a 4096th of the range.
    assert float(decoded.mean()) == pytest.approx(float(x.mean()), abs=2e-4)
    assert float(decoded.std(correction=0)) == pytest.approx(float(x.std(correction=0)), rel=5e-3)


def test_qnorm_of_nothing_or_one_point_stays_finite():
    codebook = nuq.uniform_codebook(2)
    assert nuq.qnorm_affine(nuq.WeightedHistogram(), codebook) == (1.0, 0.0)
    gain, offset = nuq.qnorm_affine(histogram_of(torch.full((5,), 0.5)), codebook)
    assert gain == 1 and float(codebook[2]) * gain + offset == pytest.approx(0.5)


# -- ranges and outliers --


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    num_tokens=st.integers(1, 300),
    num_channels=st.integers(1, 5),
    fraction=st.sampled_from([0.0, 0.01, 0.02, 0.1, 0.5, 0.99]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_thresholds_equal_torch_quantile(seed, num_tokens, num_channels, fraction, dtype):
    x = heavy_tailed(num_tokens, num_channels, seed).to(dtype)
    lower, upper = nuq.channel_thresholds(x, fraction)
    q = torch.tensor([fraction / 2, 1 - fraction / 2], dtype=torch.float64)
    expected = x.double().quantile(q, dim=0).float()
    torch.testing.assert_close(torch.stack([lower, upper]), expected, rtol=1e-6, atol=1e-7)


def test_thresholds_are_the_same_whatever_the_chunk(monkeypatch):
    x = heavy_tailed(50, 9, 0)
    whole = nuq.channel_thresholds(x, 0.1)
    monkeypatch.setattr(nuq, "_CHUNK_ELEMENTS", 25)  # two channels at a time
    chunked = nuq.channel_thresholds(x, 0.1)
    assert torch.equal(whole[0], chunked[0]) and torch.equal(whole[1], chunked[1])


def test_thresholds_refuse_bad_input():
    x = torch.zeros(4, 3)
    x[2, 1] = math.inf
    with pytest.raises(ValueError, match="NaN or infinity in channel 1"):
        nuq.channel_thresholds(x, 0.01)
    with pytest.raises(ValueError, match="at least one token"):
        nuq.channel_thresholds(torch.zeros(0, 3), 0.01)
    for fraction in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="outlier_fraction must be at least 0 and below 1"):
            nuq.channel_thresholds(torch.zeros(4, 3), fraction)


def test_value_outlier_count():
    assert nuq.value_outlier_count(0.01, 4096) == 21  # as KVQuant's quantile rule
    assert nuq.value_outlier_count(0, 4096) == 0
    assert nuq.value_outlier_count(0.01, 128) == 1
    assert nuq.value_outlier_count(0.58, 101) == 30  # 0.29 * 100 is 28.999... in floating point
    with pytest.raises(ValueError, match="leave an inlier"):
        nuq.value_outlier_count(0.01, 2)


def plain_value_outliers(row, n):
    order = sorted(range(len(row)), key=lambda channel: (row[channel], channel))
    rest = [row[channel] for channel in order[n : len(row) - n]]
    return sorted(order[:n] + order[len(row) - n :]), min(rest), max(rest)


@st.composite
def tied_values(draw):
    num_tokens, num_channels = draw(st.integers(0, 6)), draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(num_tokens, num_channels, generator=generator)
    kind = draw(st.sampled_from(["few levels", "bf16", "fp32", "constant", "huge"]))
    if kind == "few levels":
        x = (x * 2).round() / 2 * torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1.0, 1.0)
    elif kind == "constant":
        x = torch.zeros_like(x) * x.sign()  # 0.0 and -0.0
    elif kind == "huge":
        x = x * 1e38
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = x.clamp(-60000, 60000) if dtype == torch.float16 else x.clamp(-3e38, 3e38)
    return x.to(torch.bfloat16 if kind == "bf16" else dtype), draw(st.integers(0, (num_channels - 1) // 2))


@settings(max_examples=200, deadline=None)
@given(tied_values(), st.booleans())
def test_value_outliers_are_exact_on_ties(case, many_tokens):
    values, n = case
    with pytest.MonkeyPatch.context() as patch:
        if many_tokens:  # by way of group extremes
            patch.setattr(value_outliers, "SERIAL_ELEMENTS", 0)
        indices, lowest, highest = nuq.split_value_outliers(values, n)
    assert indices.shape == (len(values), 2 * n) and indices.dtype == torch.int32
    assert lowest.dtype == highest.dtype == torch.float32
    for row, *got in zip(values.tolist(), indices.tolist(), lowest.tolist(), highest.tolist(), strict=True):
        assert tuple(got) == plain_value_outliers(row, n)
    # Bytes, too, must not depend on which of two zeros came first.
    assert not torch.signbit(torch.cat([lowest, highest])[torch.cat([lowest, highest]) == 0]).any()


def test_value_outliers_are_the_same_whatever_the_chunk(monkeypatch):
    values = heavy_tailed(37, 64, 5).bfloat16()
    whole = nuq.split_value_outliers(values, 3)
    monkeypatch.setattr(value_outliers, "SERIAL_ELEMENTS", 0)
    for limit in (encoding.SERIAL_ELEMENTS, 64 * 5):
        monkeypatch.setattr(encoding, "SERIAL_ELEMENTS", limit)
        monkeypatch.setattr(encoding, "_CACHED_BYTES", 2 * limit)
        monkeypatch.setattr(value_outliers, "_SORTED_TOGETHER", limit)
        for a, b in zip(whole, nuq.split_value_outliers(values, 3), strict=True):
            assert torch.equal(a, b)


def test_value_outliers_refuse_bad_input():
    with pytest.raises(ValueError, match="below half of the 6 channels, got 3"):
        nuq.split_value_outliers(torch.zeros(2, 6), 3)
    with pytest.raises(ValueError, match="65536 channels"):
        nuq.split_value_outliers(torch.zeros(1, 65537), 3)


# -- codes --


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    bits=st.integers(1, 8),
    per=st.sampled_from(["token", "channel", "scalar"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    chunk=st.sampled_from([5, 20, 1 << 20]),
)
def test_encode_counts_boundaries_below_and_decode_inverts(seed, bits, per, dtype, chunk):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 3, 4, generator=generator).to(dtype)
    shape = {"token": (7, 1, 1), "channel": (3, 4), "scalar": ()}[per]
    zero = torch.randn(shape, generator=generator)
    scale = torch.rand(shape, generator=generator).round(decimals=1)  # some ranges have width zero
    codebook = torch.rand(2**bits, generator=generator).mul(2).sub(1).sort().values
    mids = nuq.midpoints(codebook)
    x.view(-1)[0] = (zero + scale * mids[0]).flatten()[0]  # on a boundary, or beside it: not strictly below
    x.view(-1)[1:3] = torch.tensor([0.0, -0.0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "SERIAL_ELEMENTS", chunk)
        patch.setattr(encoding, "_CACHED_BYTES", chunk)
        codes = nuq.encode(x, zero, scale, mids)
        decoded = nuq.decode(codes, zero, scale, codebook)

    f32 = np.float32
    wide_zero, wide_scale = zero.expand(x.shape).flatten().numpy(), scale.expand(x.shape).flatten().numpy()
    for element, z, s, code, value in zip(
        x.flatten().float().numpy(),
        wide_zero,
        wide_scale,
        codes.flatten(),
        decoded.flatten().numpy(),
        strict=True,
    ):
        assert int(code) == sum(f32(z + f32(s * mid)) < element for mid in mids.numpy())
        assert value == f32(f32(codebook.numpy()[int(code)] * s) + z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_elements_compare_as_their_integers_do(dtype):
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[~x.isnan()]
    near = x[torch.randint(len(x), (40,), generator=torch.Generator().manual_seed(1))].float()
    bounds = torch.cat(
        [near, near.nextafter(torch.tensor(torch.inf)), near.nextafter(torch.tensor(-torch.inf))]
    )
    bounds = torch.cat(
        [bounds, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 65520.0, torch.inf, -torch.inf])]
    )
    for bound in bounds:
        above = encoding.ordered(x) > encoding.ordered_floor(bound, dtype)
        assert torch.equal(above, x.float() > bound), bound
    low, high = encoding.ordered_range(torch.tensor(-0.3), torch.tensor(0.7), dtype)
    inside = (encoding.ordered(x) >= low) & (encoding.ordered(x) <= high)
    assert torch.equal(inside, (x.float() >= -0.3) & (x.float() <= torch.tensor(0.7)))
    nan = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    low, high = encoding.ordered_range(torch.tensor(-torch.inf), torch.tensor(torch.inf), dtype)
    assert not ((encoding.ordered(nan) >= low) & (encoding.ordered(nan) <= high)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool])
@pytest.mark.parametrize("size", [0, 1, 7, 64, 1001])
def test_flat_nonzero_finds_what_nonzero_does(size, dtype):
    mask = (torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.1).to(dtype)
    assert torch.equal(encoding.nonzero_flat(mask), mask.nonzero().view(-1))


def test_encode_of_nothing():
    none = torch.zeros(0, 4)
    codes = nuq.encode(none, torch.zeros(0, 1), torch.ones(0, 1), nuq.midpoints(nuq.uniform_codebook(3)))
    assert codes.shape == (0, 4) and codes.dtype == torch.uint8
    assert nuq.decode(codes, torch.zeros(0, 1), torch.ones(0, 1), nuq.uniform_codebook(3)).shape == (0, 4)


# -- calibration --


def test_dead_channels_and_tokens_do_not_pull_centroids():
    x = heavy_tailed(200, 8, 1)
    dead = torch.cat([x, torch.full((200, 1), 3.0)], dim=1)
    lower, upper = nuq.channel_thresholds(dead, 0.0)
    codebook, histogram = nuq.fit_key_codebook(dead, lower, upper, 3)
    assert histogram.count.sum() == x.numel()
    assert torch.equal(codebook, nuq.fit_key_codebook(x, lower[:8], upper[:8], 3)[0])
    _, histogram = nuq.fit_value_codebook(torch.cat([x, torch.zeros(5, 8)]), 1, 3)
    assert histogram.count.sum() == 200 * 6


def test_times_scale2_weighs_error_in_units_of_the_input():
    x = heavy_tailed(300, 8, 2)
    lower, upper = nuq.channel_thresholds(x, 0.02)
    _, scale = nuq.zero_and_scale(lower, upper)
    fisher = torch.rand(300, 8)
    for weight in (None, fisher):
        explicit = nuq.key_histogram(
            x, lower, upper, (1 if weight is None else weight) * scale.square().expand(300, 8)
        )
        implied = nuq.key_histogram(x, lower, upper, weight, times_scale2=True)
        np.testing.assert_allclose(implied.weight, explicit.weight, rtol=1e-6)
    _, lowest, highest = nuq.split_value_outliers(x, 1)
    _, scale = nuq.zero_and_scale(lowest, highest)
    explicit = nuq.value_histogram(x, 1, fisher * scale.square()[:, None])
    np.testing.assert_allclose(
        nuq.value_histogram(x, 1, fisher, times_scale2=True).weight, explicit.weight, rtol=1e-6
    )


# -- design.md section 3, in a few plain lines --


def plain_kmeans(points, weight, bits):
    """Lloyd's iterations from the quantiles; running totals of the sorted points make each one cheap."""
    order = points.argsort()
    points, weight = points[order].double().numpy(), weight[order].double().numpy()
    totals, sums = (np.concatenate([[0.0], np.cumsum(part)]) for part in (weight, weight * points))
    centroids = np.quantile(points, np.linspace(0, 1, 2**bits))
    for _ in range(1000):
        cuts = np.searchsorted(points, (centroids[1:] + centroids[:-1]) / 2, side="right")
        cuts = np.concatenate([[0], cuts, [len(points)]])
        total, moved = np.diff(totals[cuts]), np.diff(sums[cuts])
        centroids = np.where(total > 0, moved / np.where(total > 0, total, 1), centroids)
    return torch.from_numpy(centroids).float()


def plain_ranges(x, per, fraction, thresholds=None):
    """(zero, scale, outlier mask): thresholds for keys, exactly 2n per token for values."""
    if per == "channel":
        lower, upper = thresholds
        mask = (x < lower) | (x > upper) if fraction else torch.zeros(x.shape, dtype=torch.bool)
        return (upper + lower) / 2, (upper - lower) / 2, mask
    T, C = x.shape
    n = math.floor(fraction / 2 * (C - 1)) + 1 if fraction else 0
    mask = torch.zeros(x.shape, dtype=torch.bool)
    bounds = torch.empty(2, T, 1)
    for token, row in enumerate(x.tolist()):
        outliers, bounds[0, token, 0], bounds[1, token, 0] = plain_value_outliers(row, n)
        mask[token, outliers] = True
    lower, upper = bounds
    return (upper + lower) / 2, (upper - lower) / 2, mask


def plain_quantize(x, zero, scale, mask, codebook):
    mids = (codebook[1:] + codebook[:-1]) / 2
    codes = torch.stack([zero + scale * mid < x for mid in mids]).sum(0).masked_fill(mask, 0)
    return codes, torch.where(mask, x, codebook[codes] * scale + zero)


def relative_error(x_hat, x):
    return float((x_hat - x).norm() / x.norm())


@pytest.mark.parametrize("fraction", [0.0, 0.01], ids=["dense", "1%"])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("per", ["channel", "token"])
def test_codes_and_error_match_the_definition(per, bits, fraction):
    calibration, x = heavy_tailed(1280, 256, 11).split([1024, 256])
    fisher = torch.rand(calibration.shape, generator=torch.Generator().manual_seed(12)).square()

    # The plain implementation, with its own codebook.
    thresholds = (
        calibration.double().quantile(torch.tensor([fraction / 2, 1 - fraction / 2]).double(), dim=0).float()
    )
    zero, scale, mask = plain_ranges(calibration, per, fraction, thresholds)
    plain_codebook = plain_kmeans(((calibration - zero) / scale)[~mask], fisher[~mask], bits)
    zero, scale, mask = plain_ranges(x, per, fraction, thresholds)
    plain_error = relative_error(plain_quantize(x, zero, scale, mask, plain_codebook)[1], x)

    # Ours.
    n = nuq.value_outlier_count(fraction, 256)
    if per == "channel":
        lower, upper = nuq.channel_thresholds(calibration, fraction)
        codebook, _ = nuq.fit_key_codebook(calibration, lower, upper, bits, fisher)
        ours = ((x < lower) | (x > upper)) if fraction else torch.zeros(x.shape, dtype=torch.bool)
    else:
        codebook, _ = nuq.fit_value_codebook(calibration, n, bits, fisher)
        indices, lowest, highest = nuq.split_value_outliers(x, n)
        lower, upper = lowest[:, None], highest[:, None]
        ours = torch.zeros(x.shape, dtype=torch.bool).scatter(1, indices.long(), True)
    our_zero, our_scale = nuq.zero_and_scale(lower, upper)
    codes = nuq.encode(x, our_zero, our_scale, nuq.midpoints(codebook)).masked_fill(ours, 0)
    decoded = torch.where(ours, x, nuq.decode(codes, our_zero, our_scale, codebook))

    plain_codes, _ = plain_quantize(x, zero, scale, mask, codebook)
    assert torch.equal(ours, mask)
    assert torch.equal(codes.long(), plain_codes)
    assert relative_error(decoded, x) == pytest.approx(plain_error, rel=0.01)
