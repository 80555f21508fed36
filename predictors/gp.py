"""A Gaussian process whose kernel weighs groups of features.  N samples, F features, K groups, Q queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

Float = NDArray[np.float64]
HYPER_SAMPLES = 600  # the hyperparameters are fitted on at most so many samples, the posterior on all
CHUNK = 4096
JITTER = 1e-6


class GroupedGP:
    """Zero-mean Gaussian process on standardised features and targets, with the kernel

        k(x, z) = s exp(-1/2 sum_k w_k |x_k - z_k|^2) + sum_k a_k x_k . z_k + noise,

    x_k: the features of group k, scaled so that the mean squared distance (or product) of the samples is 1.  The
    weights w, a, the scale s and the noise maximise the marginal likelihood (Rasmussen and Williams 2006, sec. 5.4)
    times log-normal priors that keep groups without evidence at an equal, small weight.  Deterministic.
    """

    def __init__(self, groups: Sequence[slice]) -> None:
        self.groups = tuple(groups)

    def fit(self, x: Float, y: Float) -> GroupedGP:
        """Learn from features (N, F) and targets (N,)."""
        few = np.linspace(0, len(x) - 1, min(len(x), HYPER_SAMPLES)).astype(int)
        distances, products = self._grams(x[few])
        self.distance_scale, self.product_scale = _mean(distances), _mean(products.diagonal(axis1=1, axis2=2))
        distances /= self.distance_scale[:, None, None]
        products /= self.product_scale[:, None, None]
        self.weights, self.slopes, self.scale, self.noise = _hyperparameters(distances, products, y[few])
        self.x = x
        covariance = self._kernel(x) + (self.noise + JITTER) * np.eye(len(x))
        self.factor = cho_factor(covariance, lower=True)
        self.alpha = cho_solve(self.factor, y)
        return self

    def predict(self, x: Float) -> tuple[Float, Float]:
        """Mean and standard deviation of the noiseless target, features (Q, F) to (Q,) each."""
        parts = [self._predict(x[i : i + CHUNK]) for i in range(0, len(x), CHUNK)]
        mean, std = (np.concatenate(column) for column in zip(*parts, strict=True))
        return mean, std

    def _predict(self, x: Float) -> tuple[Float, Float]:
        covariance = self._kernel(x)
        explained = solve_triangular(self.factor[0], covariance.T, lower=True)
        prior = self.scale + (self._weighted(x, self.slopes / self.product_scale) ** 2).sum(axis=1)
        return covariance @ self.alpha, np.sqrt(np.maximum(prior - (explained**2).sum(axis=0), 0))

    def _kernel(self, x: Float) -> Float:
        """Covariance of queries (Q, F) with the samples, without noise: (Q, N)."""
        a, b = (self._weighted(v, self.weights / self.distance_scale) for v in (x, self.x))
        distance = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
        slopes = self.slopes / self.product_scale
        return self.scale * np.exp(-0.5 * distance) + self._weighted(x, slopes) @ self._weighted(self.x, slopes).T

    def _weighted(self, x: Float, weights: Float) -> Float:
        return np.concatenate([x[:, g] * np.sqrt(w) for g, w in zip(self.groups, weights, strict=True)], axis=1)

    def _grams(self, x: Float) -> tuple[Float, Float]:
        """Squared distances and inner products of all pairs in each group, (K, N, N) each."""
        products = np.stack([x[:, g] @ x[:, g].T for g in self.groups])
        squares = products.diagonal(axis1=1, axis2=2)
        return squares[:, :, None] + squares[:, None, :] - 2 * products, products


def _mean(values: Float) -> Float:
    """Mean in each group; 1 where a group is constant."""
    mean = values.reshape(len(values), -1).mean(axis=1)
    return np.where(mean > 1e-9, mean, 1.0)


def _hyperparameters(distances: Float, products: Float, y: Float) -> tuple[Float, Float, float, float]:
    k = len(distances)
    start = np.concatenate([np.full(2 * k, -np.log(k)), [0.0, np.log(0.01)]])
    spread = np.concatenate([np.full(2 * k, 1.5), [3.0, 2.5]])

    def objective(p: Float) -> tuple[float, Float]:
        value, gradient = _negative_log_likelihood(p, distances, products, y)
        away = (p - start) / spread
        return value + 0.5 * away @ away, gradient + away / spread

    bounds = [(value - 12, value + 12) for value in start]
    found = np.exp(minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 200}).x)
    return found[:k], found[k : 2 * k], float(found[-2]), float(found[-1])


def _negative_log_likelihood(p: Float, distances: Float, products: Float, y: Float) -> tuple[float, Float]:
    """Value and gradient by p = log of (weights, slopes, scale, noise)."""
    k = len(distances)
    weights, slopes, scale, noise = np.exp(p[:k]), np.exp(p[k : 2 * k]), np.exp(p[-2]), np.exp(p[-1])
    smooth = scale * np.exp(-0.5 * np.tensordot(weights, distances, 1))
    identity = np.eye(len(y))
    factor = cho_factor(smooth + np.tensordot(slopes, products, 1) + (noise + JITTER) * identity, lower=True)
    alpha = cho_solve(factor, y)
    pull = 0.5 * (cho_solve(factor, identity) - np.outer(alpha, alpha))  # derivative by the covariance matrix
    by_weight = -0.5 * weights * np.tensordot(distances, pull * smooth, 2)
    by_slope = slopes * np.tensordot(products, pull, 2)
    gradient = np.concatenate([by_weight, by_slope, [(pull * smooth).sum(), noise * np.trace(pull)]])
    return float(0.5 * y @ alpha + np.log(np.diag(factor[0])).sum()), gradient
