"""Accuracy of subnets, learned from measured ones.  N architectures, G genes, F features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from ofa.errors import UserError
from ofa.files import read_json, write_json
from ofa.space import Genes, Space, load_space
from predictors.averaged import AveragedGP
from predictors.calibration import Calibration, error_ratio
from predictors.features import Features, OneHot
from predictors.models import Model, make_model
from predictors.power_mean import robust_scale
from predictors.scores import score
from predictors.tables import distinct, numbers

Float = NDArray[np.float64]
FOLDS = 5
FEWEST = 2 * FOLDS
SAME = 1e-6  # spread of accuracies, shares or percent, that is none
FAR = 6.0  # robust deviations of the accuracies beyond which an error counts no more
FLAT = 0.05  # spread of some samples, in that of all, below which deviations of a fit on them tell nothing
AUTO = ("gp", "svr", "ridge", "boosting")
MOST = {"svr": 1000, "gp": 8000}  # samples beyond which auto leaves a model out: minutes for its grid, 4 GB of kernels


class Accuracy:
    """Predicts accuracy, in the unit it was fitted with, from measured subnets: genes (N, G) to (N,) float64.

    model: a name in `predictors.models.MODELS`, or "auto" for the first of `candidates` whose
    error in cross-validation is within a standard error of the best one's (Breiman et al. 1984, sec. 3.4.3).
    Everything is deterministic for a seed: the samples and the name of the model are the whole state (`to_dict`).
    """

    name = "accuracy"

    def __init__(
        self,
        space: Space,
        model: str = "auto",
        *,
        candidates: Sequence[str] | str = AUTO,
        seed: int = 0,
        unit: str = "top-1",
    ) -> None:
        self.space, self.seed, self.unit = space, seed, unit
        names = (candidates,) if isinstance(candidates, str) else tuple(candidates)
        self.candidates = names if model == "auto" else (model,)
        if not self.candidates:
            raise UserError(f"an accuracy predictor has no candidates to choose from; give some of {', '.join(AUTO)}")
        self._features = {name: OneHot(space) if name == "ofa_mlp" else Features(space) for name in self.candidates}
        for candidate in self.candidates:
            self._make(candidate)
        self.chosen: str | None = None
        self.cross_validation: dict[str, dict[str, float]] = {}

    @threadpool_limits.wrap(limits=1, user_api="blas")  # on matrices this small more threads only spin
    def fit(self, genes: Genes, accuracy: ArrayLike) -> Accuracy:
        """Learn from genes (N, G) and measured accuracies (N,), N >= 10; chooses the model by cross-validation.

        A network that was measured several times counts once, with the mean.
        """
        self.space.validate(genes)
        self._genes, self._accuracy = self.space.canonical(genes), numbers(accuracy, "accuracy")
        self._check()
        self._genes, self._accuracy = distinct(self._genes, self._accuracy)
        self._enough()
        held_out, fitted = {}, {}
        fast = [name for name in self.candidates if len(self._genes) <= MOST.get(name, np.inf)]
        for name in fast or self.candidates:
            features = self._features[name](self._genes)
            fitted[name] = _Scaled(self._make(name)).fit(features, self._accuracy)
            held_out[name] = self._out_of_fold(name, features, fitted[name])
        self.cross_validation = {
            name: score(mean, self._accuracy, ("kendall_tau", "rmse")) for name, (mean, _) in held_out.items()
        }
        errors = {name: np.abs(mean - self._accuracy) for name, (mean, _) in held_out.items()}
        most = FAR * scale if (scale := robust_scale(self._accuracy)) > SAME else np.inf  # or collapsed networks choose
        self.chosen = _choose({name: np.minimum(error, most) ** 2 for name, error in errors.items()})
        self._fitted = fitted[self.chosen]
        self._calibration = self._calibrate(self.chosen, held_out[self.chosen])
        return self

    def predict(self, genes: Genes) -> tuple[Float, Float]:
        """Mean and standard deviation, (N,) each; the deviations are those of `predictors.calibration`."""
        if self.chosen is None:
            raise UserError("this accuracy predictor has learned nothing yet; call fit(genes, accuracy) first")
        self.space.validate(genes)
        if not len(genes):
            return np.empty(0), np.empty(0)
        mean, std = self._fitted.predict(self._features[self.chosen](genes))
        return mean, self._calibration(mean, std)

    def __call__(self, genes: Genes) -> Float:
        """Expected accuracy of each architecture, (N,)."""
        return self.predict(genes)[0]

    def to_dict(self) -> dict[str, Any]:
        """Samples and chosen model as plain JSON values; `from_dict` fits the same predictor again."""
        if self.chosen is None:
            raise UserError("this accuracy predictor has learned nothing yet; call fit(genes, accuracy) first")
        samples = {"genes": self._genes.tolist(), "accuracy": self._accuracy.tolist()}
        options = {"model": self.chosen, "seed": self.seed, "unit": self.unit}
        return options | {"cross_validation": self.cross_validation, "space": self.space.to_dict(), **samples}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Accuracy:
        """Fit the predictor that `to_dict` describes."""
        try:
            space, genes = load_space(values["space"]), np.array(values["genes"], dtype=np.int8)
            predictor = Accuracy(space, values["model"], seed=values["seed"], unit=values["unit"])
            predictor.fit(genes, values["accuracy"])
            predictor.cross_validation = dict(values["cross_validation"])
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(f"this is no stored accuracy predictor ({reason}); fit and save it again") from None
        return predictor

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON, atomically."""
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: str | Path) -> Accuracy:
        """Read what `save` wrote and fit again."""
        return Accuracy.from_dict(read_json(path))

    def _make(self, name: str) -> Model:
        return make_model(name, self._features[name].groups, self.seed)

    def _out_of_fold(self, name: str, features: Float, fitted: _Scaled) -> tuple[Float, Float]:
        """Mean and standard deviation of every sample, predicted by a model that did not see it."""
        mean, std = np.empty(len(features)), np.empty(len(features))
        fold = np.random.default_rng(self.seed).permutation(len(features)) % FOLDS
        for i in range(FOLDS):
            train, test = fold != i, fold == i
            model = _Scaled(self._make(name)).fit(features[train], self._accuracy[train], like=fitted)
            mean[test], std[test] = model.predict(features[test])
            if self._flat(train):
                std[test] = self._accuracy.std()
        return mean, std

    def _flat(self, rows: NDArray[Any]) -> bool:
        """Whether some samples are as good as equal beside all, as at chance level: a fit on them is too sure."""
        whole = self._accuracy.std()
        return bool(whole > SAME and self._accuracy[rows].std() < FLAT * whole)

    def _calibrate(self, name: str, held_out: tuple[Float, Float]) -> Calibration:
        """From the errors of the folds, and from those of a fit on the worse half tested on the better half."""
        within, order = error_ratio(self._accuracy, *held_out), np.argsort(self._accuracy, kind="stable")
        if isinstance(self._fitted.model, AveragedGP):  # has deviations of its own; that few errors are small is luck
            within = max(within, 1.0)
        worse, better = order[: len(order) // 2], order[len(order) // 2 :]
        beyond = within
        if len(worse) >= FEWEST and not self._flat(worse):
            features = self._features[name](self._genes)
            model = _Scaled(self._make(name)).fit(features[worse], self._accuracy[worse], like=self._fitted)
            beyond = max(within, error_ratio(self._accuracy[better], *model.predict(features[better])))
        return Calibration(within, beyond, float(self._accuracy.max()))

    def _check(self) -> None:
        wrong = self._accuracy[~np.isfinite(self._accuracy)]
        if self._accuracy.shape != (len(self._genes),) or len(wrong):
            raise UserError(
                f"accuracy must hold one finite number for each of {len(self._genes)} architectures, "
                f"not {self._accuracy.shape} numbers{f', {wrong[0]} among them' if len(wrong) else ''}"
            )

    def _enough(self) -> None:
        if len(self._genes) < FEWEST:
            raise UserError(f"{len(self._genes)} measured subnets are too few to learn from; measure at least {FEWEST}")


class _Scaled:
    """A model between standardised features and targets and the given ones."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def fit(self, x: Float, y: Float, like: _Scaled | None = None) -> _Scaled:
        """Learn; `like`: a fit on more samples, whose hyperparameters are the start where they take long to find."""
        self.x_mean, self.x_std = x.mean(axis=0), _positive(x.std(axis=0))
        self.y_mean, self.y_std = y.mean(), max(y.std(), SAME)
        x, y = (x - self.x_mean) / self.x_std, (y - self.y_mean) / self.y_std
        if like and isinstance(like.model, AveragedGP):
            self.model = like.model.refit(x, y)
        else:
            self.model.fit(x, y)
        return self

    def predict(self, x: Float) -> tuple[Float, Float]:
        mean, std = self.model.predict((x - self.x_mean) / self.x_std)
        return mean * self.y_std + self.y_mean, np.maximum(std, 1e-6) * self.y_std


def _positive(std: Any) -> Any:
    """Standard deviations, 1 where a feature is constant."""
    return np.where(std > 1e-9, std, 1.0).astype(std.dtype)


def _choose(errors: Mapping[str, Float]) -> str:
    """The first name whose mean squared error is within a standard error of the smallest; errors: (N,) each."""
    best = min(errors, key=lambda name: float(errors[name].mean()))
    excess = {name: error - errors[best] for name, error in errors.items()}
    return next(name for name, e in excess.items() if e.mean() <= e.std(ddof=1) / np.sqrt(len(e)) + SAME**2)
