"""Optuna's samplers behind ask and tell.  N networks, G genes, M objectives.

Each gene is a categorical parameter, its values the integers of the choices.  A trial takes 10-70 ms, the more the more
there were before, with gp a second and more: this agent is for some hundreds of networks, `Evolution` for many
thousands.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from ofa.errors import UserError
from ofa.space import Genes, Space
from search.agents import TRIES, Fresh, keys, random_proposals
from search.storage import open_storage

Result = tuple[list[float], float]  # costs and violation of a network
OWNER = "owner"  # a study's attribute


class RememberingTPE(TPESampler):
    """Optuna's TPE for studies whose trials all have the same parameters: faster, with the same proposals.

    It translates the parameters of every trial for every new one, and looks in all of them for those they share.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._shared: dict[str, BaseDistribution] = {}
        self._rows: dict[tuple[str, ...], dict[int, list[float]]] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters of the first finished trial."""
        self._shared = self._shared or super().infer_relative_search_space(study, trial)
        return self._shared

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], study: optuna.Study
    ) -> dict[str, NDArray[Any]]:
        known = self._rows.setdefault(tuple(search_space), {})
        for trial in trials:
            if trial.number not in known and search_space.keys() <= trial.params.keys():
                row = [choice.to_internal_repr(trial.params[name]) for name, choice in search_space.items()]
                known[trial.number] = row
        rows = [known[trial.number] for trial in trials if trial.number in known]
        return dict(zip(search_space, np.array(rows).reshape(len(rows), len(search_space)).T, strict=True))


SAMPLERS: dict[str, tuple[type[BaseSampler], dict[str, Any]]] = {
    "tpe": (RememberingTPE, {"multivariate": True}),  # univariate, the default for several objectives, is slower
    "nsga2": (NSGAIISampler, {}),
    "nsga3": (NSGAIIISampler, {}),
    "gp": (GPSampler, {"deterministic_objective": True}),
    "random": (RandomSampler, {}),
}


@dataclass(eq=False)
class OptunaAgent:
    """Search by an Optuna sampler: tpe, nsga2, nsga3, gp (needs torch) or random; `options` go to the sampler.

    storage: where Optuna keeps the study (`search.storage`), for its dashboard; None is memory.  Several processes
        share one search by `search.shared` instead.
    owner: whose study it is.  An agent is fresh, what is resumed is the log of `run_search`: it begins its owner's
        study of this name anew.  Raises UserError where that is of another owner, or of none.
    """

    space: Space = field(repr=False)
    _: KW_ONLY
    seed: int = 0
    n_objectives: int = 1
    sampler: str = "tpe"
    options: Mapping[str, Any] | None = None
    storage: str | None = field(default=None, repr=False)
    study: str = field(default="search", repr=False)
    owner: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler, storage = make_sampler(self.sampler, self.seed, self.options or {}), open_storage(self.storage)
        if self.study in optuna.get_all_study_names(storage):
            self._discard(storage)
        self._study = optuna.create_study(
            storage=storage,
            study_name=self.study,
            directions=["minimize"] * self.n_objectives,
            sampler=sampler,
        )
        self._study.set_user_attr(OWNER, self.owner)
        self._parameters = parameters(self.space)
        self._rng = np.random.default_rng(self.seed)
        self._fresh = Fresh(self.space)
        self._asked: dict[bytes, Trial] = {}
        self._told: dict[bytes, Result] = {}

    def ask(self, n: int) -> Genes:
        """Propose n networks, one trial each."""
        none = np.empty((0, len(self._parameters)), dtype=np.int8)
        return np.concatenate([none, *(self._ask_one() for _ in range(n))])

    def tell(self, genes: Genes, cost: NDArray[np.float64], violation: NDArray[np.float64]) -> None:
        """Finish the trials of `genes`; a network that was not asked for becomes a finished trial."""
        self._fresh.add(genes)
        results = zip(cost.tolist(), violation.tolist(), strict=True)
        for row, key, result in zip(genes, keys(genes), results, strict=True):
            if key in self._told:
                continue
            self._told[key] = result
            if key in self._asked:
                self._finish(self._asked.pop(key), key)
            else:
                self._add(row, result)

    def _ask_one(self) -> Genes:
        """A new network from the sampler; when it only repeats itself, a random one."""
        for attempt in range(TRIES + 1):
            if attempt == TRIES:
                random = self._fresh.take(1, random_proposals(self.space, self._rng))
                self._study.enqueue_trial(self._values(random[0]))
            trial = self._study.ask(self._parameters)
            values = trial.params  # a deep copy, each time
            genes = self.space.canonical(np.array([[values[name] for name in self._parameters]]))
            key = keys(genes)[0]
            if key not in self._asked and key not in self._told:
                self._asked[key] = trial
                self._fresh.add(genes)
                break
            self._finish(trial, key)
        return genes

    def _discard(self, storage: BaseStorage) -> None:
        """Delete the study of an earlier agent of the same owner."""
        there = optuna.load_study(study_name=self.study, storage=storage).user_attrs.get(OWNER)
        if self.owner is None or there != self.owner:
            raise UserError(
                f"study {self.study} is in the storage already, of another search; "
                "name another, as by agent.optuna.study=<name>, or delete that one"
            )
        optuna.delete_study(study_name=self.study, storage=storage)

    def _finish(self, trial: Trial, key: bytes) -> None:
        """Tell a trial the result of its network; one whose network is still being evaluated is given up."""
        if key not in self._told:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        cost, violation = self._told[key]
        trial.set_constraint("violation", violation)
        self._study.tell(trial, cost)

    def _add(self, row: NDArray[np.int8], result: Result) -> None:
        cost, violation = result
        trial = create_trial(
            values=cost,
            constraints={"violation": violation},
            params=self._values(row),
            distributions=self._parameters,
        )
        self._study.add_trial(trial)

    def _values(self, row: NDArray[np.int8]) -> dict[str, int]:
        return dict(zip(self._parameters, row.tolist(), strict=True))


def parameters(space: Space) -> dict[str, BaseDistribution]:
    """A categorical parameter for each gene, its values the integers of the choices."""
    return {gene.name: CategoricalDistribution(range(len(gene.choices))) for gene in space.genes}


def make_sampler(sampler: str, seed: int, options: Mapping[str, Any] = MappingProxyType({})) -> BaseSampler:
    """A sampler by its name in SAMPLERS; `options` are its arguments."""
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler!r} is not known; choose from {', '.join(SAMPLERS)}")
    kind, defaults = SAMPLERS[sampler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return kind(seed=seed, **defaults | dict(options))  # type: ignore[call-arg]
        except TypeError as error:
            raise UserError(f"sampler {sampler} does not take options {dict(options)}: {error}") from None
