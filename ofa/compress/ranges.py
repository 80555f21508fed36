"""Which range of values a grid covers: the extremes, or less, so that the bulk is told apart more finely.

B bins of a histogram, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofa.compress.affine import grid, on_grid, per_channel
from ofa.errors import UserError

METHODS = ("minmax", "percentile", "entropy", "mse")
WEIGHT_METHODS = ("minmax", "percentile", "mse")
BINS = 2048
SHARES = np.linspace(0.01, 1, 100)  # of the extremes that are tried for the least squared error
WEIGHT_SHARES = np.linspace(0.2, 1, 81)
STRIDE = 16  # bins between two thresholds that are tried for the least divergence
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often values fell into B equal bins from `low` to `high`, the extremes that were seen."""

    low: float
    high: float
    counts: Floats

    @property
    def centers(self) -> Floats:
        """The middle of each bin, (B,)."""
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        return (edges[1:] + edges[:-1]) / 2


def check_method(name: str, method: str, known: tuple[str, ...] = METHODS) -> None:
    """Raise UserError for a way of calibration that does not exist."""
    if method not in known:
        raise UserError(f"{name} {method!r} is not known; choose from {', '.join(known)}")


def limits(
    histogram: Histogram, method: str, bits: int, *, symmetric: bool = False, percentile: float = 99.99
) -> tuple[float, float]:
    """The range of a tensor by a method of `METHODS`, from its histogram.

    percentile: percent of the values that lie inside; what is cut is shared by both ends, unless no value is negative.
    entropy: the least Kullback-Leibler divergence of the clipped values from their grid (Migacz 2017, as in TensorRT).
    mse: the least squared error among 100 shares of the extremes.
    """
    check_method("calibration", method)
    if method == "percentile":
        return _percentile(histogram, percentile)
    if method == "entropy":
        threshold = entropy_threshold(histogram, 2**bits if histogram.low >= 0 else 2 ** (bits - 1))
        return max(histogram.low, -threshold), min(histogram.high, threshold)
    if method == "mse":
        return _least_error(histogram, bits, symmetric)
    return histogram.low, histogram.high


def _percentile(histogram: Histogram, percentile: float) -> tuple[float, float]:
    outside = (100 - percentile) * histogram.counts.sum() / 100
    ends = 1 if histogram.low >= 0 else 2
    edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
    inside = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    high = float(edges[np.searchsorted(inside, histogram.counts.sum() - outside / ends)])
    low = float(edges[np.searchsorted(inside, outside / ends, side="right") - 1])
    return (histogram.low if ends == 1 else low), high


def _least_error(histogram: Histogram, bits: int, symmetric: bool) -> tuple[float, float]:
    values, counts = torch.from_numpy(histogram.centers), torch.from_numpy(histogram.counts)
    low, high = histogram.low * torch.from_numpy(SHARES), histogram.high * torch.from_numpy(SHARES)
    g = grid(low[:, None], high[:, None], bits, symmetric=symmetric)
    best = int((((on_grid(values, g) - values) ** 2) @ counts).argmin())
    return float(low[best]), float(high[best])


def entropy_threshold(histogram: Histogram, levels: int) -> float:
    """The magnitude beyond which values are clipped, such that `levels` steps below it keep most of the information."""
    edge = max(abs(histogram.low), abs(histogram.high))
    width = (histogram.high - histogram.low) / len(histogram.counts)
    if not width:
        return edge
    bins = max(round(edge / width), levels)
    place = np.minimum((np.abs(histogram.centers) / edge * bins).astype(int), bins - 1)
    counts: Floats = np.bincount(place, histogram.counts, bins).astype(np.float64)
    counts[0] = counts[1]  # zero is on every grid: a ReLU's many zeros say nothing about the step
    ends = np.unique(np.append(np.arange(levels, bins, STRIDE), bins))
    divergences = [divergence(counts, int(end), levels) for end in ends]
    return float(edge * ends[int(np.argmin(divergences))] / bins)


def divergence(counts: Floats, end: int, levels: int) -> float:
    """How far the first `end` bins, what lies beyond in the last of them, are from what `levels` steps keep of them.

    Each step spreads what it holds evenly over its bins that are not empty.
    """
    kept = counts[:end]
    wanted = kept.copy()
    wanted[-1] += counts[end:].sum()
    starts = np.arange(levels) * end // levels
    sums = np.add.reduceat(kept, starts)
    used = np.add.reduceat((wanted > 0).astype(float), starts)
    level = np.searchsorted(starts, np.arange(end), side="right") - 1
    held = np.where(wanted > 0, sums[level] / np.maximum(used[level], 1), 0)
    if not held.sum():
        return np.inf
    p, q = wanted / wanted.sum(), np.maximum(held / held.sum(), 1e-12)
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def weight_limits(
    weight: Tensor, bits: int, method: str, *, symmetric: bool, channels: bool, percentile: float = 99.99
) -> tuple[Tensor, Tensor]:
    """The range of a weight (C, ...) by a method of `WEIGHT_METHODS`: two tensors (C,), or (1,) without `channels`."""
    check_method("weight_range", method, WEIGHT_METHODS)
    rows = weight.detach().flatten(1) if channels else weight.detach().flatten()[None]
    low, high = rows.amin(1), rows.amax(1)
    if method == "percentile":
        outside = (1 - percentile / 100) / 2
        low, high = rows.quantile(outside, dim=1), rows.quantile(1 - outside, dim=1)
    if method == "mse":
        errors = []
        for share in WEIGHT_SHARES:
            g = grid(per_channel(low * share, rows), per_channel(high * share, rows), bits, symmetric=symmetric)
            errors.append(((on_grid(rows, g) - rows) ** 2).sum(1))
        share = torch.from_numpy(WEIGHT_SHARES).to(low)[torch.stack(errors).argmin(0)]
        low, high = low * share, high * share
    return low, high
