"""Whether any network meets the limits, found out before a search, and the nearest one if none does.

Only the limited values are computed: for exact costs the answer takes well under a second, and it always ends.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Arch, Genes, Space
from search.evolution import Evolution
from search.limits import show
from search.problem import Problem, probes

GENERATIONS, CHILDREN = 20, 200
Score = Callable[[Genes], NDArray[np.float64]]


class InfeasibleError(UserError):
    """No network meets the limits; `binding` names those that stand in the way, `nearest` is the closest network."""

    def __init__(self, message: str, binding: tuple[str, ...], nearest: Arch) -> None:
        super().__init__(message)
        self.binding = binding
        self.nearest = nearest

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...], Arch]]:
        return type(self), (str(self), self.binding, self.nearest)  # as it travels between processes


def feasible_network(space: Space, problem: Problem) -> Genes:
    """One network that meets every limit, (1, G), or (0, G) without limits; raises InfeasibleError where none does."""
    if not problem.bounds:
        return probes(space)[:0]

    def violation(genes: Genes) -> NDArray[np.float64]:
        return problem.exceeds(genes)

    nearest = _minimise(violation, space)
    if violation(nearest)[0] > 0:
        raise _infeasible(space, problem, nearest)
    return nearest


def _minimise(score: Score, space: Space) -> Genes:
    """The network of the lowest score that is found, (1, G): random ones, evolution, then descent; stops at 0."""
    genes = probes(space)
    agent = Evolution(space, population=CHILDREN // 2)
    best, lowest = genes[:1], np.inf
    for _ in range(GENERATIONS):
        values = score(genes)
        if values.min() < lowest:
            best, lowest = genes[[values.argmin()]], values.min()
        if lowest <= 0:
            return best
        agent.tell(genes, values[:, None], np.zeros(len(genes)))
        genes = agent.ask(CHILDREN)
    return _descend(score, space, best)


def _descend(score: Score, space: Space, start: Genes) -> Genes:
    """Change one gene at a time, always the one that lowers the score most, until none does."""
    best, lowest = start, score(start)[0]
    column = np.repeat(np.arange(len(space.counts)), space.counts)
    choice = np.concatenate([np.arange(count) for count in space.counts])
    while lowest > 0:
        neighbours = np.repeat(best, len(column), axis=0)
        neighbours[np.arange(len(column)), column] = choice
        neighbours = space.canonical(neighbours)
        values = score(neighbours)
        if values.min() >= lowest:
            break
        best, lowest = neighbours[[values.argmin()]], values.min()
    return best


def _infeasible(space: Space, problem: Problem, nearest: Genes) -> InfeasibleError:
    values = problem.predict(nearest, problem.bounds)
    exceeded = [name for name in problem.bounds if problem.excess(name, values[name])[0] > 0]
    reach = {name: _best_alone(space, problem, name) for name in exceeded}
    alone = {name: value for name, value in reach.items() if problem.excess(name, value)[0] > 0}
    binding = alone or {name: values[name] for name in exceeded}
    why = ", ".join(f"{problem.limit(name)} (at best {show(value[0])})" for name, value in binding.items())
    has = ", ".join(f"{name} {show(value[0])}" for name, value in values.items())
    arch = space.decode(nearest)[0]
    return InfeasibleError(
        f"no network of space {space.name} meets {why}{'' if alone else ' together with the other limits'}; "
        f"the nearest, {arch}, has {has}; relax {', '.join(binding)} or take another space",
        tuple(binding),
        arch,
    )


def _best_alone(space: Space, problem: Problem, name: str) -> NDArray[np.float64]:
    """The best value of one limited name, the other limits left aside, (1,)."""

    def score(genes: Genes) -> NDArray[np.float64]:
        return problem.excess(name, problem.predict(genes, [name])[name])

    return problem.predict(_minimise(score, space), [name])[name]
