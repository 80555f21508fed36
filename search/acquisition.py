"""How much a network is expected to add, were it measured.  N candidates, M objectives, F networks on the front.

Costs, lower is better.  A column that is known exactly has a standard deviation of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, ndtr

from search.pareto import front, hypervolume

Floats = NDArray[np.float64]
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(9)  # of a standard normal distribution
WEIGHTS = WEIGHTS / WEIGHTS.sum()
APART, SHARE = 2, 1 / 3  # how wide a gap is, in extents of what lies before it, and how much lies there at least
SPANS = 4  # of 1, 2, 4 and 8 the fewest measurements on NAS-Bench-Macro, with and without a limit


@dataclass(frozen=True, slots=True)
class Warp:
    """A scale of costs on which the good ones are as far apart as the bad ones: log(cost - lowest + scale).

    scale: SPANS times the way from the lowest cost to the median.  Bad networks are far worse than good ones differ
    among each other; on this scale a model spends its effort on the good ones.
    most: how far above the lowest a cost counts.  Those of networks that collapsed lie apart from all others, and tell
    of these no more than that they are worse.
    """

    lowest: float
    scale: float
    most: float

    @staticmethod
    def of(cost: Floats) -> Warp:
        """The scale for measured costs (N,)."""
        lowest = float(cost.min())
        above = np.sort(cost - lowest)
        most = _most(above)
        return Warp(lowest, SPANS * float(np.median(np.minimum(above, most))) or float(np.std(cost)) or 1.0, most)

    def __call__(self, cost: Floats) -> Floats:
        """Costs on this scale; none may lie `scale` or more below the lowest."""
        return np.log(np.minimum(cost - self.lowest, self.most) + self.scale)

    def back(self, warped: Floats) -> Floats:
        """Costs from this scale, those beyond `most` as if they were there."""
        return np.exp(warped) + self.lowest - self.scale


def _most(above: Floats) -> float:
    """Somewhat more than what lies before the widest gap of ascending costs (N,), where the rest is far from it."""
    gaps = np.diff(above)
    last = int(gaps.argmax()) if len(gaps) else 0
    if last + 1 < SHARE * len(above) or not above[last] or gaps[last] <= APART * above[last]:
        return np.inf
    return 1.5 * float(above[last])


def expected_improvement(mean: Floats, std: Floats, best: float | Floats) -> Floats:
    """Expected gain below `best` of normal costs, E[max(best - cost, 0)] (Jones et al. 1998, eq. 15)."""
    gap = best - mean
    z = gap / np.maximum(std, 1e-12)
    density = np.exp(-0.5 * np.minimum(z**2, 1400)) / np.sqrt(2 * np.pi)
    return np.where(std > 1e-12, gap * ndtr(z) + std * density, np.maximum(gap, 0))


def log_improvement(mean: Floats, std: Floats, best: float) -> Floats:
    """Logarithm of the expected improvement, which still ranks candidates where the improvement itself rounds to 0."""
    std = np.maximum(std, 1e-12)
    z = (best - mean) / std
    value = expected_improvement(mean, std, best)
    # density + z Phi(z) = density * (1 - a Phi(-a) / density), a = -z, the ratio by erfcx (Ament et al. 2023, eq. 9)
    a = -np.minimum(z, -1)
    rest = np.where(a < 1e5, 1 - a * np.sqrt(np.pi / 2) * erfcx(a / np.sqrt(2)), 1 / a**2)
    tail = np.log(std) - a**2 / 2 - np.log(2 * np.pi) / 2 + np.log(rest)
    return np.where(z > -1, np.log(np.maximum(value, 1e-300)), tail)


def added_volume(cost: Floats, known: Floats, corner: Floats) -> Floats:
    """Growth of the hypervolume by each of N networks alone, for two objectives: cost (N, 2), known (F, 2), to (N,).

    A network of the costs (a, b) adds, over every first cost from a to the corner, how far b lies below the least
    second cost so far: a sum over the steps of the front.
    """
    steps = _staircase(known, corner)
    right = np.append(steps[1:, 0], corner[0])
    width = np.maximum(right - np.maximum(steps[:, 0], cost[:, :1]), 0)
    return (width * np.maximum(steps[:, 1] - cost[:, 1:], 0)).sum(axis=1)


def added_volumes(cost: Floats, known: Floats, corner: Floats) -> Floats:
    """The same for any number of objectives, one network after another (N,)."""
    if cost.shape[1] == 2:
        return added_volume(cost, known, corner)
    before = hypervolume(known, corner)
    return np.array([hypervolume(np.concatenate([known, row[None]]), corner) - before for row in cost])


def _staircase(known: Floats, corner: Floats) -> Floats:
    """Steps (first cost from which on, least second cost there), from -inf on, (F + 1, 2)."""
    inside = known[(known < corner).all(axis=1)]
    inside = inside[front(inside, np.zeros(len(inside)))]
    inside = inside[np.argsort(inside[:, 0])]
    return np.concatenate([[[-np.inf, corner[1]]], inside])
