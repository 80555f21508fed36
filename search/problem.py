"""What a search solves: predictors, the objectives and limits among them, as one function of genes.

N networks, G genes, P predictors, M objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.limits import sought
from ofa.space import Genes, Space
from search.agents import keys
from search.limits import known_name, parse_limits, reach, show
from search.pareto import with_room

Floats = NDArray[np.float64]
Values = dict[str, Floats]
Predict = Callable[[Genes], NDArray[Any]]
PROBES = 1000  # random networks that stand for a space
PERCENT = 2.0  # an accuracy above is no share, which a predictor may put a little above 1
TOLERANCE = 1e-9  # relative excess that is rounding: a value may differ in its last digit from one batch to another


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is known of N networks: predicted values by name (N,), costs to minimise (N, M), violations (N,)."""

    genes: Genes
    values: Values
    cost: Floats
    violation: Floats


@dataclass(eq=False)
class Problem:
    """Objectives and limits over named predictors, with a memo: a repeated network costs nothing.

    predictors: genes (N, G) -> values (N,), by name.
    objectives: 1 minimises and -1 maximises the named value; the first named is the one a network is chosen by.
    limits: the most that a value may be; the least of an accuracy, and of another maximised value whose name tells no
        cost (see `ofa.limits.sought`).
        Numbers or strings such as "250KB" (see `search.limits`); names may leave out their unit.
    frugal: predictors without a limit are not asked of networks that exceed one; their values there are infinitely bad.
    """

    predictors: Mapping[str, Predict]
    objectives: Mapping[str, int]
    limits: Mapping[str, float | str] = field(default_factory=dict)
    frugal: bool = False

    def __post_init__(self) -> None:
        for name, given in {"objectives": self.objectives, "limits": self.limits}.items():
            if not isinstance(given, Mapping):
                raise UserError(f"{name} are {given}; give them by name, as {{'macs': ...}}")
        if not self.objectives:
            raise UserError(f"a search needs an objective; choose from {', '.join(self.predictors)}")
        for name, sign in self.objectives.items():
            if sign not in (1, -1):
                raise UserError(f"objective {name}={sign} has no direction; 1 minimises, -1 maximises")
        named = [(known_name(name, self.predictors), int(sign)) for name, sign in self.objectives.items()]
        self.objectives = dict(named)
        if len(self.objectives) < len(named):
            raise UserError(f"objectives name {', '.join(name for name, _ in named)}; name each once")
        self.bounds: dict[str, float] = parse_limits(self.limits, self.predictors)
        self._signs = {name: sought(name, self.objectives.get(name, 1)) for name in self.predictors}
        self._rows: dict[bytes, int] = {}  # the memo: where `_table` has a network's values, costs and violation
        self._table = np.empty((0, len(self.predictors) + len(self.objectives) + 1))

    def evaluate(self, genes: Genes) -> Evaluation:
        """Evaluate networks (N, G); each predictor sees only those that were never evaluated before, in one call."""
        if not isinstance(genes, np.ndarray) or genes.dtype != np.int8:
            genes = _small(genes)
        if genes.ndim != 2:
            raise UserError(f"genes have shape {genes.shape}; give (N, G), a row for each network")
        keyed = keys(genes)
        new = {key: i for i, key in enumerate(keyed) if key not in self._rows}
        if new:
            self._add(new, self.everything(genes.take(list(new.values()), axis=0)))
        known = self._table.take(self._places(keyed), axis=0)
        values = dict(zip(self.predictors, known.T, strict=False))
        return Evaluation(genes, values, known[:, len(values) : -1], known[:, -1])

    def everything(self, genes: Genes) -> Values:
        """Values (N,) of all predictors, without the memo, of infeasible networks only as far as `frugal` allows."""
        if not (self.frugal and self.bounds):
            return self.predict(genes, self.predictors)
        values = self.predict(genes, self.bounds)
        allowed = self.violation(values) <= 0
        for name in self.predictors:
            if name not in values:
                values[name] = np.full(len(genes), np.inf * self.objectives.get(name, sought(name)))
                values[name][allowed] = self._predict(name, genes[allowed]) if allowed.any() else 0
        return values

    def remember(self, genes: Genes, values: Mapping[str, NDArray[Any]]) -> None:
        """Put known values (N,) of every predictor into the memo; of networks that are in it already, none."""
        new = {key: i for i, key in enumerate(keys(genes)) if key not in self._rows}
        own = list(new.values())
        self._add(new, {name: np.asarray(values[name], dtype=np.float64)[own] for name in self.predictors})

    def _add(self, new: Iterable[bytes], values: Values) -> None:
        """Append networks to the memo by their keys, each once."""
        first = len(self._rows)
        self._rows.update(zip(new, count(first)))
        if len(self._rows) > len(self._table):  # twice as long, so that growing costs little on the whole
            self._table = np.concatenate([self._table, np.empty((len(self._rows), self._table.shape[1]))])
        costs = [sign * values[name] for name, sign in self.objectives.items()]
        known = [*(values[name] for name in self.predictors), *costs, self.violation(values)]
        for column, numbers in enumerate(known):
            self._table[first : len(self._rows), column] = numbers

    def _places(self, keyed: list[bytes]) -> NDArray[np.int64]:
        """Where the table has networks."""
        return np.fromiter(map(self._rows.__getitem__, keyed), np.int64, len(keyed))

    def predict(self, genes: Genes, names: Iterable[str]) -> Values:
        """Values (N,) of the named predictors, without the memo."""
        return {name: self._predict(name, genes) for name in names}

    def cost(self, values: Mapping[str, Floats]) -> Floats:
        """Objectives as costs, lower is better (N, M)."""
        return np.array([sign * values[name] for name, sign in self.objectives.items()]).T

    def violation(self, values: Mapping[str, Floats]) -> Floats:
        """Sum over the limits of the relative excess, 0 where all are met (N,)."""
        excesses = [self.excess(name, values[name]) for name in self.bounds]
        return sum(excesses[1:], excesses[0]) if excesses else np.zeros(len(next(iter(values.values()))))

    def exceeds(self, genes: Genes) -> Floats:
        """Violations (N,) of genes (N, G); only the predictors that are limited are asked, without the memo."""
        return self.violation(self.predict(genes, self.bounds)) if self.bounds else np.zeros(len(genes))

    def excess(self, name: str, value: Floats) -> Floats:
        """How far values lie beyond their limit, relative to it, 0 where they meet it (N,)."""
        excess: Floats = (value / self.bounds[name] - 1) * self._signs[name]
        excess[~(excess > TOLERANCE)] = 0
        return excess

    def worst(self, name: str) -> float:
        """The limit of an objective as a cost, nan where there is none, or where the objective is to come near it."""
        sign = self.objectives[name]
        return sign * self.bounds.get(name, np.nan) if sign == self._signs[name] else np.nan

    def limit(self, name: str) -> str:
        """A limit as text: "macs <= 6,000,000"."""
        return f"{name} {'<=' if self._signs[name] > 0 else '>='} {show(self.bounds[name])}"

    def reach(self, name: str, value: float) -> str:
        """A value as text, rounded so that it keeps itself as a limit of this name."""
        return reach(value, self._signs[name])

    def reference(self, space: Space) -> Floats:
        """The reference point (M,) for hypervolumes, the same for every agent and seed.

        For each objective it is the worst value among 1,000 random networks (seed 0), the smallest and the largest, or
        its limit where that is stricter; a limit that none is better than leaves room up to the next worse value.
        """
        cost = self.cost(self.predict(probes(space), self.objectives))
        return with_room(np.fmin(cost.max(axis=0), [self.worst(name) for name in self.objectives]), cost)

    def _predict(self, name: str, genes: Genes) -> Floats:
        values = np.asarray(self.predictors[name](genes.copy()), dtype=np.float64)  # its own, to do with as it likes
        if values.shape != (len(genes),) or not np.isfinite(values).all():
            raise UserError(
                f"predictor {name} must give one finite number for each of {len(genes)} networks, it gave {values}; "
                "mend it, or leave out the networks that it does not know"
            )
        if sought(name) < 0 and name in self.bounds and values.max(initial=0) > PERCENT:
            raise UserError(
                f"predictor {name} gives percent, as {values.max():g}, and its limit {self.bounds[name]:g} is a share; "
                "give a predictor of shares, accuracy / 100"
            )
        return values


def _small(genes: Any) -> Genes:
    """Genes of another type as int8, which the memo tells them apart by; raises UserError where they are no choices."""
    given = np.asarray(genes)
    if not np.issubdtype(given.dtype, np.integer) or (given.size and not (given.min() >= 0 and given.max() <= 127)):
        raise UserError(f"genes of {given.dtype} are no choices of a space; give whole numbers, 0 to 127, as np.int8")
    return given.astype(np.int8)


def probes(space: Space) -> Genes:
    """The smallest and the largest network, then 1,000 random ones, always the same (N, G)."""
    return np.concatenate([space.smallest(), space.largest(), space.sample(PROBES, np.random.default_rng(0))])
