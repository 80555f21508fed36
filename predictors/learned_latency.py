"""Latency learned from whole measured networks, from a few where another device's measurements are at hand.

N architectures, G genes, T costs, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_solve
from threadpoolctl import threadpool_limits

from ofa.errors import UserError
from ofa.files import read_json, write_json
from ofa.space import Genes, Space, load_space
from predictors.gp import GroupedGP, evenly
from predictors.latency_features import LatencyFeatures
from predictors.power_mean import fit_power_mean, robust_scale, undisturbed
from predictors.tables import distinct, numbers, read_table

Float = NDArray[np.float64]
FEWEST = 10
FEWEST_FOR_SHAPE = 40  # samples from which on the Gaussian process is tried
MOST_FOR_SHAPE = 600  # samples it learns from
ROUNDS = 2
TINY = 1e-4  # relative error below which none matters
SURE = 2.0  # standard errors by which the Gaussian process must lower the error


class LearnedLatency:
    """Milliseconds of one batch on a device of which whole networks were measured: genes (N, G) to (N,) float64.

    The latency is a power mean (`predictors.power_mean`) of the network's operations, MACs and memory traffic and of
    its latencies on other devices, the `donors`, as far as the samples prove that they tell something; a Gaussian
    process on the features of the stages learns the rest, where its leave-one-out errors are smaller by two standard
    errors.  All in logarithms, and without measurements that something disturbed.  Deterministic; the samples, and
    those of the donors, are the whole state (`to_dict`).
    """

    name, unit = "latency_ms", "ms"

    def __init__(self, space: Space, donors: Sequence[LearnedLatency] | LearnedLatency = ()) -> None:
        self.space = space
        self.donors = (donors,) if isinstance(donors, LearnedLatency) else tuple(donors)
        for i, donor in enumerate(self.donors):
            if donor.space.genes != space.genes:
                raise UserError(
                    f"donor {i} is of other genes than those of space {space.name}; fit it with this space on the "
                    "networks that both have"
                )
        self._features = LatencyFeatures(space)
        self._fitted = False

    @threadpool_limits.wrap(limits=1, user_api="blas")  # on matrices this small more threads only spin
    def fit(self, genes: Genes, latency_ms: ArrayLike) -> LearnedLatency:
        """Learn from genes (N, G) and measured milliseconds (N,), N >= 10; repeated networks count once."""
        self.space.validate(genes)
        self._genes, self._latency = self.space.canonical(genes), numbers(latency_ms, "latency_ms")
        self._check()
        self._genes, self._latency = distinct(self._genes, self._latency)
        self._enough()
        costs, target = self._costs(self._genes), np.log(self._latency)
        self.mean = fit_power_mean(costs, target, donors=len(self.donors))
        errors = target - self.mean(costs)
        self._shape = _shape(self._features, self._genes, errors)
        if self._shape is not None:
            errors = self._shape.errors
        self.spread = robust_scale(errors)
        self._fitted = True
        return self

    def predict(self, genes: Genes) -> tuple[Float, Float]:
        """Milliseconds and their standard deviation, (N,) each; the deviation is that of undisturbed measurements."""
        if not self._fitted:
            raise UserError("this latency predictor has learned nothing yet; call fit(genes, latency_ms) first")
        self.space.validate(genes)
        if not len(genes):
            return np.empty(0), np.empty(0)
        log = self.mean(self._costs(genes))
        if self._shape is not None:
            log = log + self._shape(self._features(genes))
        return np.exp(log), np.exp(log) * self.spread

    def __call__(self, genes: Genes) -> Float:
        """Expected milliseconds of each architecture, (N,)."""
        return self.predict(genes)[0]

    def to_dict(self) -> dict[str, Any]:
        """Samples and donors as plain JSON values; `from_dict` fits the same predictor again."""
        if not self._fitted:
            raise UserError("this latency predictor has learned nothing yet; call fit(genes, latency_ms) first")
        samples = {"genes": self._genes.tolist(), "latency_ms": self._latency.tolist()}
        return {"space": self.space.to_dict(), "donors": [donor.to_dict() for donor in self.donors], **samples}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> LearnedLatency:
        """Fit the predictor that `to_dict` describes."""
        try:
            donors = [LearnedLatency.from_dict(donor) for donor in values["donors"]]
            predictor = LearnedLatency(load_space(values["space"]), donors)
            return predictor.fit(np.array(values["genes"], dtype=np.int8), values["latency_ms"])
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(f"this is no stored latency predictor ({reason}); fit and save it again") from None

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON, atomically."""
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: str | Path) -> LearnedLatency:
        """Read what `save` wrote and fit again."""
        return LearnedLatency.from_dict(read_json(path))

    def _costs(self, genes: Genes) -> Float:
        """Logarithms of the donors' milliseconds and of the network's own costs, (N, T)."""
        others = [np.log(donor(genes))[:, None] for donor in self.donors]
        return np.concatenate([*others, self._features.log_costs(genes)], axis=1)

    def _check(self) -> None:
        wrong = self._latency[~(np.isfinite(self._latency) & (self._latency > 0))]
        if self._latency.shape != (len(self._genes),) or len(wrong):
            raise UserError(
                f"latency must hold milliseconds above 0 for each of {len(self._genes)} architectures, "
                f"not {self._latency.shape} numbers{f', {wrong[0]} among them' if len(wrong) else ''}"
            )

    def _enough(self) -> None:
        if len(self._genes) < FEWEST:
            raise UserError(
                f"{len(self._genes)} measured networks are too few to learn from; measure at least {FEWEST}"
            )


class _Shape(NamedTuple):
    """What a Gaussian process adds to the power mean, and the leave-one-out errors (N,) that remain."""

    process: GroupedGP
    mean: Float
    std: Float
    scale: float
    errors: Float

    def __call__(self, features: Float) -> Float:
        return self.process.predict((features - self.mean) / self.std)[0] * self.scale


def _shape(features: LatencyFeatures, genes: Genes, errors: Float) -> _Shape | None:
    """A Gaussian process on the errors (N,) of the power mean; None where it does not make them surely smaller."""
    some = evenly(len(genes), MOST_FOR_SHAPE)
    genes, errors = genes[some], errors[some]
    if len(genes) < FEWEST_FOR_SHAPE:
        return None
    x = features(genes)
    starts = (undisturbed(errors), np.ones(len(errors), bool))  # what the mean misses may be a rule, not disturbances
    shape = min((_settled(features.groups, x, errors, kept) for kept in starts), key=lambda s: _sizes(s.errors).mean())
    gain = _sizes(errors) - _sizes(shape.errors)
    return shape if gain.mean() > SURE * gain.std() / np.sqrt(len(gain)) else None


def _sizes(errors: Float) -> Float:
    """Logarithms of the errors' sizes, in whose mean a few disturbed measurements do not decide."""
    return np.log(np.abs(errors) + TINY)


def _settled(groups: Sequence[slice], x: Float, errors: Float, kept: NDArray[np.bool_]) -> _Shape:
    """The process on rows that are kept at first, then on those that it leaves undisturbed."""
    for _ in range(ROUNDS):
        shape = _fit_shape(groups, x, errors, kept)
        kept = undisturbed(shape.errors)
    return shape


def _fit_shape(groups: Sequence[slice], x: Float, errors: Float, kept: NDArray[np.bool_]) -> _Shape:
    std = x[kept].std(axis=0)
    mean, std, scale = x[kept].mean(axis=0), np.where(std > 1e-9, std, 1.0), max(float(errors[kept].std()), 1e-9)
    process = GroupedGP(groups).fit((x[kept] - mean) / std, errors[kept] / scale)
    left = errors - process.predict((x - mean) / std)[0] * scale
    inverse = np.diag(cho_solve(process.factor, np.eye(int(kept.sum()))))
    left[kept] = process.alpha / inverse * scale  # leave-one-out (Rasmussen and Williams 2006, eq. 5.12)
    return _Shape(process, mean, std, scale, left)


def learn_from_table(
    space: Space,
    table: str | Path,
    column: str,
    *,
    donors: Sequence[str] = (),
    donor_table: str | Path | None = None,
) -> LearnedLatency:
    """Learn from a column of a CSV file of measured networks (`predictors.tables`), milliseconds.

    donors: columns of other devices, in `donor_table` (None: the same file).
    """
    if isinstance(donors, str):
        raise UserError(f"donors={donors} is no list; write donors=[{donors}]")
    others = [LearnedLatency(space).fit(*read_latencies(donor_table or table, space, donor)) for donor in donors]
    return LearnedLatency(space, others).fit(*read_latencies(table, space, column))


def read_latencies(path: str | Path, space: Space, column: str) -> tuple[Genes, Float]:
    """`read_table` of a column of times; raises UserError where one is not above 0."""
    genes, ms = read_table(path, space, column)
    if (wrong := ms[ms <= 0]).size:
        raise UserError(f"{path}: {column} {wrong[0]:g} is no time; leave the entry empty where nothing was measured")
    return genes, ms
