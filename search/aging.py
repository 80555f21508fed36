"""Aging evolution: the oldest networks die, however good they are.  N networks, G genes, M objectives.

Real et al. 2019, "Regularized evolution for image classifier architecture search", algorithm 1.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes, Space
from search.agents import TRIES, Ancestry, Fresh
from search.pareto import best_first
from search.repair import Violation, repair
from search.variation import draw_all, mutate_one


@dataclass(eq=False)
class AgingEvolution:
    """Each child is the best of a random sample of the population with one gene changed.

    population: the youngest networks, those that may have children; the first ones are random.
    sample: networks of the population that compete to be the parent of a child.
    violation: exact violations of the limits (N,); children are repaired by them before they are proposed.
    """

    space: Space = field(repr=False)
    _: KW_ONLY
    seed: int = 0
    n_objectives: int = 1
    population: int = 100
    sample: int = 25
    violation: Violation | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.sample <= self.population:
            raise UserError(f"sample {self.sample} of population {self.population}; take at least 1, at most all")
        self._rng = np.random.default_rng(self.seed)
        self._fresh = Fresh(self.space)
        self._ancestry = Ancestry(self.space)
        self._genes: Genes = np.empty((0, len(self.space.genes)), dtype=np.int8)
        self._cost = np.empty((0, self.n_objectives))
        self._violation = np.empty(0)
        self._place = np.empty(0, dtype=np.int64)

    def ask(self, n: int) -> Genes:
        """Propose n children of the population; random networks while it is not full."""
        breed = [self._children] * TRIES if len(self._genes) >= self.population else []
        return self._fresh.take(n, [*breed, *[self._random] * TRIES])

    def tell(self, genes: Genes, cost: NDArray[np.float64], violation: NDArray[np.float64]) -> None:
        """Let `genes` take the places of the oldest."""
        self._fresh.add(genes)
        self._genes = np.concatenate([self._genes, genes])[-self.population :]
        self._cost = np.concatenate([self._cost, cost])[-self.population :]
        self._violation = np.concatenate([self._violation, violation])[-self.population :]
        self._place = np.argsort(best_first(self._cost, self._violation))

    def _random(self, n: int) -> Genes:
        return self._ancestry.express(draw_all(self.space, n, self._rng))

    def _children(self, n: int) -> Genes:
        sampled = self._rng.integers(len(self._genes), size=(n, self.sample))
        winners = sampled[np.arange(n), self._place[sampled].argmin(axis=1)]
        children = mutate_one(self.space, self._ancestry.recall(self._genes[winners]), self._rng)
        return self._ancestry.express(repair(self.space, children, self.violation, self._rng))
