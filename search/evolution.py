"""NSGA-II on whole arrays: a population is bred, mutated and ranked at once.  N networks, G genes, M objectives.

Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes
from search.breeding import Breeder
from search.pareto import best_first
from search.variation import below, check_chances, cross, mutate


@dataclass(eq=False, kw_only=True)
class Evolution(Breeder):
    """Evolutionary search for one or several objectives under limits.

    population: networks that survive; the first ones are random.
    mutation: chance of each gene to change to another choice; None is half a gene of a child on average.
    crossover: chance of a child to have two parents, each gene from either with equal chance.
    """

    mutation: float | None = None
    crossover: float = 0.9

    def __post_init__(self) -> None:
        if self.population < 2:
            raise UserError(f"population {self.population} cannot breed; take at least 2")
        check_chances(mutation=self.mutation, crossover=self.crossover)
        super().__post_init__()
        free = np.count_nonzero(self.space.counts > 1)
        self._chance = 0.5 / (int(free) or 1) if self.mutation is None else self.mutation

    def tell(self, genes: Genes, cost: NDArray[np.float64], violation: NDArray[np.float64]) -> None:
        """Keep the best of the population and `genes`: by rank, then by crowding; the best come first."""
        self._fresh.add(genes)
        joined = self._with(genes, cost, violation)
        self._keep(best_first(*joined[1:])[: self.population], *joined)
        self._full = self._ancestry.recall(self._genes)

    def _bred(self, n: int) -> Genes:
        # The population is in order, best first: the lower index of two wins a tournament.
        mothers, fathers = below(self._rng, len(self._genes), 2, 2, n).min(axis=0)
        fathers = np.where(self._rng.random(n) < self.crossover, fathers, mothers)
        first, second = self._full.take([mothers, fathers], axis=0)
        return mutate(self.space, cross(first, second, self._rng), self._chance, self._rng)
