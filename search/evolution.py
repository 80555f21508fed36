"""NSGA-II on whole arrays: a population is bred, mutated and ranked at once.  N networks, G genes, M objectives.

Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm".
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
from search.variation import below, check_chances, cross, draw_all, mutate


@dataclass(eq=False)
class Evolution:
    """Evolutionary search for one or several objectives under limits.

    population: networks that survive; the first ones are random.
    mutation: chance of each gene to change to another choice; None is half a gene of a child on average.
    crossover: chance of a child to have two parents, each gene from either with equal chance.
    violation: exact violations of the limits (N,); children are repaired by them before they are proposed.
    """

    space: Space = field(repr=False)
    _: KW_ONLY
    seed: int = 0
    n_objectives: int = 1
    population: int = 100
    mutation: float | None = None
    crossover: float = 0.9
    violation: Violation | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.population < 2:
            raise UserError(f"population {self.population} cannot breed; take at least 2")
        check_chances(mutation=self.mutation, crossover=self.crossover)
        self._rng = np.random.default_rng(self.seed)
        self._fresh = Fresh(self.space)
        self._ancestry = Ancestry(self.space)
        self._genes: Genes = np.empty((0, len(self.space.genes)), dtype=np.int8)
        self._cost = np.empty((0, self.n_objectives))
        self._violation = np.empty(0)
        free = np.count_nonzero(self.space.counts > 1)
        self._chance = 0.5 / (int(free) or 1) if self.mutation is None else self.mutation

    def ask(self, n: int) -> Genes:
        """Breed n networks from the population; random ones while it is not full."""
        breed = [self._offspring] * TRIES if len(self._genes) >= self.population else []
        return self._fresh.take(n, [*breed, *[self._random] * TRIES])

    def tell(self, genes: Genes, cost: NDArray[np.float64], violation: NDArray[np.float64]) -> None:
        """Keep the best of the population and `genes`: by rank, then by crowding; the best come first."""
        self._fresh.add(genes)
        genes = np.concatenate([self._genes, genes])
        cost = np.concatenate([self._cost, cost])
        violation = np.concatenate([self._violation, violation])
        kept = best_first(cost, violation)[: self.population]
        self._genes, self._cost, self._violation = genes.take(kept, axis=0), cost[kept], violation[kept]
        self._full = self._ancestry.recall(self._genes)

    def _random(self, n: int) -> Genes:
        return self._ancestry.express(draw_all(self.space, n, self._rng))

    def _offspring(self, n: int) -> Genes:
        # The population is in order, best first: the lower index of two wins a tournament.
        mothers, fathers = below(self._rng, len(self._genes), 2, 2, n).min(axis=0)
        fathers = np.where(self._rng.random(n) < self.crossover, fathers, mothers)
        first, second = self._full.take([mothers, fathers], axis=0)
        children = mutate(self.space, cross(first, second, self._rng), self._chance, self._rng)
        return self._ancestry.express(repair(self.space, children, self.violation, self._rng))
