"""What the evolutionary agents share: settings, the networks they breed from, and proposals that are new.

N networks, G genes, M objectives.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

import numpy as np
from numpy.typing import NDArray

from ofa.space import Genes, Space
from search.agents import TRIES, Ancestry, Fresh, every
from search.repair import Violation, repair
from search.variation import draw_all


@dataclass(eq=False)
class Breeder:
    """An agent with a population; a subclass says how it breeds (`_bred`) and, in `tell`, which networks it keeps.

    population: networks that are known before the first children; the first ones are random.
    violation: exact violations of the limits (N,); networks are repaired by them before they are proposed.
    """

    space: Space = field(repr=False)
    _: KW_ONLY
    seed: int = 0
    n_objectives: int = 1
    population: int = 100
    violation: Violation | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._fresh = Fresh(self.space)
        self._ancestry = Ancestry(self.space)
        self._genes: Genes = np.empty((0, len(self.space.genes)), dtype=np.int8)
        self._cost = np.empty((0, self.n_objectives))
        self._violation = np.empty(0)

    def ask(self, n: int) -> Genes:
        """Propose n children of the population; random networks while it is not full, in the end those left over."""
        breed = [self._children] * TRIES if self._grown else []
        return self._fresh.take(n, [*breed, *[self._random] * TRIES, self._rest])

    @property
    def _grown(self) -> bool:
        return len(self._genes) >= self.population

    def _bred(self, n: int) -> Genes:
        """n children with genes for all blocks, (n, G)."""
        raise NotImplementedError

    def _children(self, n: int) -> Genes:
        return self._allowed(self._bred(n))

    def _random(self, n: int) -> Genes:
        return self._allowed(draw_all(self.space, n, self._rng))

    def _rest(self, n: int) -> Genes:
        """All networks of a small space, those that exceed the limits least before others; n random ones of a large."""
        found = every(self.space)
        if found is None:
            return self._random(n)
        return found if self.violation is None else found[np.argsort(self.violation(found), kind="stable")]

    def _allowed(self, full: Genes) -> Genes:
        """The canonical networks of genes for all blocks, moved within the limits."""
        return self._ancestry.express(repair(self.space, full, self.violation, self._rng))

    def _with(
        self, genes: Genes, cost: NDArray[np.float64], violation: NDArray[np.float64]
    ) -> tuple[Genes, NDArray[np.float64], NDArray[np.float64]]:
        """The population and these networks after it."""
        both = (self._genes, genes), (self._cost, cost), (self._violation, violation)
        return np.concatenate(both[0]), np.concatenate(both[1]), np.concatenate(both[2])

    def _keep(
        self, kept: NDArray[np.int64], genes: Genes, cost: NDArray[np.float64], violation: NDArray[np.float64]
    ) -> None:
        """Let the rows `kept` be the population."""
        self._genes, self._cost, self._violation = genes.take(kept, axis=0), cost[kept], violation[kept]
