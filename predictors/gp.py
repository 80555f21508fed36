"""Gaussian processes whose kernel weighs groups of features.  N samples, F features, K groups, Q queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

from predictors.likelihood import (
    JITTER,
    Correlation,
    Hyper,
    Scaled,
    matern52,
    negative_log_likelihood,
    spread,
    squared_distances,
    warped_likelihood,
)
from predictors.warp import Warp

Float = NDArray[np.float64]
HYPER_SAMPLES = 600  # the hyperparameters are fitted on at most so many samples, the posterior on all
SCREEN_SAMPLES = 200  # of a warped process: first on at most so many
STEPS = 80
POLISH_STEPS = 25  # from those samples to all
CHUNK = 4096


class GroupedGP:
    """Zero-mean Gaussian process on standardised features and targets, with the kernel

        k(x, z) = s m(sum_k w_k |x_k - z_k|^2) + sum_k a_k x_k . z_k + noise,

    m: `correlation` of a squared distance; x_k: the features of group k, scaled so that the mean squared distance (or
    product) of the samples is 1.  The weights w, a, the scale s and the noise maximise the marginal likelihood
    (Rasmussen and Williams 2006, sec. 5.4) times log-normal priors that keep groups without evidence at an equal, small
    weight, or at exp(`slopes[k]`) of it for the products of group k.  Deterministic.
    """

    def __init__(
        self, groups: Sequence[slice], *, slopes: Sequence[float] = (), correlation: Correlation = matern52
    ) -> None:
        self.groups, self.slopes, self.correlation = tuple(groups), tuple(slopes), correlation

    def fit(self, x: Float, y: Float, *, start: Float | None = None, steps: int = STEPS) -> GroupedGP:
        """Learn from features (N, F) and targets (N,); `start`: the `point` of a similar fit; 0 steps keep it."""
        few = evenly(len(x), HYPER_SAMPLES)
        data = Scaled(x[few], self.groups)
        self.point, self.evidence = self._maximise(data, y, few, start, steps)
        self.hyper, self.root_scales = Hyper.of(self.point), data.root_scales
        self._nodes = self._coordinates(x)
        covariance = self._kernel(self._nodes) + (self.hyper.noise + JITTER) * np.eye(len(x))
        self.factor = cho_factor(covariance, lower=True)
        self.alpha = cho_solve(self.factor, self._even(y))
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

    def _even(self, y: Float) -> Float:
        """What is normal, (N,)."""
        return y

    def _prior(self) -> tuple[Float, Float]:
        """Centre and standard deviation of the logarithms of (weights, slopes, scale, noise), (2 K + 2,)."""
        k = len(self.groups)
        slopes = np.array(self.slopes or [0.0] * k)
        centre = np.concatenate([np.full(k, -np.log(k)), slopes - np.log(k), [0.0, np.log(0.01)]])
        return centre, np.concatenate([np.full(2 * k, 1.5), [3.0, 2.5]])

    def _likelihood(self, data: Scaled, y: Float, few: NDArray[np.int64]) -> Callable[[Float], tuple[float, Float]]:
        def likelihood(p: Float) -> tuple[float, Float]:
            value, gradient, _ = negative_log_likelihood(p, data, y[few], self.correlation)
            return value, gradient

        return likelihood

    def _maximise(
        self, data: Scaled, y: Float, few: NDArray[np.int64], start: Float | None, steps: int
    ) -> tuple[Float, float]:
        """Logarithms of the hyperparameters with the largest posterior, and its logarithm."""
        (centre, width), likelihood = self._prior(), self._likelihood(data, y, few)

        def objective(p: Float) -> tuple[float, Float]:
            value, gradient = likelihood(p)
            away = (p - centre) / width
            return value + 0.5 * float(away @ away), gradient + away / width

        start = centre if start is None else start
        if not steps:
            return start, -objective(start)[0]
        bounds = np.stack([centre - 8 * np.minimum(width, 1.5), centre + 8 * np.minimum(width, 1.5)], axis=1)
        found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps})
        return found.x, -float(found.fun)

    def _coordinates(self, x: Float) -> tuple[Float, Float]:
        """Features as weighed by the distance and by the product, (N, F) each."""
        return tuple(  # type: ignore[return-value]
            x * (scale * np.sqrt(spread(weights, self.groups)))
            for scale, weights in zip(self.root_scales, (self.hyper.weights, self.hyper.slopes), strict=True)
        )

    def _kernel(self, coordinates: tuple[Float, Float]) -> Float:
        """Covariance of queries (Q, F) with the samples, without noise: (Q, N)."""
        (near, line), (near_nodes, line_nodes) = coordinates, self._nodes
        return self.hyper.scale * self.correlation(squared_distances(near, near_nodes))[0] + line @ line_nodes.T


class WarpedGP(GroupedGP):
    """`GroupedGP` of a target that saturates: of z = -log(top - y).

    How far the top is above the best sample, its room, is one more hyperparameter (Snelson et al. 2004), with a
    log-normal prior around 2 standard deviations of the samples; a room of many is no warp at all.
    """

    def fit(self, x: Float, y: Float, *, start: Float | None = None, steps: int = STEPS) -> WarpedGP:
        """Learn from features (N, F) and targets (N,); with many, the hyperparameters from few of them first."""
        if start is None and len(y) > SCREEN_SAMPLES:
            few = evenly(len(y), SCREEN_SAMPLES)
            start, steps = self._like().fit(x[few], y[few]).point, POLISH_STEPS
        super().fit(x, y, start=start, steps=steps)
        return self

    def refit(self, x: Float, y: Float) -> WarpedGP:
        """A process on other samples, most of them among those of this one: its hyperparameters are the start.

        Above SCREEN_SAMPLES samples they stay as they are: a few samples more or less move them little.
        """
        return self._like().fit(x, y, start=self.point, steps=0 if len(y) > SCREEN_SAMPLES else STEPS // 4)

    def _like(self) -> WarpedGP:
        """An unfitted process of the same kind."""
        return WarpedGP(self.groups, slopes=self.slopes, correlation=self.correlation)

    def predict(self, x: Float) -> tuple[Float, Float]:
        """Mean and standard deviation of a measured target, noise included: features (Q, F) to (Q,) each."""
        return self.warp.back(*super().predict(x))

    def _even(self, y: Float) -> Float:
        self.warp = Warp.below(float(y.max() + np.exp(self.point[-1])), y)
        return self.warp(y)

    def _prior(self) -> tuple[Float, Float]:
        centre, width = super()._prior()
        return np.append(centre, np.log(2.0)), np.append(width, 1.2)

    def _likelihood(self, data: Scaled, y: Float, few: NDArray[np.int64]) -> Callable[[Float], tuple[float, Float]]:
        return lambda p: warped_likelihood(p, data, y[few], float(y.max()), self.correlation)


def evenly(n: int, most: int) -> NDArray[np.int64]:
    """At most `most` of n row numbers, evenly spaced."""
    return np.linspace(0, n - 1, min(n, most)).astype(np.int64)
