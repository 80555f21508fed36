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
from search.optuna_agent import OptunaAgent
from search.problem import Predict, Problem

SPACE = load_space("digits_mbv3")
SMALL = SPACE.restrict(resolution=[12], width=[1.0], kernel=1)  # 1,728 networks
AGENTS: dict[str, Any] = {
    "random": RandomSearch,
    "evolution": partial(Evolution, population=20),
    "genetic": partial(Genetic, population=20, parents=0.25),
    "aging": partial(AgingEvolution, population=20, sample=5),
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
