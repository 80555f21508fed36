"""Pareto sets of networks under limits: ranks, crowding, front, hypervolume.  N networks, M costs, lower is better.

Limits follow Deb's rules (Deb et al. 2002, sec. VI): a network that meets all limits comes before one that does not; of
two that do not, the one with the smaller violation comes first.
"""

from __future__ import annotations

import moocore
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def ranks(cost: Floats, violation: Floats) -> NDArray[np.int64]:
    """Front number of each network, 0 for the best: feasible ones by domination, then the others by violation (N,)."""
    feasible = violation <= 0
    rank = np.zeros(len(cost), dtype=np.int64)
    if feasible.any():
        rank[feasible] = moocore.pareto_rank(cost[feasible])
        rank[~feasible] = rank[feasible].max() + 1
    rank[~feasible] += np.unique(violation[~feasible], return_inverse=True)[1]
    return rank


def crowding(cost: Floats, rank: NDArray[np.int64]) -> Floats:
    """Crowding distance within each front (N,): gap between both neighbours, relative to the front's extent, summed.

    The ends of a front get infinity (Deb et al. 2002, sec. III-B).
    """
    distance = np.zeros(len(cost))
    for column in cost.T:
        order = np.lexsort((column, rank))
        value, front = column[order], rank[order]
        inner = (front[2:] == front[1:-1]) & (front[1:-1] == front[:-2])
        first = np.searchsorted(front, front[1:-1], side="left")
        last = np.searchsorted(front, front[1:-1], side="right") - 1
        extent = np.where(inner, value[last] - value[first], 1)
        gap = np.where(inner, value[2:] - value[:-2], np.inf) / np.where(extent > 0, extent, 1)
        distance[order] += np.concatenate([[np.inf], gap, [np.inf]])[: len(cost)]
    return distance


def best_first(cost: Floats, violation: Floats) -> NDArray[np.int64]:
    """Rows from the best to the worst (N,): by rank, within a front the least crowded first, then as they come."""
    cost = np.where(violation[:, None] <= 0, cost, 0)  # of infeasible networks the violation alone counts
    if cost.shape[1] == 1:
        return np.lexsort((cost[:, 0], violation))
    rank = ranks(cost, violation)
    return np.lexsort((-crowding(cost, rank), rank))


def front(cost: Floats, violation: Floats) -> NDArray[np.bool_]:
    """Which networks are feasible and dominated by no feasible one (N,); of equal costs the first stands for all."""
    chosen = violation <= 0
    if chosen.any():
        chosen[chosen] = moocore.is_nondominated(cost[chosen])
    return chosen


def hypervolume(cost: Floats, reference: Floats) -> float:
    """Volume that the costs (N, M) dominate, up to the reference point (M,); what lies beyond that adds nothing."""
    return float(moocore.hypervolume(cost, ref=reference)) if len(cost) else 0.0


def worst(cost: Floats) -> Floats:
    """The worst costs (M,) of networks (N, M), without the infinite ones of what a frugal problem did not measure."""
    return np.max(cost, axis=0, where=np.isfinite(cost), initial=-np.inf)


def with_room(reference: Floats, cost: Floats) -> Floats:
    """The reference point (M,), moved in an objective where no cost (N, M) is better: to the next worse one, else by 1.

    As it is, a limit that a single value reaches leaves every network a volume of 0.
    """
    worse = np.min(cost, axis=0, where=cost > reference, initial=np.inf)
    moved = np.where(np.isfinite(worse), worse, reference + 1)
    return np.where((cost < reference).any(axis=0), reference, moved)
