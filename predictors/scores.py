"""How well a prediction agrees with what was measured.  N architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ofa.errors import UserError
from ofa.space import Genes

Float = NDArray[np.float64]


class Learned(Protocol):
    """A predictor that learns from measured architectures."""

    def fit(self, genes: Genes, values: ArrayLike) -> Self:
        """Learn from genes (N, G) and their measured values (N,)."""

    def __call__(self, genes: Genes) -> Float:
        """Predicted values, (N,)."""


def kendall_tau(predicted: ArrayLike, measured: ArrayLike) -> float:
    """Rank correlation tau-b: 1 for the same order, -1 for the reverse, 0 where one of the two is constant."""
    from scipy.stats import kendalltau

    tau = kendalltau(*_pair(predicted, measured)).statistic
    return 0.0 if np.isnan(tau) else float(tau)


def rmse(predicted: ArrayLike, measured: ArrayLike) -> float:
    """Root of the mean squared error, in the unit of the values."""
    a, b = _pair(predicted, measured)
    return float(np.sqrt(np.mean((a - b) ** 2)))


def mape(predicted: ArrayLike, measured: ArrayLike) -> float:
    """Mean of |predicted - measured| / |measured|, as a share."""
    a, b = _pair(predicted, measured)
    return float(np.mean(np.abs(a - b) / np.abs(b)))


def within(predicted: ArrayLike, measured: ArrayLike, share: float = 0.1) -> float:
    """Share of the predictions that are at most `share` of the measured value away from it."""
    a, b = _pair(predicted, measured)
    return float(np.mean(np.abs(a - b) <= share * np.abs(b)))


SCORES: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "kendall_tau": kendall_tau,
    "rmse": rmse,
    "mape": mape,
    "within_10_percent": within,
}


def score(predicted: ArrayLike, measured: ArrayLike, names: Sequence[str] = tuple(SCORES)) -> dict[str, float]:
    """The named scores and n, the number of pairs."""
    return {name: SCORES[name](predicted, measured) for name in names} | {"n": len(np.asarray(measured))}


def held_out(
    make: Callable[[int], Learned], genes: Genes, values: ArrayLike, *, fit_on: int, repeats: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Scores on architectures that the fit never saw, over repeated random splits.

    make: builds an unfitted predictor from a seed; fit_on: architectures in each fit, the others are held out.
    Returns: fit_on, held_out, repeats, and for tau and RMSE the mean and the standard deviation over repeats.
    """
    measured = np.asarray(values, dtype=np.float64)
    if not 0 < fit_on <= len(measured) - 2:
        raise UserError(f"fit_on {fit_on} must leave at least 2 of {len(measured)} measured architectures to test on")
    rows = []
    for repeat in range(repeats):
        order = np.random.default_rng((seed, repeat)).permutation(len(measured))
        train, test = order[:fit_on], order[fit_on:]
        predictor = make(repeat).fit(genes[train], measured[train])
        rows.append(score(predictor(genes[test]), measured[test], ("kendall_tau", "rmse")))
    return {"fit_on": fit_on, "held_out": len(measured) - fit_on, "repeats": repeats} | _spread(rows)


def sample_curve(
    make: Callable[[int], Learned], genes: Genes, values: ArrayLike, *, sizes: Sequence[int], **options: Any
) -> list[dict[str, Any]]:
    """`held_out` for each number of measured architectures in `sizes`."""
    return [held_out(make, genes, values, fit_on=size, **options) for size in sizes]


def _spread(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ("kendall_tau", "rmse"):
        column = [row[name] for row in rows]
        found |= {name: float(np.mean(column)), f"{name}_std": float(np.std(column))}
    return found


def _pair(predicted: ArrayLike, measured: ArrayLike) -> tuple[Float, Float]:
    a, b = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError(f"scores compare two arrays of one length, not {a.shape} with {b.shape}")
    return a, b
