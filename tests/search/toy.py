"""A search problem whose answer is known: values that are sums over the genes of active blocks."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.space import Genes, Space, load_space
from search.agents import RandomSearch
from search.aging import AgingEvolution
from search.evolution import Evolution
from search.genetic import Genetic
from search.model_based import ModelBased
from search.optuna_agent import OptunaAgent
from search.problem import Predict, Problem


class Line:
    """A model for tests: least squares on one-hot genes, its errors as the spread."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def fit(self, genes: Genes, values: NDArray[np.float64]) -> None:
        x = self._features(genes)
        inverse = np.linalg.inv(x.T @ x + 0.1 * np.eye(x.shape[1]))
        self.weights, self.inverse = inverse @ x.T @ values, inverse

    def predict(self, genes: Genes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        x = self._features(genes)
        return x @ self.weights, np.sqrt(((x @ self.inverse) * x).sum(axis=1)) * 0.1

    def _features(self, genes: Genes) -> NDArray[np.float64]:
        return np.concatenate([self.space.onehot(genes), np.ones((len(genes), 1))], axis=1)


def model_based(space: Space, *, seed: int = 0, n_objectives: int = 1, p: Problem | None = None) -> ModelBased:
    """The gain is measured, the MACs are exact."""
    p = p or Problem(problem(space).predictors, {"gain": -1} if n_objectives == 1 else {"gain": -1, "macs": 1})
    return ModelBased(space, model=partial(Line, space), problem=p, measured=("gain",), seed=seed)


SPACE = load_space("digits_mbv3")
SMALL = SPACE.restrict(resolution=[12], width=[1.0], kernel=1)  # 1,728 networks
AGENTS: dict[str, Any] = {
    "random": RandomSearch,
    "evolution": partial(Evolution, population=20),
    "genetic": partial(Genetic, population=20, parents=0.25),
    "aging": partial(AgingEvolution, population=20, sample=5),
    "model_based": model_based,
    "tpe": OptunaAgent,
    "nsga2": partial(OptunaAgent, sampler="nsga2", options={"population_size": 20}),
}


def weights(space: Space, seed: int) -> list[NDArray[np.float64]]:
    """What each choice of each gene adds to a value."""
    rng = np.random.default_rng(seed)
    return [np.sort(rng.random(count)) for count in space.counts]


def separable(space: Space, seed: int) -> Predict:
    """A value that larger choices raise, each gene on its own: genes (N, G) to (N,)."""
    flat = np.concatenate(weights(space, seed))
    return lambda genes: space.onehot(genes) @ flat


def problem(space: Space = SPACE, **limits: float | str) -> Problem:
    """More gain for less cost; both can be limited."""
    predictors = {"gain": separable(space, 1), "macs": separable(space, 2)}
    return Problem(predictors, objectives={"gain": -1, "macs": 1}, limits=limits)


def all_networks(space: Space) -> Genes:
    """Every network of a small space, once."""
    genes = np.array(list(product(*(range(count) for count in space.counts))), dtype=np.int8)
    return np.unique(space.canonical(genes), axis=0)
