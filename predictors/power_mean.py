"""Latency as a power mean of a few costs, fitted robustly.  N samples, T costs.

A device that adds up its costs has power 1; one that hides all but the largest behind it (launching behind computing
behind moving data, the roofline of Williams et al. 2009) a large power; power 0 is the geometric mean, which lets
latency grow more slowly than a cost.  Weights are never negative: no cost makes a network faster (stacked regression,
Breiman 1996), which is what makes a few samples enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Float = NDArray[np.float64]
POWERS = (0, 1, 2, 4, 8)
TRIM = 2.5  # robust standard deviations beyond which a measurement was disturbed
ROUNDS = 10


@dataclass(frozen=True)
class PowerMean:
    """log latency = offset + log(sum_t w_t exp(p x_t)) / p, or offset + sum_t w_t x_t where p = 0.

    weights: (T,), not negative; centre: (T,), what is taken off the log costs x first.
    """

    power: float
    weights: Float
    centre: Float
    offset: float

    def __call__(self, x: Float) -> Float:
        """Log costs (N, T) to log latency (N,)."""
        away = x - self.centre
        if self.power == 0:
            return self.offset + away @ self.weights
        return self.offset + np.log(np.exp(self.power * away) @ self.weights + 1e-300) / self.power


def fit_power_mean(x: Float, y: Float, powers: Sequence[float] = POWERS) -> PowerMean:
    """The power mean of log costs (N, T) that explains log latencies (N,) best, with as few costs as that takes.

    Disturbed measurements are left out: absolute errors first, then squared ones within `TRIM` robust deviations.  The
    power and the costs minimise the Bayesian information criterion of the remaining error.
    """
    found = [_prune(x, y, power) for power in powers]
    return min(found, key=lambda pair: pair[1])[0]


def robust_scale(residuals: Float) -> float:
    """Median absolute deviation, scaled to the standard deviation of a normal distribution; above 0."""
    return max(1.4826 * float(np.median(np.abs(residuals - np.median(residuals)))), 1e-6)


def undisturbed(residuals: Float) -> NDArray[np.bool_]:
    """Which samples lie within `TRIM` robust deviations of the median, (N,)."""
    return np.abs(residuals - np.median(residuals)) <= TRIM * robust_scale(residuals)


def _prune(x: Float, y: Float, power: float) -> tuple[PowerMean, float]:
    """The fit without the costs that do not earn their place, and its criterion."""
    kept = list(range(x.shape[1]))
    best, least = _robust(x, y, power, kept)
    while len(kept) > 1:
        tried = [(_robust(x, y, power, [k for k in kept if k != drop]), drop) for drop in kept]
        (model, value), drop = min(tried, key=lambda entry: entry[0][1])
        if value > least:
            break
        best, least = model, value
        kept.remove(drop)
    return best, least


def _robust(x: Float, y: Float, power: float, kept: Sequence[int]) -> tuple[PowerMean, float]:
    weight: Float = np.ones(len(y))
    for turn in range(ROUNDS):
        model = _weighted(x, y, power, kept, weight)
        residuals = y - model(x)
        away = np.abs(residuals - np.median(residuals))
        if turn < ROUNDS // 2:
            weight = 1 / np.maximum(away, 0.3 * robust_scale(residuals))
        else:
            weight = undisturbed(residuals).astype(np.float64)
    shift = float(residuals[undisturbed(residuals)].mean())
    error = np.minimum(np.abs(residuals - shift), TRIM * robust_scale(residuals)).mean()
    criterion = 2 * len(y) * np.log(error + 1e-6) + (len(kept) + 1) * np.log(len(y))
    return PowerMean(power, model.weights, model.centre, model.offset + shift), float(criterion)


def _weighted(x: Float, y: Float, power: float, kept: Sequence[int], weight: Float) -> PowerMean:
    """Least squares of the relative error with a weight for each sample."""
    weights, root = np.zeros(x.shape[1]), np.sqrt(weight / weight.sum())
    if power == 0:
        centre, level = root**2 @ x, float(root**2 @ y)
        design, target = (x - centre)[:, kept] * root[:, None], (y - level) * root
    else:
        centre, level = np.median(x, axis=0), float(np.median(y))
        design, target = np.exp(power * ((x - centre)[:, kept] - (y - level)[:, None])) * root[:, None], root
    scale = np.maximum(np.sqrt((design**2).sum(axis=0)), 1e-12)
    weights[kept] = nnls(design / scale, target)[0] / scale
    return PowerMean(power, weights, centre, level)
