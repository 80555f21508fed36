"""Targets that saturate, made even.  N samples, Q queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Warp:
    """z = (-log(top - y) - mean) / std: a target that saturates at `top` made even, the more so the nearer top is.

    Accuracy saturates: a block more is worth points in a small network and hundredths in a large one.
    """

    top: float
    mean: float
    std: float

    @staticmethod
    def below(top: float, y: Float) -> Warp:
        """The warp with this top, above all of y (N,), under which y is standardised."""
        z = -np.log(top - y)
        return Warp(top, float(z.mean()), float(z.std()) or 1.0)

    def __call__(self, y: Float) -> Float:
        """Targets (N,), below top, to even ones (N,)."""
        return (-np.log(self.top - y) - self.mean) / self.std

    def log_slope(self, y: Float) -> float:
        """Sum of log dz/dy: what the density of z gains as a density of y."""
        return -float(np.log(self.top - y).sum()) - len(y) * float(np.log(self.std))

    def back(self, mean: Float, std: Float) -> tuple[Float, Float]:
        """Mean and standard deviation of y where z is normal: of a log-normal distance from the top, (Q,) each."""
        mean, std = mean * self.std + self.mean, std * self.std
        gap = np.exp(-mean + 0.5 * std**2)
        return self.top - gap, gap * np.sqrt(np.expm1(std**2))
