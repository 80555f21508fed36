"""Whether any network meets the limits, found out before a search, and the nearest one if none does.

Only the limited values are computed: for exact costs the answer takes well under a second, and it always ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Arch, Genes, Space
from search.evolution import Evolution
from search.limits import show
from search.problem import Problem, probes

GENERATIONS, CHILDREN = 20, 200
MORE = 100  # generations where each limit can be met alone
Excess = Callable[[Genes], NDArray[np.float64]]


class InfeasibleError(UserError):
    """No network meets the limits; `binding` names those that stand in the way, `nearest` is the closest network."""

    def __init__(self, message: str, binding: tuple[str, ...], nearest: Arch) -> None:
        super().__init__(message)
        self.binding = binding
        self.nearest = nearest

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...], Arch]]:
        return type(self), (str(self), self.binding, self.nearest)  # as it travels between processes


def feasible_network(space: Space, problem: Problem, known: Genes | None = None) -> Genes:
    """One network that meets every limit, (1, G), or (0, G) without limits; raises InfeasibleError where none is found.

    known: networks (K, G) to try first.
    """
    if not problem.bounds:
        return probes(space)[:0]

    def excess(genes: Genes) -> NDArray[np.float64]:
        values = problem.predict(genes, problem.bounds)
        return np.stack([problem.excess(name, values[name]) for name in problem.bounds], axis=1)

    nearest = _minimise(excess, space, known)
    if _beyond(excess, nearest):
        alone = _unreachable(space, problem, nearest)
        nearest = nearest if alone else _minimise(excess, space, nearest, MORE)  # a short search may miss a network
        if _beyond(excess, nearest):
            raise _infeasible(space, problem, nearest, alone)
    return nearest


def _beyond(excess: Excess, genes: Genes) -> bool:
    return bool(excess(genes).sum() > 0)


def _minimise(excess: Excess, space: Space, known: Genes | None = None, generations: int = GENERATIONS) -> Genes:
    """The network (1, G) with the least sum of `excess`, genes (N, G) to (N, M): evolution, then descent; stops at 0.

    Evolution has each of the M as an objective, or what one of them takes to be met crowds out the others.
    """
    genes = probes(space) if known is None else np.concatenate([known, probes(space)])
    agent = Evolution(space, population=CHILDREN // 2, n_objectives=excess(genes[:1]).shape[1])
    best, lowest = genes[:1], np.inf
    for _ in range(generations):
        values = excess(genes)
        score = values.sum(axis=1)
        if score.min() < lowest:
            best, lowest = genes[[score.argmin()]], score.min()
        if lowest <= 0:
            return best
        agent.tell(genes, values, np.zeros(len(genes)))
        genes = agent.ask(CHILDREN)
    return _descend(excess, space, best)


def _descend(excess: Excess, space: Space, start: Genes) -> Genes:
    """Change one gene at a time, always the one that lowers the sum of `excess` most, until none does."""
    best, lowest = start, excess(start).sum()
    column = np.repeat(np.arange(len(space.counts)), space.counts)
    choice = np.concatenate([np.arange(count) for count in space.counts])
    while lowest > 0:
        neighbours = np.repeat(best, len(column), axis=0)
        neighbours[np.arange(len(column)), column] = choice
        neighbours = space.canonical(neighbours)
        score = excess(neighbours).sum(axis=1)
        if score.min() >= lowest:
            break
        best, lowest = neighbours[[score.argmin()]], score.min()
    return best


def _unreachable(space: Space, problem: Problem, nearest: Genes) -> dict[str, NDArray[np.float64]]:
    """The best value (1,) of each limit that `nearest` exceeds and no network meets, the others left aside."""
    exceeded = [name for name, values in _limited(problem, nearest).items() if problem.excess(name, values)[0] > 0]
    best = {name: _best_alone(space, problem, name) for name in exceeded}
    return {name: value for name, value in best.items() if problem.excess(name, value)[0] > 0}


def _infeasible(
    space: Space, problem: Problem, nearest: Genes, alone: dict[str, NDArray[np.float64]]
) -> InfeasibleError:
    values = _limited(problem, nearest)
    binding = alone or {name: value for name, value in values.items() if problem.excess(name, value)[0] > 0}
    why = ", ".join(
        f"{problem.limit(name)} (at best {problem.reach(name, value[0])})" for name, value in binding.items()
    )
    has = ", ".join(f"{name} {show(value[0])}" for name, value in values.items())
    arch = space.decode(nearest)[0]
    return InfeasibleError(
        f"no network of space {space.name} {'meets' if alone else 'was found that meets'} {why}"
        f"{'' if alone else ' together with the other limits'}; "
        f"the nearest, {arch}, has {has}; relax {', '.join(binding)} or take another space",
        tuple(binding),
        arch,
    )


def _limited(problem: Problem, genes: Genes) -> Mapping[str, NDArray[np.float64]]:
    return problem.predict(genes, problem.bounds)


def _best_alone(space: Space, problem: Problem, name: str) -> NDArray[np.float64]:

    def excess(genes: Genes) -> NDArray[np.float64]:
        return problem.excess(name, problem.predict(genes, [name])[name])[:, None]

    return problem.predict(_minimise(excess, space), [name])[name]
