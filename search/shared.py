"""One search by several processes, on one machine or many, over an Optuna storage that they share.  G genes.

Every trial is one network.  It is claimed by its trial's number: of several trials of one network the lowest number
measures it.  A measurement is in the storage before its worker asks for the next; what a killed worker was measuring is
given to another one.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ofa.errors import UserError
from ofa.space import Genes, Space
from search.agents import keys
from search.feasible import feasible_network
from search.optuna_agent import make_sampler, parameters
from search.pareto import with_room, worst
from search.problem import Evaluation, Problem
from search.repair import Violation, repair
from search.result import SearchResult, evaluation_frame
from search.storage import opened

WORKER, VALUES, KNOWN = "worker", "values", "known"
PAUSE = 0.05  # seconds between looks at what other workers do
TORN = 10.0  # seconds after which a trial without all of its genes counts as left behind
IDLE = 200  # proposals in a row without a new network after which a worker ends


def create_shared(storage: str, name: str, problem: Problem) -> None:
    """Create the study, or leave it as it is where it exists; call it once, before the workers start."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [optuna.study.StudyDirection.MINIMIZE] * len(problem.objectives)
    with opened(storage) as place:
        optuna.create_study(storage=place, study_name=name, directions=directions, load_if_exists=True)


def tell_shared(storage: str, name: str, space: Space, problem: Problem, genes: Genes) -> None:
    """Add networks (K, G) that were measured before to the study, but for those that it holds or that miss a limit.

    They are chosen from and learned from like others, and are none of those that the workers are to measure.
    """
    if not len(genes):
        return
    with opened(storage) as place:
        study = optuna.load_study(study_name=name, storage=place)
        held = _networks(study, space, done=True)
        wanted = (problem.exceeds(genes) <= 0) & np.array([key not in held for key in keys(genes)], dtype=bool)
        if wanted.any():
            found = problem.evaluate(genes[wanted])
            study.add_trials([_measured(space, genes[wanted], found, i, known=True) for i in range(wanted.sum())])


def work(
    storage: str,
    name: str,
    space: Space,
    problem: Problem,
    evaluations: int,
    *,
    sampler: str = "tpe",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    violation: Violation | None = None,
    lease: float = 3600.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Propose and measure networks until the study holds `evaluations` different ones besides those it was told.

    sampler, options, seed: as `OptunaAgent` takes them; another seed for each worker.
    violation: networks beyond the limits are moved towards them before they are measured, such as `Problem.exceeds`
        where the limits are of exact costs; None measures them too.
    lease: seconds, from when this worker first saw it, after which a measurement counts as lost and is made again,
        though it counts if it ends after all; on this machine a worker that has ended is noticed at once.
    progress: called after each proposal with the networks that all workers have measured, and their total.
    Raises InfeasibleError where no network meets the limits.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with opened(storage) as place:
        study = optuna.load_study(study_name=name, storage=place, sampler=make_sampler(sampler, seed, options or {}))
        feasible_network(space, problem)
        leases, idle = _Leases(lease), 0
        while True:
            held = _networks(study, space, done=True)
            known = sum(KNOWN in trial.user_attrs for trial in held.values())
            done, target = len(held), min(evaluations + known, space.size)
            progress(done - known, target - known)
            if done >= target or idle >= IDLE:
                break
            _take_over(study, space, leases)
            if len(_networks(study, space)) >= target:  # the rest is being measured by others
                time.sleep(PAUSE)
                continue
            idle = 0 if _one(study, space, problem, target, leases, violation) else idle + 1


def shared_result(
    storage: str, name: str, space: Space, problem: Problem, *, seed: int = 0, measured: tuple[str, ...] = ("accuracy",)
) -> SearchResult:
    """What all workers found, in the order in which the networks were proposed; nothing is measured again.

    seed: of the search, to be kept with it.  measured: names of the predictors that the workers measured.
    Raises UserError where none of them meets the limits yet.
    """
    with opened(storage) as place:
        found = _networks(optuna.load_study(study_name=name, storage=place), space, done=True)
    if not found:
        raise UserError(f"study {name} of {storage} holds no measured network; start a worker")
    genes = np.concatenate([_genes(space, trial) for trial in found.values()])
    values = [trial.user_attrs[VALUES] for trial in found.values()]
    problem.remember(genes, {name: np.array([value[name] for value in values]) for name in problem.predictors})
    evaluation = problem.evaluate(genes)
    if (evaluation.violation > 0).all():
        raise UserError(f"none of {len(genes)} networks of study {name} meets the limits; let the workers measure more")
    seconds = sum(trial.duration.total_seconds() for trial in found.values() if trial.duration)
    return SearchResult(
        space=space,
        agent=f"shared study {name}",
        seed=seed,
        objectives=dict(problem.objectives),
        limits=problem.bounds,
        evaluations=evaluation_frame(space, evaluation),
        reference=tuple(with_room(worst(evaluation.cost), evaluation.cost).tolist()),
        seconds=seconds,
        measured=measured,
    )


def _one(
    study: Study, space: Space, problem: Problem, target: int, leases: _Leases, violation: Violation | None
) -> bool:
    """Ask for a network and measure it, if no earlier trial did or does; whether it was new."""
    trial = study.ask(parameters(space))
    trial.set_user_attr(WORKER, _me())
    genes = _genes(space, trial)
    nearer = space.canonical(repair(space, genes, violation, np.random.default_rng(trial.number)))
    if not np.array_equal(nearer, genes):
        study.tell(trial, state=TrialState.FAIL)
        study.enqueue_trial({gene.name: int(value) for gene, value in zip(space.genes, nearer[0], strict=True)})
        return False
    earlier = _settled(study, space, trial.number, leases) | set(_networks(study, space, done=True))
    if keys(genes)[0] in earlier or len(earlier) >= target:
        study.tell(trial, state=TrialState.FAIL)
        return False
    found = problem.evaluate(genes)
    told = _measured(space, genes, found, 0)
    try:
        trial.set_user_attr(VALUES, told.user_attrs[VALUES])
        trial.set_constraint("violation", float(found.violation[0]))
        study.tell(trial, found.cost[0].tolist())
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):  # given up by another worker: the lease was over
        study.add_trial(told)
    return True


def _measured(space: Space, genes: Genes, found: Evaluation, row: int, *, known: bool = False) -> FrozenTrial:
    """The finished trial of one network of an evaluation."""
    values = {name: float(value[row]) for name, value in found.values.items()}
    return optuna.trial.create_trial(
        values=found.cost[row].tolist(),
        constraints={"violation": float(found.violation[row])},
        params={gene.name: int(value) for gene, value in zip(space.genes, genes[row], strict=True)},
        distributions=parameters(space),
        user_attrs={VALUES: values} | ({KNOWN: True} if known else {}),
    )


def _settled(study: Study, space: Space, number: int, leases: _Leases) -> set[bytes]:
    """The networks of all trials before `number`, once each of them has its genes or is given up."""
    while True:
        before = [trial for trial in study.get_trials(deepcopy=False) if trial.number < number]
        if all(_whole(space, t) or t.state != TrialState.RUNNING or leases.left(t) for t in before):
            return {keys(_genes(space, trial))[0] for trial in before if _whole(space, trial) and _counts(trial)}
        time.sleep(PAUSE)


def _networks(study: Study, space: Space, *, done: bool = False) -> dict[bytes, FrozenTrial]:
    """The trial of each network that is measured, or, unless `done`, being measured."""
    found: dict[bytes, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        if _whole(space, trial) and (trial.state == TrialState.COMPLETE if done else _counts(trial)):
            found.setdefault(keys(_genes(space, trial))[0], trial)
    return found


def _take_over(study: Study, space: Space, leases: _Leases) -> None:
    """Give up the trials that ended workers left, and line their networks up to be measured."""
    for trial in _running(study):
        if not leases.left(trial):
            continue
        try:
            study.tell(trial.number, state=TrialState.FAIL)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            continue  # another worker was faster
        if _whole(space, trial) and trial.params:
            study.enqueue_trial(trial.params)


def _running(study: Study) -> Iterator[FrozenTrial]:
    yield from study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


@dataclass
class _Leases:
    """Which running trials are left behind; `seconds` is how long a worker may have one.

    Time counts by this process's clock, from when it first saw the trial: the storage keeps local times, which other
    machines' clocks, their time zones and summer time put hours apart.
    """

    seconds: float
    _seen: dict[int, float] = field(default_factory=dict)

    def left(self, trial: FrozenTrial) -> bool:
        """Whether the worker of a running trial has ended, or has had it for longer than the lease."""
        age = time.monotonic() - self._seen.setdefault(trial.number, time.monotonic())
        host, _, process = trial.user_attrs.get(WORKER, "").partition(" ")
        if not process:
            return age > TORN
        return age > self.seconds or (host == socket.gethostname() and not _alive(int(process)))


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _zombie(process)


def _zombie(process: int) -> bool:
    """Whether a process has ended and its parent does not know yet; where there is no /proc, nobody knows."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state in "ZX"


def _me() -> str:
    return f"{socket.gethostname()} {os.getpid()}"


def _counts(trial: FrozenTrial) -> bool:
    return trial.state in (TrialState.COMPLETE, TrialState.RUNNING)


def _whole(space: Space, trial: FrozenTrial) -> bool:
    return len(trial.params) == len(space.genes)


def _genes(space: Space, trial: FrozenTrial | optuna.trial.Trial) -> Genes:
    return space.canonical(np.array([[trial.params[gene.name] for gene in space.genes]], dtype=np.int8))
