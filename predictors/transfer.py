"""Accuracy after compression, from the float network's predictor and a few compressed networks.  N archs, G genes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ofa.errors import UserError
from ofa.files import read_json, write_json
from ofa.space import Genes, Space
from predictors.costs import Macs
from predictors.scores import score

Float = NDArray[np.float64]
FEWEST = 5
PENALTY = 1.0  # of standardised slopes, so that few measurements cannot bend them far


class TransferredAccuracy:
    """Accuracy after compression, e.g. to int8: what `base` predicts of the float network plus what is lost.

    The loss is learned from a few networks measured after compression (the idea of APQ, Wang et al. 2020, sec. 3.2:
    transfer instead of thousands of quantized measurements): one number for all, or a line over predicted accuracy and
    the logarithm of MACs, whichever is better on networks left out one by one.
    """

    name, unit = "accuracy_int8", "top-1"

    def __init__(self, space: Space, base: Callable[[Genes], Float]) -> None:
        self.space, self.base = space, base
        self._macs = Macs(space)
        self.weights: Float | None = None

    def fit(self, genes: Genes, accuracy: ArrayLike) -> TransferredAccuracy:
        """Learn from genes (N, G) and their accuracies after compression (N,), N >= 5."""
        measured = np.asarray(accuracy, dtype=np.float64)
        if measured.shape != (len(genes),) or not np.isfinite(measured).all():
            raise UserError(f"accuracy must hold one finite number for each of {len(genes)} architectures")
        if len(genes) < FEWEST:
            raise UserError(f"{len(genes)} compressed subnets are too few to learn from; measure at least {FEWEST}")
        before = np.asarray(self.base(genes))
        raw = self._raw(genes, before)
        self.centre, spread = raw.mean(axis=0), raw.std(axis=0)
        self.spread = np.where(spread > 1e-9, spread, 1.0)
        x, lost = self._features(genes, before), measured - before
        left_out = {wide: _left_out(x[:, : 3 if wide else 1], lost) for wide in (False, True)}
        wide = bool(np.square(lost - left_out[True]).mean() < np.square(lost - left_out[False]).mean())
        self.weights = np.zeros(3)
        self.weights[: 3 if wide else 1] = _solve(x[:, : 3 if wide else 1], lost)
        predicted = before + left_out[wide]
        names = ("kendall_tau", "rmse")
        self.scores = {"n": len(genes), "line": wide} | score(predicted, measured, names)
        self.scores |= {f"float_{name}": value for name, value in score(before, measured, names).items()}
        return self

    def __call__(self, genes: Genes) -> Float:
        """Expected accuracy after compression, (N,)."""
        if self.weights is None:
            raise UserError("this predictor has learned nothing yet; call fit(genes, accuracy) first")
        before = np.asarray(self.base(genes))
        return np.asarray(before + self._features(genes, before) @ self.weights, dtype=np.float64)

    def save(self, path: str | Path) -> None:
        """Write what was learned as JSON; the base is saved by itself."""
        if self.weights is None:
            raise UserError("this predictor has learned nothing yet; call fit(genes, accuracy) first")
        arrays = {"weights": self.weights, "centre": self.centre, "spread": self.spread}
        write_json(path, {name: value.tolist() for name, value in arrays.items()} | {"scores": self.scores})

    def load(self, path: str | Path) -> TransferredAccuracy:
        """Take over what `save` wrote."""
        values: Mapping[str, Any] = read_json(path)
        self.weights, self.centre, self.spread = (np.array(values[n]) for n in ("weights", "centre", "spread"))
        self.scores = dict(values["scores"])
        return self

    def _raw(self, genes: Genes, before: Float) -> Float:
        return np.stack([before, np.log(self._macs(genes))], axis=1)

    def _features(self, genes: Genes, before: Float) -> Float:
        """1, standardised predicted accuracy, standardised log MACs: (N, 3)."""
        return np.column_stack([np.ones(len(genes)), (self._raw(genes, before) - self.centre) / self.spread])


def _solve(x: Float, y: Float) -> Float:
    """Ridge regression; the first column, a constant, is not shrunk."""
    shrink = PENALTY * np.eye(x.shape[1])
    shrink[0, 0] = 0.0
    return np.asarray(np.linalg.solve(x.T @ x + shrink, x.T @ y), dtype=np.float64)


def _left_out(x: Float, y: Float) -> Float:
    """Each value as predicted from all the others, (N,)."""
    rows = np.arange(len(y))
    return np.array([x[i] @ _solve(x[rows != i], y[rows != i]) for i in rows])
