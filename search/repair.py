"""Repair: networks beyond an exact limit are moved toward it before anything is measured.  N networks, G genes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ofa.space import Genes, Space
from search.variation import mutate_one

Violation = Callable[[Genes], NDArray[np.float64]]
ROUNDS = 12


def repair(
    space: Space, genes: Genes, violation: Violation | None, rng: np.random.Generator, *, rounds: int = ROUNDS
) -> Genes:
    """Change random genes of networks that exceed a limit, keep what exceeds it less: (N, G), not canonical.

    violation: 0 where every limit is met (N,), such as `Problem.exceeds`; None leaves the networks as they are.
    Most end within the limits; the others are left to Deb's rules.
    """
    if violation is None or not len(genes):
        return genes
    repaired, excess = genes.copy(), violation(space.canonical(genes))
    for _ in range(rounds):
        bad = np.flatnonzero(excess > 0)
        if not len(bad):
            break
        trial = mutate_one(space, repaired[bad], rng)
        found = violation(space.canonical(trial))
        better = found < excess[bad]
        repaired[bad[better]], excess[bad[better]] = trial[better], found[better]
    return repaired
