"""Gaussian processes of different smoothness, averaged by their evidence.  N samples, F features, Q queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from predictors.gp import WarpedGP
from predictors.likelihood import gaussian, matern32

Float = NDArray[np.float64]
LEAST_WEIGHT = 0.05


class AveragedGP:
    """`WarpedGP` with a rough and with a smooth kernel, averaged by evidence (Hoeting et al. 1999).

    Measured accuracies of a supernet's subnets are rough functions of their genes, those of networks trained one by one
    smooth ones; which they are is seen from the samples, and where they do not tell, both count.
    """

    def __init__(self, groups: Sequence[slice], slopes: Sequence[float] = ()) -> None:
        self.members = [WarpedGP(groups, slopes=slopes, correlation=kernel) for kernel in (matern32, gaussian)]

    def fit(self, x: Float, y: Float) -> AveragedGP:
        """Learn from features (N, F) and targets (N,)."""
        return self._keep([member.fit(x, y) for member in self.members])

    def refit(self, x: Float, y: Float) -> AveragedGP:
        """The same kernels on other samples, most of them among those of this one: see `WarpedGP.refit`."""
        return AveragedGP(())._keep([member.refit(x, y) for member in self.members])

    def _keep(self, fitted: Sequence[WarpedGP]) -> AveragedGP:
        weights = shares([member.evidence for member in fitted])
        self.members = [member for member, weight in zip(fitted, weights, strict=True) if weight > 0]
        self.weights = weights[weights > 0]
        return self

    def predict(self, x: Float) -> tuple[Float, Float]:
        """Mean and standard deviation of a measured target, noise included: features (Q, F) to (Q,) each."""
        means, stds = (np.stack(column) for column in zip(*(m.predict(x) for m in self.members), strict=True))
        mean = self.weights @ means
        return mean, np.sqrt(np.maximum(self.weights @ (means**2 + stds**2) - mean**2, 0))


def shares(evidence: Sequence[float]) -> Float:
    """Posterior probabilities of models with these log evidences; those under LEAST_WEIGHT count as 0."""
    weights = np.exp(np.array(evidence) - max(evidence))
    weights = np.where(weights >= LEAST_WEIGHT * weights.sum(), weights, 0)
    return np.asarray(weights / weights.sum())
