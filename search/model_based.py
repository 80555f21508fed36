"""Search of few measurements: a model learns from what was measured, and the most promising networks are measured next.

The loop of LINAS (Cummings et al. 2022) and of Bayesian optimisation (Jones et al. 1998).  N networks, G genes,
M objectives.  What is computed exactly (MACs, memory, look-up latency) is never modelled: exact objectives and limits
are known of every candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes, Space
from search.acquisition import NODES, WEIGHTS, Warp, added_volume, added_volumes, log_improvement
from search.agents import Fresh, every, keys
from search.evolution import Evolution
from search.limits import refuse_measured
from search.pareto import best_first
from search.problem import Problem, probes
from search.repair import repair
from search.variation import draw, draw_all

Floats = NDArray[np.float64]
GENERATIONS, CHILDREN = 15, 200  # of the evolution that finds the candidates of a larger space
CANDIDATES = 300  # the first by rank, among which added hypervolumes are compared
MARGIN = 0.02  # of an exact cost's extent, beyond its worst: a network at a limit would add no hypervolume


class Model(Protocol):
    """A learner such as `predictors.Accuracy`."""

    def fit(self, genes: Genes, values: NDArray[Any]) -> Any:
        """Learn from genes (N, G) and values (N,)."""

    def predict(self, genes: Genes) -> tuple[Floats, Floats]:
        """Mean and standard deviation, (N,) each."""


@dataclass(eq=False)
class ModelBased:
    """Proposes the networks that a model expects most of; its proposals depend on its settings and what it was told.

    model: makes an unfitted model; one is fitted for every measured objective whenever networks are asked for.
    problem: what is searched; its objectives and limits outside `measured` are exact functions of genes.
    measured: names of the problem's predictors that are measured.
    first: networks measured before a model is fitted: the largest, the smallest, and random ones far from each other.
    kappa: standard deviations that the evolution that finds candidates is optimistic by.
    """

    space: Space = field(repr=False)
    _: KW_ONLY
    model: Callable[[], Model] = field(repr=False)
    problem: Problem = field(repr=False)
    measured: tuple[str, ...] = ("accuracy",)
    seed: int = 0
    n_objectives: int = field(default=1, init=False)
    first: int = 10
    kappa: float = 1.0
    replays = False  # what it proposes needs no earlier proposals, only what it was told

    def __post_init__(self) -> None:
        self.measured = tuple(self.measured)
        self._names = list(self.problem.objectives)
        unknown = set(self.measured) - set(self._names)
        if unknown or not self.measured:
            raise UserError(f"measured {sorted(unknown)} must be objectives; choose from {', '.join(self._names)}")
        self.n_objectives = len(self._names)
        refuse_measured(self.problem.bounds, self.measured)
        self._genes: Genes = np.empty((0, len(self.space.genes)), dtype=np.int8)
        self._told = self._genes  # with those beyond a limit of which a frugal problem measured nothing
        self._cost = np.empty((0, self.n_objectives))
        self._violation = np.empty(0)

    def tell(self, genes: Genes, cost: Floats, violation: Floats) -> None:
        """Add measured networks; one that is known already is left out."""
        known = set(keys(self._told))
        first = {key: i for i, key in reversed(list(enumerate(keys(genes))))}
        new = sorted(i for key, i in first.items() if key not in known)
        self._told = np.concatenate([self._told, genes[new]])
        new = [i for i in new if np.isfinite(cost[i]).all()]
        self._genes = np.concatenate([self._genes, genes[new]])
        self._cost = np.concatenate([self._cost, cost[new]])
        self._violation = np.concatenate([self._violation, violation[new]])

    def ask(self, n: int) -> Genes:
        """The n networks that promise most; spread over the space as long as fewer than `first` are known.

        Then none beyond a limit, where one within is known: known ones take their places when no others are found.
        """
        rng = np.random.default_rng((self.seed, len(self._told)))
        fresh = Fresh(self.space)
        fresh.add(self._told)
        enough = len(self._genes) >= self.first
        best = self._promising(n, rng) if enough else self._spread(n, rng)
        known = self._genes[self._violation <= 0]

        def proposed(k: int) -> Genes:
            genes = np.concatenate([best, self._drawn(k, rng)])
            if not (enough and len(known)):
                return genes
            return np.concatenate([genes[self.problem.exceeds(genes) <= 0], np.resize(known, (k, genes.shape[1]))])

        return fresh.take(n, [proposed] * 4)

    def _drawn(self, n: int, rng: np.random.Generator) -> Genes:
        """n random networks, moved within the limits (n, G)."""
        return self.space.canonical(repair(self.space, draw_all(self.space, n, rng), self.problem.exceeds, rng))

    # -- candidates --------------------------------------------------------------------------------------------------

    def _spread(self, n: int, rng: np.random.Generator) -> Genes:
        """The largest and the smallest network, then others, each far from those before it; within the limits."""
        ends = np.concatenate([self.space.largest(), self.space.smallest()])
        ends = ends[self.problem.exceeds(ends) <= 0]
        if not len(self._told):
            return np.concatenate([ends, self._far(n, ends, rng)])
        return self._far(n, self._told, rng)

    def _far(self, n: int, known: Genes, rng: np.random.Generator) -> Genes:
        """n networks, each the one that differs most in its one-hot genes from the nearest of those before it."""
        pool = draw(self.space, 20 * max(n, 10), rng)
        allowed = self.problem.exceeds(pool) <= 0
        if allowed.sum() < n:
            pool = self._drawn(len(pool), rng)
            allowed = self.problem.exceeds(pool) <= 0
        pool = pool[allowed] if allowed.any() else pool[np.argsort(self.problem.exceeds(pool))[: 2 * n]]
        features = self.space.onehot(pool).astype(np.float64)
        near = np.full(len(pool), np.inf)
        for row in self.space.onehot(known):
            near = np.minimum(near, np.abs(features - row).sum(axis=1))
        chosen = []
        for _ in range(min(n, len(pool))):
            chosen.append(int(near.argmax()))
            near = np.minimum(near, np.abs(features - features[chosen[-1]]).sum(axis=1))
            near[chosen[-1]] = -1
        return pool[chosen]

    def _promising(self, n: int, rng: np.random.Generator) -> Genes:
        """The most promising networks, best first: chosen one after another, each as if those before were measured."""
        models = self._fitted()
        candidates = self._candidates(models, rng)
        if not len(candidates):
            return candidates
        mean, std = self._predicted(models, candidates)
        over = self.problem.exceeds(candidates)
        allowed = over <= 0
        if not allowed.any():
            return candidates[np.argsort(over, kind="stable")]
        candidates, mean, std = candidates[allowed], mean[allowed], std[allowed]
        known = self._warped(self._cost[self._violation <= 0])
        chosen: list[int] = []
        for _ in range(min(n, len(candidates))):
            score = self._acquisition(mean, std, known)
            score[chosen] = -np.inf
            chosen.append(int(score.argmax()))
            known = np.concatenate([known, mean[chosen[-1:]]])
        return candidates[chosen]

    def _candidates(self, models: dict[str, Model], rng: np.random.Generator) -> Genes:
        """Networks not measured yet: all of a small space, else those that an evolution passes (N, G)."""
        if (small := every(self.space)) is not None:
            return self._unmeasured(small)
        seed = int(rng.integers(2**31))
        agent = Evolution(self.space, seed=seed, n_objectives=self.n_objectives, violation=self.problem.exceeds)
        agent.tell(self._genes, self._warped(self._cost), self._violation)
        seen = []
        for _ in range(GENERATIONS):
            genes = agent.ask(CHILDREN)
            mean, std = self._predicted(models, genes)
            agent.tell(genes, mean - self.kappa * std, self.problem.exceeds(genes))
            seen.append(genes)
        return self._unmeasured(np.unique(np.concatenate(seen), axis=0))

    def _unmeasured(self, genes: Genes) -> Genes:
        known = set(keys(self._told))
        return genes[[key not in known for key in keys(genes)]]

    # -- what is known of candidates ---------------------------------------------------------------------------------

    def _fitted(self) -> dict[str, Model]:
        """A model of each measured objective, of minus its warped cost: the higher, the better."""
        self._warps = [Warp.of(column) if name in self.measured else None for name, column in self._columns()]
        warped = dict(zip(self._names, self._warped(self._cost).T, strict=True))
        models = {name: self.model() for name in self.measured}
        for name, model in models.items():
            model.fit(self._genes, -warped[name])
        return models

    def _columns(self) -> list[tuple[str, Floats]]:
        return list(zip(self._names, self._cost.T, strict=True))

    def _warped(self, cost: Floats) -> Floats:
        """Costs (N, M) on the scales of the models; exact ones stay as they are."""
        return np.stack([w(c) if w else c for w, c in zip(self._warps, cost.T, strict=True)], axis=1)

    def _unwarped(self, cost: Floats) -> Floats:
        return np.stack([w.back(c) if w else c for w, c in zip(self._warps, cost.T, strict=True)], axis=1)

    def _predicted(self, models: dict[str, Model], genes: Genes) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the costs on the scales of the models, (N, M) each."""
        exact = self.problem.predict(genes, [name for name in self._names if name not in models])
        mean, std = np.zeros((len(genes), len(self._names))), np.zeros((len(genes), len(self._names)))
        for column, name in enumerate(self._names):
            if name in models:
                mean[:, column], std[:, column] = models[name].predict(genes)
            sign = -1 if name in models else self.problem.objectives[name]
            mean[:, column] = sign * (mean[:, column] if name in models else exact[name])
        return mean, std

    def _acquisition(self, mean: Floats, std: Floats, known: Floats) -> Floats:
        """What each candidate is expected to add (N,); known: the feasible costs so far, on the models' scales."""
        if self.n_objectives == 1:
            return log_improvement(mean[:, 0], std[:, 0], known[:, 0].min() if len(known) else mean.max())
        if self.n_objectives == 2 and len(self.measured) == 1:
            back = [self._unwarped(mean + x * std) for x in NODES]
            known = self._unwarped(known)
            return np.sum(
                [w * added_volume(c, known, self._corner) for w, c in zip(WEIGHTS, back, strict=True)], axis=0
            )
        return self._optimistic(mean, std, known)

    def _optimistic(self, mean: Floats, std: Floats, known: Floats) -> Floats:
        """Hypervolume that optimistic costs add; where they add none, minus the place by rank; -inf beyond them all."""
        cost = mean - self.kappa * std
        near = best_first(cost, np.zeros(len(cost)))[:CANDIDATES]
        added = added_volumes(self._unwarped(cost[near]), self._unwarped(known), self._corner)
        score = np.full(len(mean), -np.inf)
        score[near] = np.where(added > 0, added, -np.arange(len(near)))
        return score

    @property
    def _corner(self) -> Floats:
        """The worst costs measured; of exact ones MARGIN beyond the worst of 1,000 networks, or the limit (M,)."""
        corner = self._cost.max(axis=0)
        for column, name in enumerate(self._names):
            if name not in self.measured:
                sign = self.problem.objectives[name]
                cost = sign * self._probed[name]
                worst = np.fmin(cost.max(), self.problem.worst(name))
                corner[column] = worst + MARGIN * (abs(worst - cost.min()) or 1.0)
        return corner

    @cached_property
    def _probed(self) -> dict[str, Floats]:
        exact = [name for name in self._names if name not in self.measured]
        return self.problem.predict(probes(self.space), exact)
