"""Codebooks in [-1, 1]: optimal for a weighted histogram, uniform, or the quantiles of a normal distribution."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvquant import compiled

_CHUNK_ELEMENTS = 1 << 20  # fp32 temporaries of 4 MiB: large enough to vectorise, small enough for the cache
_MANY_CLUSTERS = 32
_NEGLIGIBLE_WEIGHT = 1e-13  # of the total: below it, differences of fp64 prefix sums are rounding noise


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
    last_split = _best_last_split
    # Loading what is compiled takes as long as a few clusters do here.
    if num_clusters >= _MANY_CLUSTERS and compiled.has_numba():
        from kvquant.compiled.cluster_loops import best_last_split as last_split
    for clusters in range(2, num_clusters + 1):
        best, splits[clusters - 1] = last_split(best, total_w, total_s, clusters)
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
