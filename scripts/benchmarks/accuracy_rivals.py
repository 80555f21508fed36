"""What the accuracy predictors are compared with: library models on one-hot genes, log MACs and the sums of stages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ofa.space import Genes, Space
from predictors.costs import Macs, Params

Float = NDArray[np.float64]


class PlainFeatures:
    """Masked one-hot genes, log MACs and parameters, and the sums of kernels, expand ratios, depths of each stage."""

    def __init__(self, space: Space) -> None:
        self.space, self.macs, self.params = space, Macs(space), Params(space)

    def __call__(self, genes: Genes) -> Float:
        """Genes (N, G) to features (N, F)."""
        used, stage = self.space.used(genes), np.eye(len(self.space.stages))[self.space.blocks[:, 0]]
        sums = [np.where(used, self.space.block_values(genes, name), 0) @ stage for name in ("kernel", "expand")]
        counts = np.log(np.stack([self.macs(genes), self.params(genes)], axis=1))
        return np.concatenate([self.space.onehot(genes), counts, *sums, self.space.depths(genes)], axis=1)


class Library:
    """scikit-learn estimators on standardised features and targets; their mean."""

    def __init__(self, features: Callable[[Genes], Any], members: Sequence[Any]) -> None:
        self.features, self.members = features, members

    def fit(self, genes: Genes, values: ArrayLike) -> Library:
        """Learn from genes (N, G) and values (N,)."""
        from sklearn.base import clone
        from sklearn.compose import TransformedTargetRegressor
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        x = self.features(genes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.fitted = [
                TransformedTargetRegressor(
                    make_pipeline(StandardScaler(), clone(member)), transformer=StandardScaler()
                ).fit(x, np.asarray(values))
                for member in self.members
            ]
        return self

    def __call__(self, genes: Genes) -> Float:
        """Predicted values, (N,)."""
        x = self.features(genes)
        return np.asarray(np.mean([member.predict(x) for member in self.fitted], axis=0))


class PlainGP(Library):
    """A Gaussian process with one length scale for all features; knows its deviation."""

    def __init__(self, space: Space) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

        kernel = ConstantKernel(1, (1e-3, 1e4)) * RBF(10, (0.1, 1e4)) + WhiteKernel(0.01, (1e-6, 1))
        super().__init__(PlainFeatures(space), [GaussianProcessRegressor(kernel, random_state=0)])

    def predict(self, genes: Genes) -> tuple[Float, Float]:
        """Mean and standard deviation of a measurement, (N,) each."""
        fitted = self.fitted[0]
        mean, std = fitted.regressor_.predict(self.features(genes), return_std=True)
        scaler = fitted.transformer_
        return mean * scaler.scale_[0] + scaler.mean_[0], std * scaler.scale_[0]


def _ridge(space: Space, seed: int) -> Library:
    from sklearn.linear_model import RidgeCV

    return Library(PlainFeatures(space), [RidgeCV(np.logspace(-3, 4, 22))])


def _svr(space: Space, seed: int) -> Library:
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVR

    grid = {"C": [1.0, 10.0, 100.0], "gamma": [3e-4, 1e-3, 4e-3]}
    return Library(PlainFeatures(space), [GridSearchCV(SVR(epsilon=0.03), grid, cv=4)])


def _boosting(space: Space, seed: int) -> Library:
    from sklearn.ensemble import HistGradientBoostingRegressor

    options = {"max_iter": 300, "learning_rate": 0.05, "min_samples_leaf": 5, "random_state": seed}
    return Library(PlainFeatures(space), [HistGradientBoostingRegressor(**options)])


def _networks(space: Space, seed: int) -> Library:
    from sklearn.neural_network import MLPRegressor

    options = {"hidden_layer_sizes": (128, 128), "alpha": 0.1, "learning_rate_init": 3e-3, "max_iter": 300}
    return Library(PlainFeatures(space), [MLPRegressor(**options, random_state=1000 * seed + i) for i in range(5)])


def _once_for_all(space: Space, seed: int) -> Library:
    from sklearn.neural_network import MLPRegressor

    options = {"learning_rate_init": 1e-3, "max_iter": 100, "batch_size": 32, "random_state": seed}
    net = MLPRegressor(hidden_layer_sizes=(400, 400, 400), **options)
    return Library(space.onehot, [net])


RIVALS: dict[str, Callable[[Space, int], Library]] = {
    "plain gp": lambda space, seed: PlainGP(space),
    "plain ridge": _ridge,
    "plain svr": _svr,
    "plain boosting": _boosting,
    "plain mlps": _networks,
    "once-for-all's mlp": _once_for_all,
}
