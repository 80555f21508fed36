"""Regression models behind one protocol, all deterministic for a seed.  N samples, F features, Q queries.

Features and targets come standardised.  A model without an uncertainty of its own gives 1 for all;
`predictors.accuracy` scales every standard deviation by cross-validation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from predictors.gp import GroupedGP

Float = NDArray[np.float64]


class Model(Protocol):
    """What `predictors.accuracy` needs of a model."""

    def fit(self, x: Float, y: Float) -> Any:
        """Learn from features (N, F) and targets (N,)."""

    def predict(self, x: Float) -> tuple[Float, Float]:
        """Mean and standard deviation, (Q,) each."""


class Ensemble:
    """scikit-learn estimators fitted on the same samples: their mean, and their spread (1 where there is only one)."""

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = tuple(members)

    def fit(self, x: Float, y: Float) -> Ensemble:
        """Fit each member; one that stops at its iteration limit is as good as the others."""
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            for member in self.members:
                member.fit(x, y)
        return self

    def predict(self, x: Float) -> tuple[Float, Float]:
        """Mean and standard deviation over members."""
        each = np.stack([member.predict(x) for member in self.members])
        return each.mean(axis=0), each.std(axis=0) if len(each) > 1 else np.ones(len(x))


def _gp(groups: Sequence[slice], seed: int) -> Model:
    return GroupedGP(groups)


def _ridge(groups: Sequence[slice], seed: int) -> Model:
    from sklearn.linear_model import RidgeCV

    return Ensemble([RidgeCV(alphas=np.logspace(-3, 4, 22))])


def _svr(groups: Sequence[slice], seed: int) -> Model:
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.svm import SVR

    folds = KFold(4, shuffle=True, random_state=seed)
    grid = {"C": [10.0, 100.0], "gamma": [3e-4, 1e-3, 4e-3]}
    return Ensemble([GridSearchCV(SVR(epsilon=0.03), grid, cv=folds, scoring="neg_root_mean_squared_error")])


def _boosting(groups: Sequence[slice], seed: int) -> Model:
    from sklearn.ensemble import GradientBoostingRegressor

    options = {"n_estimators": 150, "learning_rate": 0.1, "max_depth": 3, "subsample": 0.7, "max_features": 0.3}
    return Ensemble([GradientBoostingRegressor(**options, random_state=seed)])


def _mlp(groups: Sequence[slice], seed: int) -> Model:
    from sklearn.neural_network import MLPRegressor

    options = {"hidden_layer_sizes": (128, 128), "alpha": 0.1, "learning_rate_init": 3e-3, "max_iter": 300}
    return Ensemble([MLPRegressor(**options, random_state=1000 * seed + i) for i in range(5)])


MODELS: dict[str, Callable[[Sequence[slice], int], Model]] = {
    "gp": _gp,
    "ridge": _ridge,
    "svr": _svr,
    "boosting": _boosting,
    "mlp": _mlp,
}


def make_model(name: str, groups: Sequence[slice], seed: int) -> Model:
    """An unfitted model by name; `groups` are the columns of features that belong together."""
    if name not in MODELS:
        raise UserError(f"accuracy model {name!r} is not known; choose from auto, {', '.join(MODELS)}")
    return MODELS[name](groups, seed)
