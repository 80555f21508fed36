"""How well a prediction agrees with what was measured.  N architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ofa.errors import UserError
from ofa.space import Genes
from predictors.tables import distinct

Float = NDArray[np.float64]
Split = tuple[NDArray[np.int64], NDArray[np.int64]]


class Learned(Protocol):
    """A predictor that learns from measured architectures."""

    def fit(self, genes: Genes, values: ArrayLike) -> Self:
        """Learn from genes (N, G) and their measured values (N,)."""

    def __call__(self, genes: Genes) -> Float:
        """Predicted values, (N,)."""


def kendall_tau(predicted: ArrayLike, measured: ArrayLike) -> float:
    """Rank correlation tau-b: 1 for the same order, -1 for the reverse, 0 where one is constant or has one value."""
    from scipy.stats import kendalltau

    a, b = _pair(predicted, measured)
    tau = kendalltau(a, b).statistic if len(a) > 1 else 0.0  # of one it would warn
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


def top(n: int) -> int:
    """How many of n networks a regret is of: 10, or a quarter, since the best is among 10 of 12 by chance alone."""
    return min(10, max(1, n // 4))


def regret(predicted: ArrayLike, measured: ArrayLike, k: int) -> float:
    """How far the best of the k that are predicted best stays behind the best of all, in the unit of the values."""
    a, b = _pair(predicted, measured)
    return float(b.max() - b[np.argsort(-a, kind="stable")[:k]].max())


def coverage(mean: ArrayLike, std: ArrayLike, measured: ArrayLike, share: float) -> float:
    """Share of the measured values inside the central interval that should hold `share` of a normal distribution."""
    from scipy.stats import norm

    a, b = _pair(mean, measured)
    return float(np.mean(np.abs(a - b) <= norm.ppf(0.5 + share / 2) * np.asarray(std)))


def log_loss(mean: ArrayLike, std: ArrayLike, measured: ArrayLike) -> float:
    """Mean of -log N(measured; mean, std): in nats, lower is better; depends on the unit of the values."""
    from scipy.stats import norm

    a, b = _pair(mean, measured)
    return float(-norm.logpdf(b, a, std).mean())


SCORES: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "kendall_tau": kendall_tau,
    "rmse": rmse,
    "mape": mape,
    "within_10_percent": within,
}


def score(predicted: ArrayLike, measured: ArrayLike, names: Sequence[str] = tuple(SCORES)) -> dict[str, float]:
    """The named scores and n, the number of pairs."""
    return {name: SCORES[name](predicted, measured) for name in names} | {"n": len(np.asarray(measured))}


def random_split(values: Float, fit_on: int, rng: np.random.Generator) -> Split:
    """`fit_on` random rows to fit on, and all others to test on."""
    order = rng.permutation(len(values))
    return order[:fit_on], order[fit_on:]


def later_split(values: Float, fit_on: int, rng: np.random.Generator) -> Split:
    """The shift of a search that has gone on: `fit_on` random rows of the worse half, tested on the better half."""
    order = np.argsort(values, kind="stable")
    worse, better = order[: len(order) // 2], order[len(order) // 2 :]
    if fit_on > len(worse):
        raise UserError(f"fit_on {fit_on} exceeds the worse half of {len(order)} measured architectures")
    return rng.permutation(worse)[:fit_on], better


def first_split(values: Float, fit_on: int, rng: np.random.Generator) -> Split:
    """The first `fit_on` rows as they come to fit on, all later ones to test on; nothing random."""
    rows = np.arange(len(values))
    return rows[:fit_on], rows[fit_on:]


def held_out(
    make: Callable[[int], Learned],
    genes: Genes,
    values: ArrayLike,
    *,
    fit_on: int,
    repeats: int = 5,
    seed: int = 0,
    split: Callable[[Float, int, np.random.Generator], Split] = random_split,
) -> dict[str, Any]:
    """Scores on architectures that the fit never saw, over repeated random splits; each counts once, with its mean.

    make: builds an unfitted predictor from a seed; fit_on: architectures in each fit; split: which to fit and test on.
    Returns: fit_on, held_out, repeats, top, and the mean and the standard deviation (`_std`) over repeats of tau, RMSE
    and the regret of the top; of coverage_50, coverage_90 and log_loss too where the predictor gives a deviation.
    """
    genes, measured = distinct(genes, np.asarray(values, dtype=np.float64))
    require_splits(repeats)
    if not 0 < fit_on <= len(measured) - 2:
        raise UserError(f"fit_on {fit_on} must leave at least 2 of {len(measured)} measured architectures to test on")
    rows = []
    for repeat in range(repeats):
        train, test = split(measured, fit_on, np.random.default_rng((seed, repeat)))
        rows.append(_test_scores(make(repeat).fit(genes[train], measured[train]), genes[test], measured[test]))
    return {"fit_on": fit_on, "held_out": len(test), "repeats": repeats, "top": top(len(test))} | _spread(rows)


def require_splits(repeats: int) -> None:
    """Raise UserError where there is no split, or a part of one."""
    if not isinstance(repeats, int) or repeats < 1:
        raise UserError(f"repeats={repeats} must be a whole number, 1 or more, of splits to take the scores of")


def _test_scores(predictor: Learned, genes: Genes, measured: Float) -> dict[str, float]:
    predict = getattr(predictor, "predict", None)
    mean, std = predict(genes) if predict else (predictor(genes), None)
    found = score(mean, measured, ("kendall_tau", "rmse")) | {"regret": regret(mean, measured, top(len(measured)))}
    if std is not None:
        found |= {f"coverage_{p}": coverage(mean, std, measured, p / 100) for p in (50, 90)}
        found["log_loss"] = log_loss(mean, std, measured)
    return found


def sample_curve(
    make: Callable[[int], Learned], genes: Genes, values: ArrayLike, *, sizes: Sequence[int], **options: Any
) -> list[dict[str, Any]]:
    """`held_out` for each number of measured architectures in `sizes`."""
    return [held_out(make, genes, values, fit_on=size, **options) for size in sizes]


def _spread(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in [name for name in rows[0] if name != "n"]:
        column = [row[name] for row in rows]
        found |= {name: float(np.mean(column)), f"{name}_std": float(np.std(column))}
    return found


def _pair(predicted: ArrayLike, measured: ArrayLike) -> tuple[Float, Float]:
    a, b = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError(f"scores compare two arrays of one length, not {a.shape} with {b.shape}")
    if np.isnan(a).any() or np.isnan(b).any():
        raise UserError(f"scores compare numbers; {np.isnan(a + b).sum()} of {len(a)} pairs hold none (nan)")
    return a, b
