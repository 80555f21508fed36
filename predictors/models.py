"""Regression models behind one protocol, all deterministic for a seed.  N samples, F features, Q queries.

Features and targets come standardised.  A model without an uncertainty of its own gives 1 for all;
`predictors.accuracy` scales every standard deviation by cross-validation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from predictors.averaged import AveragedGP
from predictors.features import Group
from predictors.perceptron import perceptron
from predictors.warp import Warp

Float = NDArray[np.float64]
ROOM = 2.0  # of the warp before models that do not choose their own
ROWS = 2048  # of a batch of the network, so that its activations stay in the cache


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


class Warped:
    """A model that learns -log(top - y) instead of y: accuracy saturates, see `predictors.warp.Warp`."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def fit(self, x: Float, y: Float) -> Warped:
        """Learn from features (N, F) and targets (N,)."""
        self.warp = Warp.below(float(y.max() + ROOM * (y.std() or 1.0)), y)
        self.model.fit(x, self.warp(y))
        return self

    def predict(self, x: Float) -> tuple[Float, Float]:
        """Median, and the standard deviation to first order, of y."""
        mean, std = self.model.predict(x)
        center, _ = self.warp.back(mean, np.zeros_like(mean))
        return center, std * (self.warp.top - center)


class Network:
    """once-for-all's accuracy predictor (Cai et al. 2020): three hidden layers of 400, ReLU; 1 for every deviation."""

    def __init__(self, seed: int, widths: Sequence[int] = (400, 400, 400)) -> None:
        self.seed, self.widths = seed, tuple(widths)

    def fit(self, x: Float, y: Float) -> Network:
        """Learn from features (N, F) and targets (N,), in float32."""
        from sklearn.neural_network import MLPRegressor

        options = {"alpha": 1e-2, "learning_rate_init": 1e-3, "batch_size": min(32, len(x)), "max_iter": 100}
        net = MLPRegressor(hidden_layer_sizes=self.widths, **options, random_state=self.seed)
        Ensemble([net]).fit(x.astype(np.float32), y.astype(np.float32))
        self.forward = perceptron(list(zip(net.coefs_, net.intercepts_, strict=True)))
        return self

    def predict(self, x: Float) -> tuple[Float, Float]:
        """Mean and 1, (Q,) each."""
        pieces = [self.forward(x[a:b].astype(np.float32, copy=False)) for a, b in _batches(len(x))]
        return np.concatenate(pieces).astype(np.float64), np.ones(len(x))


def _batches(n: int) -> Sequence[tuple[int, int]]:
    return list(pairwise([*range(0, n, ROWS), n]))


def _gp(groups: Sequence[Group], seed: int) -> Model:
    return AveragedGP([group.columns for group in groups], [group.slope for group in groups])


def _ridge(groups: Sequence[Group], seed: int) -> Model:
    from sklearn.linear_model import RidgeCV

    return Warped(Ensemble([RidgeCV(alphas=np.logspace(-3, 4, 22))]))


def _svr(groups: Sequence[Group], seed: int) -> Model:
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.svm import SVR

    folds = KFold(4, shuffle=True, random_state=seed)
    grid = {"C": [10.0, 100.0], "gamma": [3e-4, 1e-3, 4e-3]}
    search = GridSearchCV(SVR(epsilon=0.03), grid, cv=folds, scoring="neg_root_mean_squared_error")
    return Warped(Ensemble([search]))


def _boosting(groups: Sequence[Group], seed: int) -> Model:
    from sklearn.ensemble import GradientBoostingRegressor

    options = {"n_estimators": 150, "learning_rate": 0.1, "max_depth": 3, "subsample": 0.7, "max_features": 0.3}
    return Warped(Ensemble([GradientBoostingRegressor(**options, random_state=seed)]))


def _mlp(groups: Sequence[Group], seed: int) -> Model:
    from sklearn.neural_network import MLPRegressor

    options = {"hidden_layer_sizes": (128, 128), "alpha": 0.1, "learning_rate_init": 3e-3, "max_iter": 150}
    return Warped(Ensemble([MLPRegressor(**options, random_state=1000 * seed + i) for i in range(5)]))


def _ofa_mlp(groups: Sequence[Group], seed: int) -> Model:
    return Warped(Network(seed))


MODELS: dict[str, Callable[[Sequence[Group], int], Model]] = {
    "gp": _gp,
    "ridge": _ridge,
    "svr": _svr,
    "boosting": _boosting,
    "mlp": _mlp,
    "ofa_mlp": _ofa_mlp,
}


def make_model(name: str, groups: Sequence[Group], seed: int) -> Model:
    """An unfitted model by name; `groups` are the columns of features that belong together."""
    if name not in MODELS:
        raise UserError(f"accuracy model {name!r} is not known; choose from auto, {', '.join(MODELS)}")
    return MODELS[name](groups, seed)
