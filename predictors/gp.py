"""A Gaussian process whose kernel weighs groups of features.  N samples, F features, K groups, Q queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.optimize import minimize

Float = NDArray[np.float64]
HYPER_SAMPLES = 600  # the hyperparameters are fitted on at most so many samples, the posterior on all
STEPS = 80
CHUNK = 4096
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
        """From the vector of their logarithms, (2 K + 2,)."""
        k, found = (len(p) - 2) // 2, np.exp(p)
        return Hyper(found[:k], found[k : 2 * k], float(found[-2]), float(found[-1]))


class GroupedGP:
    """Zero-mean Gaussian process on standardised features and targets, with the kernel

        k(x, z) = s m(sum_k w_k |x_k - z_k|^2) + sum_k a_k x_k . z_k + noise,

    m: Matern 5/2 of a squared distance; x_k: the features of group k, scaled so that the mean squared distance (or
    product) of the samples is 1.  The weights w, a, the scale s and the noise maximise the marginal likelihood
    (Rasmussen and Williams 2006, sec. 5.4) times log-normal priors that keep groups without evidence at an equal, small
    weight.  Deterministic.
    """

    def __init__(self, groups: Sequence[slice]) -> None:
        self.groups = tuple(groups)

    def fit(self, x: Float, y: Float, *, start: Float | None = None, steps: int = STEPS) -> GroupedGP:
        """Learn from features (N, F) and targets (N,); `start`: the `point` of a similar fit; 0 steps keep it."""
        few = evenly(len(x), HYPER_SAMPLES)
        data = Scaled(x[few], self.groups)
        self.point, self.evidence = _maximise(data, y[few], start, steps)
        self.hyper, self.root_scales = Hyper.of(self.point), data.root_scales
        self._nodes = self._coordinates(x)
        covariance = self._kernel(self._nodes) + (self.hyper.noise + JITTER) * np.eye(len(x))
        self.factor = cho_factor(covariance, lower=True)
        self.alpha = cho_solve(self.factor, y)
        return self

    def predict(self, x: Float) -> tuple[Float, Float]:
        """Mean and standard deviation of a measured target, noise included: features (Q, F) to (Q,) each."""
        parts = [self._predict(x[i : i + CHUNK]) for i in range(0, len(x), CHUNK)]
        mean, std = (np.concatenate(column) for column in zip(*parts, strict=True))
        return mean, std

    def _predict(self, x: Float) -> tuple[Float, Float]:
        coordinates = self._coordinates(x)
        covariance = self._kernel(coordinates)
        explained = solve_triangular(self.factor[0], covariance.T, lower=True)
        prior = self.hyper.scale + (coordinates[1] ** 2).sum(axis=1) + self.hyper.noise
        variance = np.maximum(prior - (explained**2).sum(axis=0), self.hyper.noise)
        return covariance @ self.alpha, np.sqrt(variance)

    def _coordinates(self, x: Float) -> tuple[Float, Float]:
        """Features as weighed by the distance and by the product, (N, F) each."""
        return tuple(  # type: ignore[return-value]
            x * (scale * np.sqrt(_spread(weights, self.groups)))
            for scale, weights in zip(self.root_scales, (self.hyper.weights, self.hyper.slopes), strict=True)
        )

    def _kernel(self, coordinates: tuple[Float, Float]) -> Float:
        """Covariance of queries (Q, F) with the samples, without noise: (Q, N)."""
        (near, line), (near_nodes, line_nodes) = coordinates, self._nodes
        return self.hyper.scale * _matern(_squared(near, near_nodes))[0] + line @ line_nodes.T


def evenly(n: int, most: int) -> NDArray[np.int64]:
    """At most `most` of n row numbers, evenly spaced."""
    return np.linspace(0, n - 1, min(n, most)).astype(np.int64)


class Scaled:
    """Samples (N, F) with each group scaled to a mean squared distance of 1, and to a mean squared length of 1."""

    def __init__(self, x: Float, groups: Sequence[slice]) -> None:
        self.groups = tuple(groups)
        self.starts = [group.start for group in self.groups]
        squares, centred = (x**2).mean(axis=0), 2 * x.var(axis=0)
        self.root_scales = tuple(_spread(1 / np.sqrt(_group_sums(v, self.starts)), groups) for v in (centred, squares))
        self.near, self.line = (x * scale for scale in self.root_scales)


def _group_sums(values: Float, starts: Sequence[int]) -> Float:
    """Sums of values (F,) in each group, (K,); 1 where a group is constant."""
    sums = np.add.reduceat(values, starts)
    return np.where(sums > 1e-9, sums, 1.0)


def _spread(values: Float, groups: Sequence[slice]) -> Float:
    """Values of the groups (K,) repeated for each of their features, (F,)."""
    return np.repeat(values, [group.stop - group.start for group in groups])


def _squared(a: Float, b: Float) -> Float:
    """Squared distances of rows, (len(a), len(b))."""
    squared: Float = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.maximum(squared, 0)


def _matern(squared: Float) -> tuple[Float, Float]:
    """Matern 5/2 of squared distances, and minus its derivative by them."""
    r = np.sqrt(5 * squared)
    decay = np.exp(-r)
    return (1 + r + r * r / 3) * decay, 5 / 6 * (1 + r) * decay


def _maximise(data: Scaled, y: Float, start: Float | None, steps: int) -> tuple[Float, float]:
    """Logarithms of the hyperparameters with the largest posterior, (2 K + 2,), and its logarithm."""
    k = len(data.groups)
    center = np.concatenate([np.full(2 * k, -np.log(k)), [0.0, np.log(0.01)]])
    spread = np.concatenate([np.full(2 * k, 1.5), [3.0, 2.5]])

    def objective(p: Float) -> tuple[float, Float]:
        value, gradient = negative_log_likelihood(p, data, y)
        away = (p - center) / spread
        return value + 0.5 * away @ away, gradient + away / spread

    start = center if start is None else start
    if not steps:
        return start, -objective(start)[0]
    bounds = [(value - 12, value + 12) for value in center]
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps})
    return found.x, -float(found.fun)


def negative_log_likelihood(p: Float, data: Scaled, y: Float) -> tuple[float, Float]:
    """Value, less a constant, and gradient by p = log of (weights, slopes, scale, noise), (2 K + 2,).

    Needs no matrix for each group: the sum over pairs of G_ij |x_i - x_j|^2 is 2 sum_i (G 1)_i x_i^2 - 2 x . G x.
    """
    hyper = Hyper.of(p)
    near = data.near * np.sqrt(_spread(hyper.weights, data.groups))
    line = data.line * np.sqrt(_spread(hyper.slopes, data.groups))
    similar, fall = _matern(_squared(near, near))
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
    return float(0.5 * y @ alpha + np.log(np.diag(factor[0])).sum()), gradient


def _inverse(factor: Float) -> Float:
    """Inverse of the matrix whose lower Cholesky factor is given."""
    lower, _ = dpotri(factor, lower=1)
    lower = np.tril(lower)
    return lower + np.tril(lower, -1).T
