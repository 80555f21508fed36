"""Standard deviations made to match the errors that were seen.  N samples, Q queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Float = NDArray[np.float64]
LEAST = 1e-3
USUAL, FAR = 0.8, 4.0  # share of the errors that tell how large errors are; how much larger one may count


@dataclass(frozen=True, slots=True)
class Calibration:
    """Factors of a model's deviations: among networks like the samples, and among better ones than `best`, the best.

    A search asks about networks that are better than all it has measured, where the errors of random folds say nothing:
    a fit on the worse half of the samples, tested on their better half, makes errors of that kind.
    """

    within: float
    beyond: float
    best: float

    def __call__(self, mean: Float, std: Float) -> Float:
        """Deviations (Q,) between the two factors, as probable as it is that the network is better than `best`."""
        better = norm.cdf((mean - self.best) / (self.within * std))
        return np.asarray(std * np.sqrt(self.within**2 * (1 - better) + self.beyond**2 * better))


def error_ratio(measured: Float, mean: Float, std: Float) -> float:
    """Root of the mean squared error in deviations, from (N,) each; no less than `LEAST`, where all are equal.

    A few errors that are far beyond what a normal distribution with the others' spread has, as of a network that
    collapsed, do not count in full: they would say nothing of any other network.
    """
    z = np.abs((measured - mean) / std)
    usual = np.quantile(z, USUAL) / norm.ppf((1 + USUAL) / 2)
    return max(LEAST, float(np.sqrt(np.mean(np.minimum(z, FAR * usual) ** 2))))
