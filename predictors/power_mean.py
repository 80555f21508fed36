"""Latency as a power mean of a few costs, fitted robustly.  N samples, T costs.

A device that adds up its costs has power 1; one that hides all but the largest behind it (launching behind computing
behind moving data, the roofline of Williams et al. 2009) a large power; power 0 is the geometric mean, which lets
latency grow more slowly than a cost.  Weights are never negative: no cost makes a network faster (stacked regression,
Breiman 1996), which is what makes a few samples enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from predictors.averaged import shares

Float = NDArray[np.float64]
POWERS = (0, 1, 2, 4, 8)
TRIM = 2.5  # robust standard deviations beyond which a measurement was disturbed
ROUNDS = 10
PRICE = 3.0  # of a cost that may mislead, in those of one that does not


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


@dataclass(frozen=True)
class AveragedMean:
    """Power means, averaged by how probable each is; shares: (M,), of M members, 1 in all."""

    members: Sequence[PowerMean]
    shares: Float

    def __call__(self, x: Float) -> Float:
        """Log costs (N, T) to log latency (N,)."""
        return np.asarray(self.shares @ np.stack([member(x) for member in self.members]))


def fit_power_mean(x: Float, y: Float, *, donors: int = 0, powers: Sequence[float] = POWERS) -> AveragedMean:
    """Power means of log costs (N, T) that explain log latencies (N,), each with as few costs as that takes.

    Disturbed measurements are left out: absolute errors first, then squared ones within `TRIM` robust deviations.  The
    costs of each power minimise the Bayesian information criterion, by which the powers are averaged: few measurements
    do not tell them apart (Hoeting et al. 1999).  donors: how many of the first costs are latencies of other devices;
    whether these have anything to do with this one is not known, so each must explain as much as `PRICE` other costs,
    and the fits without any count too.
    """
    own = list(range(donors, x.shape[1]))
    sets = [list(range(x.shape[1])), own] if donors else [own]
    prices = np.where(np.arange(x.shape[1]) < donors, PRICE, 1.0)
    most = TRIM * float(np.median([robust_scale(y - _robust(x, y, power, own)(x)) for power in powers]))
    found = [_prune(x, y, power, kept, prices=prices, most=most) for power in powers for kept in sets]
    weights = shares([-criterion / 2 for _, criterion in found])
    return AveragedMean(
        [model for (model, _), weight in zip(found, weights, strict=True) if weight], weights[weights > 0]
    )


def robust_scale(residuals: Float) -> float:
    """Median absolute deviation, scaled to the standard deviation of a normal distribution; above 0."""
    return max(1.4826 * float(np.median(np.abs(residuals - np.median(residuals)))), 1e-6)


def undisturbed(residuals: Float) -> NDArray[np.bool_]:
    """Which samples lie within `TRIM` robust deviations of the median, (N,)."""
    return np.abs(residuals - np.median(residuals)) <= TRIM * robust_scale(residuals)


def _prune(
    x: Float, y: Float, power: float, kept: Sequence[int], *, prices: Float, most: float
) -> tuple[PowerMean, float]:
    """The fit without those of the kept costs that do not earn their place, and its criterion.

    prices: of each cost, (T,); most: the error beyond which none counts more.  It is the same for all fits: one that
    took its own would win by meeting half of the measurements exactly.
    """

    def fit(kept: Sequence[int]) -> tuple[PowerMean, float]:
        model = _robust(x, y, power, kept)
        error = np.minimum(np.abs(y - model(x)), most).mean()
        return model, float(2 * len(y) * np.log(error + 1e-6) + (prices[kept].sum() + 1) * np.log(len(y)))

    best, least = fit(kept)
    while len(kept) > 1:
        tried = [[k for k in kept if k != drop] for drop in kept]
        fewer, (model, value) = min(zip(tried, map(fit, tried), strict=True), key=lambda entry: entry[1][1])
        if value > least:
            break
        kept, best, least = fewer, model, value
    return best, least


def _robust(x: Float, y: Float, power: float, kept: Sequence[int]) -> PowerMean:
    weight: Float = np.ones(len(y))
    for turn in range(ROUNDS):
        model = _weighted(x, y, power, kept, weight)
        residuals = y - model(x)
        away = np.abs(residuals - np.median(residuals))
        if turn < ROUNDS // 2:
            weight = 1 / np.maximum(away, 0.3 * robust_scale(residuals))
        else:
            weight = undisturbed(residuals).astype(np.float64)
    return replace(model, offset=model.offset + float(residuals[undisturbed(residuals)].mean()))


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
