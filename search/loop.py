"""The search: an agent proposes, the problem answers, until enough networks are evaluated; it can be resumed.

Every batch is appended to a log, whole and synchronised, before the agent is told.  To resume, a fresh agent of the
same settings goes through the same batches, answered from the log: it must propose the networks that the log holds,
and ends where an uninterrupted search ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ofa.errors import UserError
from ofa.files import append_jsonl, read_jsonl
from ofa.space import Genes
from search.agents import Agent, keys
from search.feasible import feasible_network
from search.pareto import hypervolume, with_room, worst
from search.problem import Evaluation, Problem, Values
from search.result import RESULT, SearchResult, evaluation_frame, load_result

LOG = "progress.jsonl"
PATIENCE = 20  # batches without a new network after which a search ends: the agent has none left to propose
Progress = Callable[[int, int, dict[str, float]], None]
_Best = tuple[tuple[float, ...], dict[str, float]]


def run_search(
    agent: Agent,
    problem: Problem,
    evaluations: int,
    batch: int,
    *,
    folder: str | Path | None = None,
    reference: tuple[float, ...] | None = None,
    progress: Progress | None = None,
    stall: int | None = None,
    initial: Genes | None = None,
) -> SearchResult:
    """Evaluate `evaluations` different networks, in batches, starting from one that is known to meet the limits.

    agent: fresh, never asked before.
    folder: where the log is kept and the result is saved; started again with the same arguments, the search goes on
        from there.  None keeps nothing.
    reference: the point, in costs, for hypervolumes; by default that of `problem.reference`.
    progress: called after each batch with the networks evaluated, their total, and the values of the best so far.
    initial: networks (K, G) evaluated before the agent proposes any, such as those that are measured already; they
        count, and all are kept.
    stall: batches without growth of the hypervolume after which the search ends early; None never does.
    Raises InfeasibleError where no network meets the limits, UserError for a log that another search wrote.
    """
    if not all(isinstance(number, int | np.integer) and number >= 1 for number in (evaluations, batch)):
        raise UserError(f"evaluations={evaluations} and batch={batch} must be whole numbers, at least 1")
    if agent.n_objectives != len(problem.objectives):
        raise UserError(f"{agent!r} is not made for {len(problem.objectives)} objectives; set n_objectives")
    start = feasible_network(agent.space, problem, initial)
    if initial is not None and len(initial):
        start = np.concatenate([start, initial]) if (problem.exceeds(initial) > 0).all() else initial
    if folder is not None and (done := _finished(Path(folder), agent, problem, evaluations, reference, initial)):
        return done
    log = _Log(None if folder is None else Path(folder) / LOG)
    if stall is not None and stall < 1:
        raise UserError(f"stall is {stall}; give batches without growth, 1 or more, or None")
    genes = _explore(agent, problem, start, evaluations, batch, log, progress, stall)
    result = SearchResult(
        space=agent.space,
        agent=repr(agent),
        seed=agent.seed,
        objectives=dict(problem.objectives),
        limits=problem.bounds,
        evaluations=evaluation_frame(agent.space, problem.evaluate(genes)),
        reference=tuple(_reference(agent, problem, genes) if reference is None else reference),
        seconds=log.seconds,
        measured=_measured(agent),
    )
    if folder is not None:
        result.save(folder)
    return result


def _explore(
    agent: Agent,
    problem: Problem,
    start: Genes,
    evaluations: int,
    batch: int,
    log: _Log,
    progress: Progress | None,
    stall: int | None,
) -> Genes:
    """The different networks that the agent evaluates, in their order, `start` before them (N, G)."""
    known: dict[bytes, Genes] = {}
    best: _Best = ((), {})
    idle = 0
    batches: list[int] = []
    patience = PATIENCE if _replays(agent) else 1  # told nothing new, it would propose the same again
    while len(known) < min(evaluations, agent.space.size) and idle < patience:
        before = len(known)
        n = log.batch or min(batch, evaluations - before)
        genes = start if len(start) and not known else log.genes(agent, n)
        evaluation = log.evaluate(problem, genes)
        agent.tell(genes.copy(), evaluation.cost.copy(), evaluation.violation.copy())  # its own, to do with as it likes
        for key, row in zip(keys(genes), genes, strict=True):
            known.setdefault(key, row)
        idle = 0 if len(known) > before else idle + 1
        best = _better(best, evaluation)
        if progress is not None:
            progress(min(len(known), evaluations), evaluations, best[1])
        if stall is not None and _stalled(problem, known, batches := [*batches, len(known)], stall):
            break
    return np.stack(list(known.values())[: max(evaluations, len(start))])


class _Log:
    """Evaluated batches on disk: the logged ones are answered first, each later one is evaluated and appended."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines = deque(read_jsonl(path)) if path is not None else deque()
        self._first = True
        self._tick = time.perf_counter()
        self.seconds = 0.0

    @property
    def batch(self) -> int:
        """Networks in the next logged batch, 0 when there is none."""
        return len(self._lines[0]["genes"]) if self._lines else 0

    def genes(self, agent: Agent, n: int) -> Genes:
        """What the agent proposes; one that needs no earlier proposals takes the logged ones."""
        if self._lines and not _replays(agent):
            return np.array(self._lines[0]["genes"], dtype=np.int8).reshape(n, -1)
        return agent.space.canonical(np.asarray(agent.ask(n)))  # no network twice by genes of skipped blocks

    def evaluate(self, problem: Problem, genes: Genes) -> Evaluation:
        if self._lines:
            self._replay(problem, genes, self._lines.popleft())
            return problem.evaluate(genes)
        evaluation = problem.evaluate(genes)
        now = time.perf_counter()
        line = {"genes": genes, "values": evaluation.values, "seconds": now - self._tick}
        if self._path is not None:
            append_jsonl(self._path, line)
        self.seconds += now - self._tick
        self._tick = now
        return evaluation

    def _replay(self, problem: Problem, genes: Genes, line: dict[str, Any]) -> None:
        if line["genes"] != genes.tolist():
            raise UserError(f"{self._path} holds a search with other settings; delete its folder or choose another")
        values = {name: np.array(value, dtype=float) for name, value in line["values"].items()}
        if self._first:
            _check_values(problem, genes, values, str(self._path))
        self._first = False
        problem.remember(genes, values)
        self.seconds += line["seconds"]
        self._tick = time.perf_counter()


def _replays(agent: Agent) -> bool:
    """Whether an agent's proposals depend on its earlier ones, not on what it was told alone (`replays` is False)."""
    return bool(getattr(agent, "replays", True))


def _measured(agent: Agent) -> tuple[str, ...]:
    """Names of the values that an agent's model learns because they are measured."""
    return tuple(getattr(agent, "measured", ()))


def _reference(agent: Agent, problem: Problem, genes: Genes) -> list[float]:
    """The reference point (M,): that of the problem, or, where an objective is measured, the worst costs found."""
    if not _measured(agent):
        return problem.reference(agent.space).tolist()
    cost = problem.evaluate(genes).cost
    return with_room(worst(cost), cost).tolist()


def _finished(
    folder: Path,
    agent: Agent,
    problem: Problem,
    evaluations: int,
    reference: tuple[float, ...] | None,
    initial: Genes | None,
) -> SearchResult | None:
    """The result of the same search if it was finished before; its evaluations go into the problem's memo."""
    if not (folder / RESULT).exists():
        return None
    done = load_result(folder)
    asked = (agent.space, repr(agent), dict(problem.objectives), problem.bounds, evaluations)
    if asked != (done.space, done.agent, done.objectives, done.limits, len(done.evaluations)):
        return None
    if reference is not None and tuple(reference) != done.reference:
        return None
    if initial is not None and not set(keys(initial)) <= set(keys(done.genes)):
        return None
    _check_values(problem, done.genes[:1], done.values(slice(1)), str(folder))
    problem.remember(done.genes, done.values())
    return done


def _check_values(problem: Problem, genes: Genes, values: Values, where: str) -> None:
    """Raise UserError where the predictors of `problem` are not those that gave `values`."""
    now = problem.everything(genes)
    if set(now) != set(values) or not all(np.allclose(now[name], values[name], rtol=1e-5) for name in now):
        raise UserError(f"{where} was searched with other predictors; delete its folder or choose another")


def _stalled(problem: Problem, known: dict[bytes, Genes], batches: list[int], stall: int) -> bool:
    """Whether the last `stall` batches added no hypervolume, counted beyond the worst costs found, which count too."""
    if len(batches) <= stall:
        return False
    evaluation = problem.evaluate(np.stack(list(known.values())))
    corner = worst(evaluation.cost) + 1
    feasible = evaluation.violation <= 0
    before = slice(batches[-stall - 1])
    return hypervolume(evaluation.cost[before][feasible[before]], corner) >= hypervolume(
        evaluation.cost[feasible], corner
    )


def _better(best: _Best, evaluation: Evaluation) -> _Best:
    """Costs and values of the best feasible network so far, by the first objective, then by the next."""
    for row in np.flatnonzero(evaluation.violation <= 0):
        cost = tuple(evaluation.cost[row])
        if not best[0] or cost < best[0]:
            best = (cost, {name: float(value[row]) for name, value in evaluation.values.items()})
    return best
