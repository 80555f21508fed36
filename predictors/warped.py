"""Gaussian processes of a saturating target, averaged by their evidence.  N samples, F features, Q queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from predictors.gp import HYPER_SAMPLES, STEPS, GroupedGP, evenly

Float = NDArray[np.float64]
ROOMS = (2.0, np.inf, 5.0, 1.0, 0.4)  # standard deviations between the best sample and the top
LEAST_WEIGHT = 0.05
SCREEN_SAMPLES = 200  # rooms are compared on at most so many samples
POLISH_STEPS = 25  # of the hyperparameters, from those samples to all


@dataclass(frozen=True, slots=True)
class Warp:
    """z = (-log(top - y) - mean) / std: a target that saturates at `top` made even; top = inf leaves it as it is."""

    top: float
    mean: float = 0.0
    std: float = 1.0

    @staticmethod
    def above(y: Float, room: float) -> Warp:
        """The warp whose top is `room` standard deviations above the largest target."""
        if np.isinf(room):
            return Warp(np.inf, float(y.mean()), float(y.std()) or 1.0)
        top = float(y.max() + room * (y.std() or 1.0))
        z = -np.log(top - y)
        return Warp(top, float(z.mean()), float(z.std()) or 1.0)

    def __call__(self, y: Float) -> Float:
        """Targets (N,), below top, to even ones (N,)."""
        return ((y if np.isinf(self.top) else -np.log(self.top - y)) - self.mean) / self.std

    def log_slope(self, y: Float) -> float:
        """Sum of log dz/dy: what the density of z gains as a density of y."""
        slopes = 0.0 if np.isinf(self.top) else float(-np.log(self.top - y).sum())
        return slopes - len(y) * float(np.log(self.std))

    def back(self, mean: Float, std: Float) -> tuple[Float, Float]:
        """Mean and standard deviation of y where z is normal: of a log-normal distance from the top."""
        mean, std = mean * self.std + self.mean, std * self.std
        if np.isinf(self.top):
            return mean, std
        gap = np.exp(-mean + 0.5 * std**2)
        return self.top - gap, gap * np.sqrt(np.expm1(std**2))


class WarpedGP:
    """`GroupedGP` on targets warped by `Warp`, one for each room above the best sample, averaged by evidence.

    Accuracy saturates: a block more is worth points in a small network and hundredths in a large one.  How strongly is
    not known before; the marginal likelihood (with the Jacobian of the warp) weighs the rooms (Snelson et al. 2004).
    """

    def __init__(self, groups: Sequence[slice], rooms: Sequence[float] = ROOMS) -> None:
        self.groups, self.rooms = tuple(groups), tuple(rooms)

    def fit(self, x: Float, y: Float) -> WarpedGP:
        """Learn from features (N, F) and targets (N,)."""
        few = evenly(len(y), SCREEN_SAMPLES)
        points: dict[float, Float] = {}
        evidence = []
        for room in self.rooms:
            warp = Warp.above(y, room)
            start, steps = (points[self.rooms[0]], STEPS // 4) if points else (None, STEPS)
            screened = GroupedGP(self.groups).fit(x[few], warp(y[few]), start=start, steps=steps)
            points[room] = screened.point
            evidence.append(screened.evidence + warp.log_slope(y[few]))
        kept = {room: points[room] for room, share in zip(self.rooms, _shares(evidence), strict=True) if share > 0}
        return self._fit(kept, x, y, POLISH_STEPS if len(y) > len(few) else 0)

    def refit(self, x: Float, y: Float) -> WarpedGP:
        """A process on other samples, most of them among those of this one: its rooms, its hyperparameters as a start.

        Above SCREEN_SAMPLES samples the hyperparameters stay as they are: a few samples more or less move them little.
        """
        return WarpedGP(self.groups, self.rooms)._fit(self.points, x, y, 0 if len(y) > SCREEN_SAMPLES else STEPS // 4)

    def _fit(self, starts: Mapping[float, Float], x: Float, y: Float, steps: int) -> WarpedGP:
        """Fit a process for each room, from its start."""
        few = evenly(len(y), HYPER_SAMPLES)
        warps = [Warp.above(y, room) for room in starts]
        pairs = zip(warps, starts.values(), strict=True)
        fitted = [(w, GroupedGP(self.groups).fit(x, w(y), start=point, steps=steps)) for w, point in pairs]
        shares = _shares([process.evidence + warp.log_slope(y[few]) for warp, process in fitted])
        self.points = {room: process.point for room, (_, process) in zip(starts, fitted, strict=True)}
        self.weights = shares[shares > 0]
        self.members = [member for member, share in zip(fitted, shares, strict=True) if share > 0]
        return self

    def predict(self, x: Float) -> tuple[Float, Float]:
        """Mean and standard deviation of a measured target, noise included: features (Q, F) to (Q,) each."""
        each = [warp.back(*process.predict(x)) for warp, process in self.members]
        means, stds = (np.stack(column) for column in zip(*each, strict=True))
        mean = self.weights @ means
        return mean, np.sqrt(np.maximum(self.weights @ (means**2 + stds**2) - mean**2, 0))


def _shares(evidence: Sequence[float]) -> Float:
    """Posterior probabilities of models with these log evidences; those under LEAST_WEIGHT count as 0."""
    weights = np.exp(np.array(evidence) - max(evidence))
    weights = np.where(weights >= LEAST_WEIGHT * weights.sum(), weights, 0)
    return np.asarray(weights / weights.sum())
