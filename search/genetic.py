"""The single-objective evolution that once-for-all searches with, on whole arrays.  N networks, G genes, M objectives.

Cai et al. 2020, sec. 4, with the settings of their finder: the best quarter of a population of 100 has 100 children,
half of them mutants, half of two parents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes
from search.agents import keys
from search.breeding import Breeder
from search.pareto import best_first
from search.variation import below, check_chances, cross, places_of, redraw


@dataclass(eq=False, kw_only=True)
class Genetic(Breeder):
    """Evolution by truncation: only the best have children.

    population: random networks before the first children.
    parents: share of `population` that has children, the best of all networks so far.
    mutation: chance of each block of a mutant to be drawn anew, and of each gene that belongs to no block.
    mutants: share of the children that are mutants; the others have two parents.
    repeats: children may be networks that were proposed before and parents may be the same ones, as in once-for-all; a
        memo answers them for free, and fewer networks are found.
    """

    parents: float = 0.25
    mutation: float = 0.1
    mutants: float = 0.5
    repeats: bool = False

    def __post_init__(self) -> None:
        check_chances(parents=self.parents, mutation=self.mutation, mutants=self.mutants)
        self._kept = round(self.parents * self.population)
        if self._kept < 2:
            raise UserError(f"population {self.population} with parents {self.parents} leaves {self._kept}; take 2")
        super().__post_init__()
        self._told = 0
        self._places = places_of(self.space)

    def ask(self, n: int) -> Genes:
        """Propose n children of the best; random networks while fewer than the population are known."""
        return self._children(n) if self._grown and self.repeats else super().ask(n)

    @property
    def _grown(self) -> bool:
        return self._told >= self.population and len(self._genes) >= 2

    def tell(self, genes: Genes, cost: NDArray[np.float64], violation: NDArray[np.float64]) -> None:
        """Keep the best of the parents and `genes`, each once unless `repeats`; the best come first."""
        if not self.repeats:
            self._fresh.add(genes)
        self._told += len(genes)
        genes, cost, violation = self._with(genes, cost, violation)
        rows = np.arange(len(genes)) if self.repeats else _first_of_each(genes)
        kept = rows[best_first(cost[rows], violation[rows])[: self._kept]]
        self._keep(kept, genes, cost, violation)
        self._full = self._ancestry.recall(self._genes)

    def _bred(self, n: int) -> Genes:
        mothers, fathers = self._full.take(below(self._rng, len(self._full), 2, n), axis=0)
        mutants = round(self.mutants * n)
        changed = redraw(self.space, mothers[:mutants], self.mutation, self._rng, self._places)
        children = np.concatenate([changed, cross(mothers[mutants:], fathers[mutants:], self._rng)])
        return children.take(self._rng.permutation(n), axis=0)


def _first_of_each(genes: Genes) -> NDArray[np.int64]:
    """The first row of each different network, in order."""
    last = range(len(genes) - 1, -1, -1)
    return np.sort(np.array(list(dict(zip(keys(genes[::-1]), last, strict=True)).values()), dtype=np.int64))
