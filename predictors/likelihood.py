"""The marginal likelihood of a kernel that weighs groups of features.  N samples, F features, K groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.lapack import dpotri

from predictors.warp import Warp

Float = NDArray[np.float64]
Correlation = Callable[[Float], tuple[Float, Float]]
JITTER = 1e-6


@dataclass(frozen=True, slots=True)
class Hyper:
    """What the marginal likelihood chooses: weights of distances (K,), of products (K,), scale, noise variance."""

    weights: Float
    slopes: Float
    scale: float
    noise: float

    @staticmethod
    def of(p: Float) -> Hyper:
        """From the vector of their logarithms, (2 K + 2,) or longer."""
        k, found = (len(p) - 2) // 2, np.exp(p)
        return Hyper(found[:k], found[k : 2 * k], float(found[2 * k]), float(found[2 * k + 1]))


class Scaled:
    """Samples (N, F) with each group scaled to a mean squared distance of 1, and to a mean squared length of 1."""

    def __init__(self, x: Float, groups: Sequence[slice]) -> None:
        self.groups = tuple(groups)
        self.starts = [group.start for group in self.groups]
        squares, centred = (x**2).mean(axis=0), 2 * x.var(axis=0)
        self.root_scales = tuple(spread(1 / np.sqrt(_group_sums(v, self.starts)), groups) for v in (centred, squares))
        self.near, self.line = (x * scale for scale in self.root_scales)


def _group_sums(values: Float, starts: Sequence[int]) -> Float:
    """Sums of values (F,) in each group, (K,); 1 where a group is constant."""
    sums = np.add.reduceat(values, starts)
    return np.where(sums > 1e-9, sums, 1.0)


def spread(values: Float, groups: Sequence[slice]) -> Float:
    """Values of the groups (K,) repeated for each of their features, (F,)."""
    return np.repeat(values, [group.stop - group.start for group in groups])


def squared_distances(a: Float, b: Float) -> Float:
    """Squared distances of rows, (len(a), len(b))."""
    squared: Float = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.maximum(squared, 0)


def matern32(squared: Float) -> tuple[Float, Float]:
    """Matern 3/2 of squared distances, and minus its derivative by them."""
    r = np.sqrt(3 * squared)
    decay = np.exp(-r)
    return (1 + r) * decay, 1.5 * decay


def matern52(squared: Float) -> tuple[Float, Float]:
    """Matern 5/2 of squared distances, and minus its derivative by them."""
    r = np.sqrt(5 * squared)
    decay = np.exp(-r)
    return (1 + r + r * r / 3) * decay, 5 / 6 * (1 + r) * decay


def gaussian(squared: Float) -> tuple[Float, Float]:
    """exp(-d / 2) of squared distances d, and minus its derivative by them."""
    value = np.exp(-0.5 * squared)
    return value, 0.5 * value


def negative_log_likelihood(p: Float, data: Scaled, y: Float, correlation: Correlation) -> tuple[float, Float, Float]:
    """Value, less a constant, gradient by p = log of (weights, slopes, scale, noise), (2 K + 2,), and by y, (N,).

    Needs no matrix for each group: the sum over pairs of G_ij |x_i - x_j|^2 is 2 sum_i (G 1)_i x_i^2 - 2 x . G x.
    """
    hyper = Hyper.of(p)
    near = data.near * np.sqrt(spread(hyper.weights, data.groups))
    line = data.line * np.sqrt(spread(hyper.slopes, data.groups))
    similar, fall = correlation(squared_distances(near, near))
    covariance = hyper.scale * similar + line @ line.T
    covariance.flat[:: len(y) + 1] += hyper.noise + JITTER
    factor = cho_factor(covariance, lower=True)
    alpha = cho_solve(factor, y)
    pull = 0.5 * (_inverse(factor[0]) - np.outer(alpha, alpha))  # derivative by the covariance matrix
    push = hyper.scale * pull * fall
    by_near = 2 * ((near**2 * push.sum(axis=1)[:, None]).sum(axis=0) - (near * (push @ near)).sum(axis=0))
    by_line = (line * (pull @ line)).sum(axis=0)
    by_weight, by_slope = (np.add.reduceat(v, data.starts) for v in (-by_near, by_line))
    by_scale, by_noise = hyper.scale * (pull * similar).sum(), hyper.noise * np.trace(pull)
    gradient = np.concatenate([by_weight, by_slope, [by_scale, by_noise]])
    return float(0.5 * y @ alpha + np.log(np.diag(factor[0])).sum()), gradient, alpha


def warped_likelihood(p: Float, data: Scaled, y: Float, best: float, correlation: Correlation) -> tuple[float, Float]:
    """`negative_log_likelihood` of the density of y where a warp of it is normal, and its gradient, (2 K + 3,).

    The last of p is the logarithm of the room between `best` and the warp's top (Snelson et al. 2004, eq. 5).  Equal
    values have no density; the slope of the warp counts once for them, or many equal to `best` would leave no room.
    """
    levels = np.unique(y)
    room = float(np.exp(p[-1]))
    warp = Warp.below(best + room, y)
    z = warp(y)
    value, gradient, by_z = negative_log_likelihood(p[:-1], data, z, correlation)
    bend = -room / (warp.top - y)  # of -log(top - y) by the logarithm of the room
    bend = bend - bend.mean()
    stretch = float((z * bend).mean())
    by_slope = (-room / (warp.top - levels)).sum() - len(levels) * stretch / warp.std
    return value - warp.log_slope(levels), np.append(gradient, by_z @ (bend - z * stretch) / warp.std - by_slope)


def _inverse(factor: Float) -> Float:
    """Inverse of the matrix whose lower Cholesky factor is given."""
    lower, _ = dpotri(factor, lower=1)
    lower = np.tril(lower)
    return lower + np.tril(lower, -1).T
