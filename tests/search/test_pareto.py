"""Ranks, crowding, fronts and hypervolume against the definitions, written out."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from search.pareto import crowding, front, hypervolume, ranks

Floats = NDArray[np.float64]


def better(a: int, b: int, cost: Floats, violation: Floats) -> bool:
    """Deb's rules: network a before network b."""
    if violation[a] > 0 or violation[b] > 0:
        return bool(violation[a] < violation[b])
    return bool((cost[a] <= cost[b]).all() and (cost[a] < cost[b]).any())


def peeled(cost: Floats, violation: Floats) -> list[int]:
    """Ranks by taking off one front after another."""
    rank, left, level = [-1] * len(cost), set(range(len(cost))), 0
    while left:
        first = {b for b in left if not any(better(a, b, cost, violation) for a in left)}
        for i in first:
            rank[i] = level
        left, level = left - first, level + 1
    return rank


def cells(cost: Floats, reference: Floats) -> int:
    """Unit cells between whole-numbered costs and the reference that some cost dominates."""
    corners = np.stack(np.meshgrid(*(np.arange(r) for r in reference), indexing="ij"), axis=-1)
    return int((cost[:, None] <= corners.reshape(1, -1, len(reference))).all(axis=2).any(axis=0).sum())


def crowding_by_loop(cost: Floats, members: list[int]) -> dict[int, float]:
    """Deb et al. 2002, sec. III-B, for one front."""
    distance = dict.fromkeys(members, 0.0)
    for column in cost.T:
        order = sorted(members, key=lambda i: column[i])
        extent = column[order[-1]] - column[order[0]]
        for i in (order[0], order[-1]):
            distance[i] = np.inf
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            distance[i] += (column[after] - column[before]) / extent
    return distance


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("feasible", [0.0, 0.5, 1.0])
def test_ranks_and_front_follow_the_definition(objectives: int, feasible: float) -> None:
    rng = np.random.default_rng(objectives)
    cost = rng.integers(0, 6, (40, objectives)).astype(float)
    violation = np.where(rng.random(40) < feasible, 0, rng.integers(1, 9, 40)).astype(float)
    rank = ranks(cost, violation)
    assert rank.tolist() == peeled(cost, violation)
    best = {tuple(c) for c, r, v in zip(cost, rank, violation, strict=True) if r == 0 and v <= 0}
    chosen = front(cost, violation)
    assert chosen.sum() == len(best)  # of equal costs one stands for all
    assert {tuple(c) for c in cost[chosen]} == best


def test_a_better_cost_does_not_make_up_for_a_violation() -> None:
    assert ranks(np.array([[0.0], [9.0]]), np.array([0.1, 0.0])).tolist() == [1, 0]


@pytest.mark.parametrize("objectives", [2, 3])
def test_crowding_follows_the_definition_in_every_front(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    cost = rng.random((60, objectives))
    rank = ranks(cost, np.zeros(60))
    assert rank.max() > 1
    distance = crowding(cost, rank)
    for level in range(rank.max() + 1):
        members = np.flatnonzero(rank == level).tolist()
        expected = crowding_by_loop(cost, members)
        assert distance[members] == pytest.approx([expected[i] for i in members])
    moved = cost.copy()
    moved[:, 0] = rng.permutation(moved[:, 0])
    assert not np.allclose(crowding(moved, rank), distance)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_or_equal_networks_have_no_neighbours_and_raise_nothing(count: int) -> None:
    assert np.isinf(crowding(np.ones((count, 2)), np.zeros(count, dtype=int))).all()
    assert crowding(np.ones((3, 2)), np.zeros(3, dtype=int))[1] == 0


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_hypervolume_counts_the_cells_that_are_dominated(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    reference = np.full(objectives, 8.0)
    cost = rng.integers(0, 10, (12, objectives)).astype(float)  # some lie beyond the reference
    assert hypervolume(cost, reference) == cells(cost, reference) > 0
    assert hypervolume(cost + 1, reference) < cells(cost, reference)
    assert hypervolume(cost[:0], reference) == 0
