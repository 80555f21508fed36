"""Which subnets to measure next.  N architectures, G genes."""

from __future__ import annotations

from collections.abc import Callable

import moocore
import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes, Space
from predictors.accuracy import FEWEST, Accuracy
from predictors.costs import Macs

Measure = Callable[[Genes], NDArray[np.float64]]
POOL = 20_000  # random architectures to choose from
RULES = ("random", "stratified", "front")


def choose_subnets(space: Space, n: int, seed: int) -> Genes:
    """The smallest, the largest and n - 2 different random architectures: (n, G), fewer where the space is smaller."""
    rng = np.random.default_rng((seed, 4))
    genes = _first(np.concatenate([_ends(space), space.sample(4 * n, rng)]), n)
    while len(genes) < min(n, space.size):
        genes = _first(np.concatenate([genes, space.sample(4 * n, rng)]), n)
    return genes


def choose_stratified(space: Space, n: int, seed: int) -> Genes:
    """The smallest, the largest, and random ones spread evenly over the logarithm of their MACs: (n, G).

    Where too few are drawn, as in a small space, others follow; fewer than n only where the space is smaller.
    """
    rng = np.random.default_rng((seed, 6))
    pool = _first(space.sample(min(POOL, 200 * n), rng), POOL)
    log_macs = np.log(Macs(space)(pool))
    wanted = np.linspace(log_macs.min(), log_macs.max(), n)
    free = np.ones(len(pool), dtype=bool)
    picked = []
    for target in rng.permutation(wanted)[: len(pool)]:
        nearest = np.argmin(np.where(free, np.abs(log_macs - target), np.inf))
        free[nearest] = False
        picked.append(nearest)
    return _first(np.concatenate([_ends(space), pool[picked], choose_subnets(space, n, seed)]), n)


def choose_on_front(accuracy: Accuracy, known: Genes, n: int, rng: np.random.Generator) -> Genes:
    """Unmeasured architectures on the predicted front of accuracy and MACs of which the predictor knows least: (n, G).

    The front is that of mean plus standard deviation, among random architectures and neighbours of the measured ones
    (one gene in ten redrawn); where it holds fewer than n, the next fronts follow (after LINAS, Cummings et al. 2022).
    """
    space = accuracy.space
    parents = known[rng.integers(len(known), size=POOL)]
    redrawn = np.where(rng.random(parents.shape) < 0.1, space.sample(POOL, rng), parents).astype(np.int8)
    pool = np.unique(np.concatenate([space.sample(POOL, rng), space.canonical(redrawn)]), axis=0)
    pool = pool[~_among(pool, known)]
    mean, std = accuracy.predict(pool)
    rank = moocore.pareto_rank(np.stack([-(mean + std), Macs(space)(pool).astype(np.float64)], axis=1))
    return pool[np.lexsort([-std, rank])[:n]]


def measure_subnets(
    space: Space, measure: Measure, rule: str, n: int, *, batch: int = 10, seed: int = 0
) -> tuple[Genes, NDArray[np.float64]]:
    """Choose n architectures by a rule and measure them: genes (n, G), accuracies (n,); all where the space is smaller.

    rule: "random", "stratified" by MACs, or "front": half of them at random, then `batch` at a time where the predictor
    fitted on those before is least sure of its front.  Raises UserError for an unknown rule.
    """
    if rule not in RULES:
        raise UserError(f"measure.choose {rule!r} is not known; choose from {', '.join(RULES)}")
    if batch < 1:
        raise UserError(f"measure.batch is {batch}; give 1 or more, 10 is usual")
    n = min(n, space.size)
    first = max(FEWEST, n // 2) if rule == "front" else n
    genes = choose_stratified(space, n, seed) if rule == "stratified" else choose_subnets(space, min(n, first), seed)
    values = measure(genes)
    while rule == "front" and len(genes) < n:
        rng = np.random.default_rng((seed, 7, len(genes)))
        more = choose_on_front(Accuracy(space, seed=seed).fit(genes, values), genes, min(batch, n - len(genes)), rng)
        if not len(more):
            break
        genes, values = np.concatenate([genes, more]), np.concatenate([values, measure(more)])
    return genes, values


def _ends(space: Space) -> Genes:
    return np.concatenate([space.smallest(), space.largest()])


def _first(genes: Genes, n: int) -> Genes:
    """The first n different ones, in their order."""
    return genes[np.sort(np.unique(genes, axis=0, return_index=True)[1])[:n]]


def _among(genes: Genes, others: Genes) -> NDArray[np.bool_]:
    """Which architectures occur among others, (N,)."""
    seen = {row.tobytes() for row in np.ascontiguousarray(others)}
    return np.array([row.tobytes() in seen for row in np.ascontiguousarray(genes)], dtype=bool)


def choose_spread(genes: Genes, accuracy: NDArray[np.float64], n: int) -> Genes:
    """n of the measured architectures, evenly spread over the ranks of their accuracies: (n, G)."""
    ranks = np.linspace(0, len(genes) - 1, min(n, len(genes))).round().astype(int)
    return genes[np.argsort(accuracy, kind="stable")[np.unique(ranks)]]
