"""Non-uniform quantization of keys (per channel) and values (per token): thresholds, outliers, codebooks, codes.

The method is KVQuant's (Hooper et al., NeurIPS 2024, arXiv:2401.18079, section 3), restated so that a whole
ragged batch of tokens goes through at once and every backend gives identical codes: a code counts the decision
boundaries zero + scale * midpoint strictly below an element, in fp32, each product and sum rounded on its own.
"""

import math
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20  # fp32 temporaries of 4 MiB: large enough to vectorise, small enough for the cache
_NEGLIGIBLE_WEIGHT = 1e-13  # of the total: below it, differences of fp64 prefix sums are rounding noise


# -- codebooks ----------------------------------------------------------------------------------------------


class WeightedHistogram:
    """Weighted histogram over [-1, 1]: all that `fit_codebook` and `qnorm_affine` need to know of the inliers.

    Attributes:
        num_bins (int): equal bins over [-1, 1].
        weight, weighted_sum (ndarray): sums of w and of w * x per bin, [num_bins], fp64.
        count, count_sum (ndarray): the same with every w = 1.
        sum_of_squares (float): unweighted sum of x * x over all bins.
    """

    def __init__(self, num_bins: int = 4096) -> None:
        if num_bins < 1:
            raise ValueError(f"num_bins must be positive, got {num_bins}; try 4096")
        self.num_bins = num_bins
        self.weight = np.zeros(num_bins)
        self.weighted_sum = np.zeros(num_bins)
        self.count = np.zeros(num_bins)
        self.count_sum = np.zeros(num_bins)
        self.sum_of_squares = 0.0

    def add(self, x: Tensor, weight: Tensor | None = None, keep: Tensor | None = None) -> None:
        """Count elements, in chunks; those outside [-1, 1] go to the nearest end bin.

        Args:
            x (Tensor): normalized elements, any shape, floating point.
            weight (Tensor | None): importance, not negative, broadcasts to x; None means 1.
            keep (Tensor | None): bool, the shape of x; elements where it is False are left out.

        Raises:
            ValueError: x or weight holds NaN or infinity, or weight is negative.
        """
        flat = x.reshape(-1)
        flat_weight = None if weight is None else weight.expand(x.shape).reshape(-1)
        flat_keep = None if keep is None else keep.reshape(-1)
        for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
            part = slice(start, start + _CHUNK_ELEMENTS)
            self._add_chunk(
                flat[part].float(),
                None if flat_weight is None else flat_weight[part],
                None if flat_keep is None else flat_keep[part],
            )

    def merge(self, other: "WeightedHistogram") -> None:
        """Add another histogram's counts to this one.

        Raises:
            ValueError: the two have different numbers of bins.
        """
        if other.num_bins != self.num_bins:
            raise ValueError(
                f"histograms to merge must have equally many bins, got {self.num_bins} and {other.num_bins}; "
                "build both with the same num_bins"
            )
        self.weight += other.weight
        self.weighted_sum += other.weighted_sum
        self.count += other.count
        self.count_sum += other.count_sum
        self.sum_of_squares += other.sum_of_squares

    def _add_chunk(self, x: Tensor, weight: Tensor | None, keep: Tensor | None) -> None:
        if not all(bool(end.isfinite()) for end in x.aminmax()):
            raise ValueError(
                "x must be finite to be counted, got NaN or infinity; check the calibration activations"
            )
        bins_index = ((x + 1) * (self.num_bins / 2)).clamp_(0, self.num_bins - 1).to(torch.int64)
        if keep is not None:
            # A spare last bin for what is left out is several times cheaper than compacting x and weight.
            bins_index.masked_fill_(~keep, self.num_bins)
            x = x.masked_fill(~keep, 0)
        index = bins_index.cpu().numpy()
        values = x.double().cpu().numpy()

        def binned(w: NDArray[np.float64] | None) -> NDArray[np.float64]:
            sums = np.bincount(index, weights=w, minlength=self.num_bins + 1)
            return sums[: self.num_bins].astype(np.float64, copy=False)

        count, count_sum = binned(None), binned(values)
        self.count += count
        self.count_sum += count_sum
        self.sum_of_squares += float(np.dot(values, values))
        if weight is None:
            self.weight += count
            self.weighted_sum += count_sum
            return
        importance = weight.double().cpu().numpy()
        # Written so that NaN fails too.
        if not (importance.min() >= 0 and np.isfinite(importance.max())):
            raise ValueError(
                f"weight must be finite and not negative, got values from {importance.min()} to "
                f"{importance.max()}; Fisher information is a squared gradient"
            )
        self.weight += binned(importance)
        self.weighted_sum += binned(importance * values)


def fit_codebook(histogram: WeightedHistogram, bits: int) -> Tensor:
    """The optimal weighted 1-D k-means of a histogram's bins (KVQuant, equation 3, solved exactly).

    Dynamic programming over sorted bins, as in Ckmeans.1d.dp (Wang and Song, The R Journal 3/2, 2011), with
    divide and conquer over its monotone split points. With fewer occupied bins than centroids, every occupied
    bin gets one and the rest halve the widest gaps. An empty histogram gives `uniform_codebook`; weights that
    are all zero count as equal.

    Args:
        histogram (WeightedHistogram): normalized inliers.
        bits (int): 1 to 8.

    Returns:
        Tensor: centroids, [2**bits], fp32, ascending in [-1, 1].

    Raises:
        ValueError: `bits` is outside 1-8.
    """
    num_centroids = _num_centroids(bits)
    weight, weighted_sum = histogram.weight, histogram.weighted_sum
    if not weight.any():
        weight, weighted_sum = histogram.count, histogram.count_sum
    occupied = weight > _NEGLIGIBLE_WEIGHT * weight.sum()
    weight, weighted_sum = weight[occupied], weighted_sum[occupied]
    if weight.size == 0:
        return uniform_codebook(bits)
    if weight.size <= num_centroids:
        centroids = _fill_widest_gaps((weighted_sum / weight).clip(-1, 1).tolist(), num_centroids)
    else:
        starts = _optimal_cluster_starts(weight, weighted_sum, num_centroids)
        centroids = np.add.reduceat(weighted_sum, starts) / np.add.reduceat(weight, starts)
    return torch.from_numpy(np.maximum.accumulate(centroids.clip(-1, 1)).astype(np.float32))


def _fill_widest_gaps(points: list[float], num_points: int) -> NDArray[np.float64]:
    points = sorted(points)
    while len(points) < num_points:
        edges = np.array([-1.0, *points, 1.0])
        widest = int(np.diff(edges).argmax())
        points.insert(widest, float(edges[widest : widest + 2].mean()))
    return np.array(points)


def _optimal_cluster_starts(
    weight: NDArray[np.float64], weighted_sum: NDArray[np.float64], num_clusters: int
) -> NDArray[np.int64]:
    """First point of each cluster of the best split of sorted points into `num_clusters` runs."""
    num_points = weight.size
    # A cluster of points j..i-1 costs sum(w x^2) - S^2 / W; the first term is the same for every split, so the
    # best split has the greatest sum of S^2 / W.
    total_w = np.concatenate(([0.0], np.cumsum(weight)))
    total_s = np.concatenate(([0.0], np.cumsum(weighted_sum)))
    best = np.full(num_points + 1, -np.inf)
    best[1:] = total_s[1:] ** 2 / total_w[1:]
    splits = np.zeros((num_clusters, num_points + 1), dtype=np.int64)
    for clusters in range(2, num_clusters + 1):
        best, splits[clusters - 1] = _best_last_split(best, total_w, total_s, clusters)
    starts = np.zeros(num_clusters, dtype=np.int64)
    end = num_points
    for cluster in range(num_clusters - 1, 0, -1):
        end = starts[cluster] = splits[cluster, end]
    return starts


def _best_last_split(
    previous: NDArray[np.float64], total_w: NDArray[np.float64], total_s: NDArray[np.float64], clusters: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each prefix of i points: the best value with `clusters` clusters, and where the last one starts.

    The best start never decreases with i, so a prefix need only look between the starts of its computed
    neighbours. Prefixes are visited level by level (stride halves), each level as one ragged numpy operation.
    """
    num_points = previous.size - 1
    best = np.full(num_points + 1, -np.inf)
    split = np.zeros(num_points + 1, dtype=np.int64)
    shortest = clusters - 1  # prefix lengths are shortest + 1 .. num_points
    num_prefixes = num_points - shortest
    split[shortest] = shortest
    stride = 1 << (num_prefixes.bit_length() - 1)
    while stride:
        lengths = shortest + np.arange(stride, num_prefixes + 1, 2 * stride)
        low = split[lengths - stride]
        above = lengths + stride
        high = np.where(above <= num_points, split[np.minimum(above, num_points)], num_points)
        high = np.minimum(high, lengths - 1)
        sizes = high - low + 1
        first = np.cumsum(sizes) - sizes
        start = np.arange(sizes.sum()) - np.repeat(first - low, sizes)
        end = np.repeat(lengths, sizes)
        value = previous[start] + (total_s[end] - total_s[start]) ** 2 / (total_w[end] - total_w[start])
        top = np.maximum.reduceat(value, first)
        at_top = np.flatnonzero(value == np.repeat(top, sizes))
        best[lengths] = top
        split[lengths] = start[at_top[np.searchsorted(at_top, first)]]
        stride //= 2
    return best, split


def uniform_codebook(bits: int) -> Tensor:
    """Equally spaced centroids from -1 to 1, [2**bits], fp32: plain min-max integer quantization.

    Raises:
        ValueError: `bits` is outside 1-8.
    """
    return torch.linspace(-1, 1, _num_centroids(bits), dtype=torch.float64).float()


def normal_float_codebook(bits: int) -> Tensor:
    """NormalFloat centroids: quantiles of a normal distribution, scaled to [-1, 1], one of them exactly 0.

    QLoRA (Dettmers et al., 2023, arXiv:2305.14314, section 3 and appendix E); the tail offset of its NF4,
    0.9677083, is generalised from 4 bits to any. At 1 bit, where that leaves no negative centroid: (-1, 1).

    Returns:
        Tensor: centroids, [2**bits], fp32, ascending.

    Raises:
        ValueError: `bits` is outside 1-8.
    """
    num_centroids = _num_centroids(bits)
    if bits == 1:
        return torch.tensor([-1.0, 1.0])
    half = num_centroids // 2
    offset = 1 - (1 / (2 * (num_centroids - 1)) + 1 / (2 * num_centroids)) / 2
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, half + 1, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, half, dtype=torch.float64)[:-1])
    centroids: Tensor = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return centroids.div(positive[0]).float()


def midpoints(codebook: Tensor) -> Tensor:
    """Midpoints of neighbouring centroids, [2**bits - 1], fp32: the decision boundaries in normalized space.

    Args:
        codebook (Tensor): ascending centroids, [2**bits], fp32.
    """
    codebook = codebook.float()
    return (codebook[1:] + codebook[:-1]) * 0.5


def qnorm_affine(histogram: WeightedHistogram, codebook: Tensor) -> tuple[float, float]:
    """Q-Norm: (gain, offset) so that gain * codebook + offset keeps the inliers' mean and standard deviation.

    KVQuant, section 3.6. Both moments are unweighted and in normalized space. Codes are still chosen with the
    midpoints of the codebook as fitted; only decoding uses the shifted one.

    Args:
        histogram (WeightedHistogram): normalized inliers of the calibration set.
        codebook (Tensor): ascending centroids, [2**bits], fp32.

    Returns:
        tuple[float, float]: gain and offset; (1, 0) for an empty histogram.
    """
    occupied = histogram.count > 0
    if not occupied.any():
        return 1.0, 0.0
    count = histogram.count[occupied]
    total = count.sum()
    mean = histogram.count_sum.sum() / total
    std = math.sqrt(max(histogram.sum_of_squares / total - mean**2, 0.0))

    bin_means = histogram.count_sum[occupied] / count
    codes = np.searchsorted(midpoints(codebook).cpu().double().numpy(), bin_means, side="left")
    decoded = codebook.cpu().double().numpy()[codes]
    decoded_mean = float(np.dot(count, decoded) / total)
    decoded_std = math.sqrt(float(np.dot(count, (decoded - decoded_mean) ** 2) / total))
    gain = std / decoded_std if decoded_std > 0 else 1.0
    return gain, mean - gain * decoded_mean


def _num_centroids(bits: int) -> int:
    if bits not in range(1, 9):
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}; try 4")
    return 1 << bits


# -- ranges and outliers ------------------------------------------------------------------------------------


def channel_thresholds(x: Tensor, outlier_fraction: float) -> tuple[Tensor, Tensor]:
    """Per-channel outlier thresholds of keys: the f/2 and 1 - f/2 quantiles, linearly interpolated.

    Args:
        x (Tensor): calibration tokens, [T, C], floating point.
        outlier_fraction (float): f, the share of elements to keep exact; 0 gives minimum and maximum.

    Returns:
        tuple[Tensor, Tensor]: lower and upper thresholds, each [C], fp32, on x's device.

    Raises:
        ValueError: f is outside [0, 1), x is not [T >= 1, C], or a channel holds NaN or infinity.
    """
    _check_fraction(outlier_fraction)
    if x.dim() != 2 or len(x) == 0:
        raise ValueError(f"x must be [tokens, channels] with at least one token, got shape {list(x.shape)}")
    num_tokens, num_channels = x.shape
    lower = torch.empty(num_channels)
    upper = torch.empty(num_channels)
    step = max(1, 4 * _CHUNK_ELEMENTS // num_tokens)
    for start in range(0, num_channels, step):
        # Contiguous per channel: partition works along rows.
        columns = x[:, start : start + step].float().t().contiguous().cpu().numpy()
        finite = np.isfinite(columns.min(axis=1)) & np.isfinite(columns.max(axis=1))
        if not finite.all():
            raise ValueError(
                f"x must be finite, got NaN or infinity in channel {start + int(np.argmin(finite))}; "
                "check the calibration activations"
            )
        lower[start : start + step] = _low_quantile(columns, outlier_fraction / 2)
        # Negated, the upper quantile is a lower one, and interpolates the same way.
        upper[start : start + step] = -_low_quantile(-columns, outlier_fraction / 2)
    return lower.to(x.device), upper.to(x.device)


def _low_quantile(rows: NDArray[np.float32], q: float) -> Tensor:
    """The q-quantile (q < 0.5) of each row, fp32. Partitions a copy."""
    rank = q * (rows.shape[1] - 1)
    below = math.floor(rank)
    if rank == 0:
        return torch.from_numpy(rows.min(axis=1))
    # One pivot, then the maximum of its left side: asking partition for both ranks is several times slower.
    head = np.partition(rows, below + 1, axis=1)[:, : below + 2]
    left = torch.from_numpy(head[:, :-1].max(axis=1)).double()
    right = torch.from_numpy(head[:, -1].copy()).double()
    return torch.lerp(left, right, rank - below).float()


def value_outlier_count(outlier_fraction: float, num_channels: int) -> int:
    """Outliers at each end of one token's values: n = floor(f/2 * (C - 1)) + 1, and 0 when f is 0.

    Args:
        outlier_fraction (float): f.
        num_channels (int): C, the channels of one token (of one value group).

    Raises:
        ValueError: f is outside [0, 1), or the 2n outliers would leave no inlier.
    """
    _check_fraction(outlier_fraction)
    if outlier_fraction == 0:
        return 0
    # The decimal the user wrote, not its binary neighbour: 0.29 * 100 must not come to 28.
    count = math.floor(Fraction(str(float(outlier_fraction))) / 2 * (num_channels - 1)) + 1
    if 2 * count >= num_channels:
        raise ValueError(
            f"value outliers must leave an inlier: outlier_fraction {outlier_fraction} makes 2 * {count} outliers "
            f"of {num_channels} channels; lower outlier_fraction or use fewer value groups"
        )
    return count


def split_value_outliers(values: Tensor, num_outliers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find each token's n smallest and n largest values, and the range of the rest; exact on ties.

    Ties go to the lowest channel among the smallest and to the highest channel among the largest; -0.0 equals
    0.0. Input must be finite: where NaN ranks is not defined.

    Args:
        values (Tensor): [T, C], floating point.
        num_outliers (int): n, outliers at each end, as `value_outlier_count` gives it.

    Returns:
        tuple[Tensor, Tensor, Tensor]: outlier channels, ascending, [T, 2n], int32; lowest and highest of the
        remaining values, each [T], fp32.

    Raises:
        ValueError: values is not [T, C] with C <= 65536, or 2n >= C.
    """
    if values.dim() != 2 or values.shape[1] > 1 << 16:
        raise ValueError(f"values must be [tokens, at most 65536 channels], got shape {list(values.shape)}")
    num_tokens, num_channels = values.shape
    n = num_outliers
    if not 0 <= 2 * n < num_channels:
        raise ValueError(
            f"num_outliers at each end must be at least 0 and below half of the {num_channels} channels, got {n}; "
            "use value_outlier_count"
        )
    if n == 0:
        lowest, highest = values.float().aminmax(dim=1)
        return values.new_empty((num_tokens, 0), dtype=torch.int32), lowest + 0.0, highest + 0.0

    indices = values.new_empty((num_tokens, 2 * n), dtype=torch.int32)
    ranges = values.new_empty((2, num_tokens), dtype=torch.float32)
    channel = torch.arange(num_channels, device=values.device)
    # Small chunks: int64 keys are the largest temporaries of the whole encode path.
    for rows in _row_chunks(values, _CHUNK_ELEMENTS // 4):
        x = values[rows].float() + 0.0  # -0.0 becomes 0.0
        # One int64 orders by value, then by channel, so that plain topk is exact on ties: two float topks cost
        # as much and leave ties to chance. Flipping the lower bits of negatives makes fp32 bits sort as floats.
        bits = x.view(torch.int32)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long().mul_(1 << 16).bitwise_or_(channel)
        # The (n+1)-th at either end belongs to the rest: its extreme comes for free.
        smallest = key.topk(n + 1, dim=1, largest=False).values & 0xFFFF
        largest = key.topk(n + 1, dim=1).values & 0xFFFF
        indices[rows] = torch.cat([smallest[:, :n], largest[:, :n]], dim=1).int().sort(dim=1).values
        ranges[0, rows] = x.gather(1, smallest[:, n:]).squeeze(1)
        ranges[1, rows] = x.gather(1, largest[:, n:]).squeeze(1)
    return indices, ranges[0], ranges[1]


def zero_and_scale(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (u + l) / 2 and half width (u - l) / 2 of a range, fp32; x_norm = (x - zero) / scale."""
    lower, upper = lower.float(), upper.float()
    return (upper + lower) * 0.5, (upper - lower) * 0.5


def _check_fraction(outlier_fraction: float) -> None:
    if not 0 <= outlier_fraction < 1:
        raise ValueError(f"outlier_fraction must be at least 0 and below 1, got {outlier_fraction}; try 0.01")


# -- codes --------------------------------------------------------------------------------------------------


def encode(x: Tensor, zero: Tensor, scale: Tensor, codebook_midpoints: Tensor) -> Tensor:
    """Codes: how many decision boundaries zero + scale * midpoint are strictly below each element.

    Args:
        x (Tensor): elements, [T, ...], floating point.
        zero (Tensor): centre of the range, broadcasts against x, as stored.
        scale (Tensor): half width of the range, the same.
        codebook_midpoints (Tensor): `midpoints(codebook)`, [2**bits - 1], fp32.

    Returns:
        Tensor: the shape of x, uint8. Outliers get a code like any other element: overwrite it.
    """
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    zero, scale = zero.float(), scale.float()
    mids = codebook_midpoints.float().to(x.device).unbind()
    for rows in _row_chunks(x, _CHUNK_ELEMENTS):
        part, count = x[rows].float(), codes[rows]
        part_zero, part_scale = _rows_of(zero, x, rows), _rows_of(scale, x, rows)
        above = torch.empty(part.shape, dtype=torch.bool, device=x.device)
        for mid in mids:
            # Two operations on purpose: a fused multiply-add rounds once and moves boundaries.
            torch.gt(part, part_scale * mid + part_zero, out=above)
            count += above.view(torch.uint8)
    return codes


def decode(codes: Tensor, zero: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """Invert `encode`: codebook[code] * scale + zero, product and sum rounded separately.

    Args:
        codes (Tensor): [T, ...], uint8.
        zero (Tensor): broadcasts against codes, as stored.
        scale (Tensor): the same.
        codebook (Tensor): centroids, [2**bits], fp32.

    Returns:
        Tensor: the shape of codes, fp32.
    """
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    zero, scale, codebook = zero.float(), scale.float(), codebook.float().to(codes.device)
    for rows in _row_chunks(codes, _CHUNK_ELEMENTS // 4):
        part = out[rows]
        torch.index_select(codebook, 0, codes[rows].reshape(-1).int(), out=part.view(-1))
        part.mul_(_rows_of(scale, codes, rows)).add_(_rows_of(zero, codes, rows))
    return out


def _row_chunks(x: Tensor, num_elements: int) -> list[slice]:
    """Slices of dimension 0 of about `num_elements` elements each, far more off the CPU, where launches cost."""
    if x.device.type != "cpu":
        num_elements *= 64
    num_rows = len(x)
    step = max(1, num_elements * num_rows // max(1, x.numel()))
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _rows_of(tensor: Tensor, like: Tensor, rows: slice) -> Tensor:
    """The part of a tensor that broadcasts against `like[rows]`."""
    return tensor[rows] if tensor.dim() == like.dim() and len(tensor) > 1 else tensor


# -- calibration --------------------------------------------------------------------------------------------


def key_histogram(
    keys: Tensor, lower: Tensor, upper: Tensor, weight: Tensor | None = None, *, times_scale2: bool = False
) -> WeightedHistogram:
    """Histogram of the normalized inliers of keys; merge several to calibrate on a stream.

    Args:
        keys (Tensor): pre-RoPE keys, [T, C], sink tokens left out.
        lower (Tensor): per-channel thresholds, [C].
        upper (Tensor): the same.
        weight (Tensor | None): Fisher information, [T, C]; None means 1.
        times_scale2 (bool): multiply the weight by the channel's scale squared (KVQuant's equation 3; its code
            does not), so that error is measured in units of x rather than of x_norm.

    Raises:
        ValueError: keys or weight hold NaN or infinity, or weight is negative.
    """
    zero, scale = zero_and_scale(lower, upper)
    histogram = WeightedHistogram()
    for rows in _row_chunks(keys, _CHUNK_ELEMENTS):
        x = keys[rows].float()
        keep = (x >= lower) & (x <= upper)
        _add_normalized(
            histogram, x, zero, scale, keep, None if weight is None else weight[rows], times_scale2
        )
    return histogram


def value_histogram(
    values: Tensor, num_outliers: int, weight: Tensor | None = None, *, times_scale2: bool = False
) -> WeightedHistogram:
    """Histogram of the normalized inliers of values: as `key_histogram`, with ranges per token.

    Args:
        values (Tensor): [T, C] (one row per token and value group), sink tokens left out.
        num_outliers (int): n, outliers at each end of a token.
        weight (Tensor | None): Fisher information, [T, C]; None means 1.
        times_scale2 (bool): multiply the weight by the token's scale squared.

    Raises:
        ValueError: 2n >= C, values or weight hold NaN or infinity, or weight is negative.
    """
    histogram = WeightedHistogram()
    for rows in _row_chunks(values, _CHUNK_ELEMENTS):
        x = values[rows].float()
        indices, lowest, highest = split_value_outliers(x, num_outliers)
        keep = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        keep.scatter_(1, indices.long(), False)
        zero, scale = zero_and_scale(lowest[:, None], highest[:, None])
        _add_normalized(
            histogram, x, zero, scale, keep, None if weight is None else weight[rows], times_scale2
        )
    return histogram


def _add_normalized(
    histogram: WeightedHistogram,
    x: Tensor,
    zero: Tensor,
    scale: Tensor,
    keep: Tensor,
    weight: Tensor | None,
    times_scale2: bool,
) -> None:
    live = (
        scale > 0
    )  # a range of width zero decodes exactly whatever the codebook: it must not pull a centroid
    x_norm = (x - zero) / torch.where(live, scale, 1.0)
    if times_scale2:
        weight = scale.square() if weight is None else weight.float() * scale.square()
    histogram.add(x_norm, weight, keep & live)


def fit_key_codebook(
    keys: Tensor,
    lower: Tensor,
    upper: Tensor,
    bits: int,
    weight: Tensor | None = None,
    *,
    times_scale2: bool = False,
) -> tuple[Tensor, WeightedHistogram]:
    """Fit a layer's key codebook; arguments as of `key_histogram`.

    Returns:
        tuple[Tensor, WeightedHistogram]: the codebook, [2**bits], fp32, and the histogram it was fitted to, for
        `qnorm_affine`.
    """
    histogram = key_histogram(keys, lower, upper, weight, times_scale2=times_scale2)
    return fit_codebook(histogram, bits), histogram


def fit_value_codebook(
    values: Tensor, num_outliers: int, bits: int, weight: Tensor | None = None, *, times_scale2: bool = False
) -> tuple[Tensor, WeightedHistogram]:
    """Fit a layer's value codebook; arguments as of `value_histogram`, returns as `fit_key_codebook`."""
    histogram = value_histogram(values, num_outliers, weight, times_scale2=times_scale2)
    return fit_codebook(histogram, bits), histogram
