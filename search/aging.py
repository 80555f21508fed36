"""Aging evolution: the oldest networks die, however good they are.  N networks, G genes, M objectives.

Real et al. 2019, "Regularized evolution for image classifier architecture search", algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes
from search.breeding import Breeder
from search.pareto import best_first
from search.variation import mutate_one


@dataclass(eq=False, kw_only=True)
class AgingEvolution(Breeder):
    """Each child is the best of a random sample of the population with one gene changed.

    population: the youngest networks, those that may have children; the first ones are random.
    sample: networks of the population that compete to be the parent of a child.
    """

    sample: int = 25

    def __post_init__(self) -> None:
        if not 1 <= self.sample <= self.population:
            raise UserError(f"sample {self.sample} of population {self.population}; take at least 1, at most all")
        super().__post_init__()
        self._place = np.empty(0, dtype=np.int64)

    def tell(self, genes: Genes, cost: NDArray[np.float64], violation: NDArray[np.float64]) -> None:
        """Let `genes` take the places of the oldest."""
        self._fresh.add(genes)
        joined = self._with(genes, cost, violation)
        self._keep(np.arange(len(joined[0]))[-self.population :], *joined)
        self._place = np.argsort(best_first(self._cost, self._violation))

    def _bred(self, n: int) -> Genes:
        sampled = self._rng.integers(len(self._genes), size=(n, self.sample))
        winners = sampled[np.arange(n), self._place[sampled].argmin(axis=1)]
        return mutate_one(self.space, self._ancestry.recall(self._genes[winners]), self._rng)
