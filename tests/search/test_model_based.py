"""Search by a model: what it expects of a measurement, which networks it measures, and that it measures none twice."""

from __future__ import annotations

from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.files import read_jsonl
from ofa.space import Genes
from search.acquisition import NODES, WEIGHTS, Warp, added_volumes, expected_improvement, log_improvement
from search.agents import RandomSearch, keys
from search.loop import LOG, run_search
from search.measured import Measured
from search.model_based import ModelBased
from search.pareto import hypervolume
from search.problem import Problem
from search.result import load_result
from tests.search.toy import SMALL, SPACE, Line, all_networks, model_based, problem

Floats = NDArray[np.float64]


# -- what a measurement is expected to add ----------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-2.0, 0.5), (1.5, 2.0), (0.3, 0.0), (-0.3, 0.0)])
def test_expected_improvement_is_the_mean_of_many_draws(mean: float, std: float) -> None:
    draws = mean + std * np.random.default_rng(0).standard_normal(400_000)
    expected = np.maximum(0 - draws, 0).mean()
    found = expected_improvement(np.array([mean]), np.array([std]), 0.0)[0]
    assert found == pytest.approx(expected, abs=5e-3)
    assert np.exp(log_improvement(np.array([mean]), np.array([std]), 0.0)[0]) == pytest.approx(found, abs=1e-9)


def test_networks_of_no_hope_are_still_told_apart() -> None:
    mean, std = np.array([10.0, 50.0, 90.0, 90.0]), np.array([1.0, 1.0, 1.0, 2.0])
    score = log_improvement(mean, std, 0.0)
    assert score[0] > score[1] > score[2]
    assert score[3] > score[2]  # uncertainty is hope
    assert np.isfinite(score).all()


def test_the_logarithm_of_an_improvement_that_rounds_to_0_is_exact() -> None:
    """Against mpmath's log(phi(z) + z Phi(z)) at 50 digits."""
    exact = {-0.9: -2.2983, -4.999: -16.7389, -5.001: -16.7497, -6.0: -22.5789, -10.0: -55.5531}
    found = log_improvement(-np.array(list(exact)), np.ones(5), 0.0)
    np.testing.assert_allclose(found, list(exact.values()), atol=1e-4)
    z = -np.geomspace(0.5, 1e8, 5000)
    assert (np.diff(log_improvement(-z, np.ones(len(z)), 0.0)) < 0).all(), "no seam"


@pytest.mark.parametrize("objectives", [2, 3])
def test_added_volume_is_the_difference_of_two_hypervolumes(objectives: int) -> None:
    rng = np.random.default_rng(0)
    corner = np.ones(objectives)
    for known in (rng.random((8, objectives)) * 1.3, np.empty((0, objectives))):
        cost = rng.random((40, objectives)) * 1.3
        before = hypervolume(known, corner)
        after = [hypervolume(np.concatenate([known, row[None]]), corner) for row in cost]
        assert added_volumes(cost, known, corner) == pytest.approx(np.array(after) - before, abs=1e-12)
    assert (added_volumes(np.full((1, objectives), 2.0), known, corner) == 0).all()


def test_the_nodes_integrate_a_normal_distribution() -> None:
    assert (WEIGHTS * NODES**2).sum() == pytest.approx(1)
    assert (WEIGHTS * np.exp(NODES)).sum() == pytest.approx(np.exp(0.5), rel=1e-6)


def test_a_warp_keeps_the_order_spreads_the_best_and_comes_back() -> None:
    cost = np.array([-93.0, -92.9, -92.0, -80.0, -65.0])
    warp = Warp.of(cost)
    assert (np.diff(warp(cost)) > 0).all()
    assert warp.back(warp(cost)) == pytest.approx(cost)
    share = np.diff(warp(cost)) / np.ptp(warp(cost)) / (np.diff(cost) / np.ptp(cost))
    assert share[0] > 5 * share[-1]
    assert Warp.of(np.ones(3))(np.ones(3)) == pytest.approx(0)  # equal costs have no spread


def test_costs_of_networks_that_collapsed_count_as_somewhat_worse_than_all_others() -> None:
    living, dead = np.linspace(-93.0, -90.0, 10), np.array([-10.0, -10.5, -12.0])
    warp = Warp.of(np.concatenate([living, dead]))
    assert (np.diff(warp(living)) > 0).all() and warp.back(warp(living)) == pytest.approx(living)
    assert warp.back(warp(dead)) == pytest.approx(-93 + 1.5 * 3)
    assert warp.scale == pytest.approx(Warp.of(np.append(living, 3 * [-88.5])).scale)
    assert Warp.of(np.append(-93.0, dead)).most == np.inf, "too few to tell who is apart"
    assert Warp.of(living).most == np.inf


# -- which networks it measures ---------------------------------------------------------------------------------------


def gain(space: Any = SMALL) -> Problem:
    return Problem(problem(space).predictors, {"gain": -1})


def test_it_finds_the_optimum_in_a_tenth_of_the_measurements_of_random_search() -> None:
    everything = gain().evaluate(all_networks(SMALL)).cost
    for seed in range(3):
        result = run_search(model_based(SMALL, seed=seed), gain(), 40, 5)
        assert result.cost.min() == everything.min()
        assert run_search(RandomSearch(SMALL, seed=seed), gain(), 400, 5).cost.min() > everything.min()


def test_exact_limits_are_kept_by_every_proposal() -> None:
    values = problem(SMALL).predictors["macs"](all_networks(SMALL))
    p = Problem(problem(SMALL).predictors, {"gain": -1}, {"macs": float(np.quantile(values, 0.1))})
    result = run_search(model_based(SMALL, p=p), p, 40, 5)
    assert (result.evaluations["violation"] == 0).all()
    allowed = p.evaluate(all_networks(SMALL))
    assert result.cost.min() == allowed.cost[allowed.violation <= 0].min()


def test_a_limit_that_one_network_in_a_hundred_meets_costs_no_measurement() -> None:
    predictors = problem(SPACE).predictors
    some = predictors["macs"](SPACE.sample(20_000, np.random.default_rng(1)))
    p = Problem(predictors, {"gain": -1}, {"macs": float(np.quantile(some, 0.01))})
    result = run_search(model_based(SPACE, p=p), p, 40, 5)
    assert (result.evaluations["violation"] == 0).all()


@pytest.mark.parametrize("objectives", [["gain"], ["gain", "macs"]])
def test_once_all_networks_within_the_limits_are_measured_the_search_ends(objectives: list[str]) -> None:
    values = np.sort(problem(SMALL).predictors["macs"](all_networks(SMALL)))
    signs = {name: {"gain": -1, "macs": 1}[name] for name in objectives}
    p = Problem(problem(SMALL).predictors, signs, {"macs": float(values[32])})
    result = run_search(model_based(SMALL, n_objectives=len(signs), p=p), p, 60, 5)
    within = p.evaluate(all_networks(SMALL)).violation <= 0
    assert len(result.evaluations) == within.sum() < 60
    assert (result.evaluations["violation"] == 0).all()


def test_networks_of_which_a_frugal_problem_measures_nothing_teach_nothing() -> None:
    predictors = problem(SMALL).predictors
    limit = {"macs": float(np.quantile(predictors["macs"](all_networks(SMALL)), 0.3))}
    p = Problem(predictors, {"gain": -1, "macs": 1}, limit, frugal=True)
    initial = SMALL.sample(20, np.random.default_rng(0))
    result = run_search(model_based(SMALL, n_objectives=2, p=p), p, 50, 5, initial=initial)
    assert (result.evaluations["violation"][:20] > 0).any()
    assert (result.evaluations["violation"][20:] == 0).all()
    assert np.isfinite([*result.reference, result.hypervolume()]).all()
    everything = p.evaluate(all_networks(SMALL))
    whole = hypervolume(everything.cost[everything.violation <= 0], np.array(result.reference))
    assert result.hypervolume() > 0.95 * whole


def test_two_objectives_reach_nearly_the_whole_hypervolume() -> None:
    p = problem(SMALL)
    everything = p.evaluate(all_networks(SMALL)).cost
    corner = everything.max(axis=0)
    agent = model_based(SMALL, n_objectives=2, p=p)
    found = run_search(agent, p, 60, 5, reference=tuple(corner)).hypervolume()
    random = run_search(RandomSearch(SMALL, n_objectives=2), p, 60, 5, reference=tuple(corner)).hypervolume()
    assert found > 0.97 * hypervolume(everything, corner)
    assert found > random


def test_networks_exactly_at_a_limit_that_is_an_objective_are_searched() -> None:
    gain = problem(SMALL).predictors["gain"]
    predictors = {"gain": gain, "memory": lambda genes: np.full(len(genes), 64.0)}
    p = Problem(predictors, {"gain": -1, "memory": 1}, {"memory": 64})
    found = run_search(model_based(SMALL, n_objectives=2, p=p), p, 40, 5)
    assert -found.cost[:, 0].min() == gain(all_networks(SMALL)).max()


def test_of_two_measured_objectives_that_agree_the_whole_batch_is_promising() -> None:
    value = problem(SMALL).predictors["gain"]
    p = Problem({"gain": value, "double": lambda genes: 2 * value(genes)}, {"gain": -1, "double": -1})
    agent = ModelBased(SMALL, model=partial(Line, SMALL), problem=p, measured=("gain", "double"))
    found = -run_search(agent, p, 30, 10).cost[:, 0]
    assert found[20:].min() > np.median(value(all_networks(SMALL)))  # the front has one network


def test_a_space_too_large_to_enumerate_is_searched_by_evolution() -> None:
    assert np.prod(SPACE.counts.astype(float)) > 20_000
    top = gain(SPACE).evaluate(SPACE.largest()).cost[0, 0]
    result = run_search(model_based(SPACE), gain(SPACE), 60, 10)
    assert result.cost.min() == pytest.approx(top)  # larger choices raise the gain


def test_the_first_networks_differ_more_than_random_ones() -> None:
    first, random = (SPACE.onehot(a.ask(10)) for a in (model_based(SPACE), RandomSearch(SPACE)))

    def nearest(features: Floats) -> float:
        gaps = np.abs(features[:, None] - features).sum(axis=2) + 1e9 * np.eye(len(features))
        return float(gaps.min(axis=1).mean())

    assert nearest(first) > nearest(random)


def test_a_limit_on_a_measured_value_is_refused() -> None:
    p = Problem(problem().predictors, {"gain": -1}, {"gain": 3})
    with pytest.raises(UserError, match=r"limit gain is of a measured value"):
        model_based(SPACE, p=p)
    with pytest.raises(UserError, match=r"measured \['macs'\] must be objectives; choose from gain"):
        ModelBased(SPACE, model=partial(Line, SPACE), problem=gain(SPACE), measured=("macs",))


# -- measurements -----------------------------------------------------------------------------------------------------


class Meter:
    """Measures the gain of one network; counts; breaks down after some."""

    def __init__(self, breaks_after: int = 10**9) -> None:
        self.seen: list[bytes] = []
        self.left = breaks_after

    def __call__(self, genes: Genes) -> Floats:
        assert len(genes) == 1
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen += keys(genes)
        return np.asarray(problem(SMALL).predictors["gain"](genes))


def loop(folder: Path, meter: Meter, **options: Any) -> Any:
    measured = Measured(meter, folder / "measured.jsonl")
    p = Problem({"gain": measured, "macs": problem(SMALL).predictors["macs"]}, {"gain": -1, "macs": 1})
    agent = model_based(SMALL, n_objectives=2, p=p)
    return run_search(agent, p, 40, 5, folder=folder / "search", **options)


def test_an_interrupted_loop_measures_nothing_twice_and_ends_like_a_whole_one(tmp_path: Path) -> None:
    whole = loop(tmp_path / "whole", Meter())
    first, second = Meter(breaks_after=23), Meter()
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "cut", first)
    assert len(read_jsonl(tmp_path / "cut" / "search" / LOG)) == 4  # whole batches of 5
    again = loop(tmp_path / "cut", second)
    assert load_result(tmp_path / "cut" / "search").measured == again.measured == ("gain",)
    assert again.evaluations.equals(whole.evaluations)
    assert len(first.seen) == 23
    assert len(second.seen) == 17
    assert not set(first.seen) & set(second.seen)


def test_a_second_search_uses_the_measurements_of_the_first(tmp_path: Path) -> None:
    meter = Meter()
    measured = Measured(meter, tmp_path / "pool.jsonl")
    for bound in (7.0, 7.0):
        p = Problem({"gain": measured, "macs": problem(SMALL).predictors["macs"]}, {"gain": -1}, {"macs": bound})
        run_search(model_based(SMALL, p=p), p, 20, 5)
    assert len(meter.seen) == len(measured) == 20


def test_a_loop_stops_when_the_hypervolume_stalls(tmp_path: Path) -> None:
    def flat(genes: Genes) -> Floats:
        return np.ones(len(genes))

    p = Problem({"gain": flat}, {"gain": -1})
    assert len(run_search(RandomSearch(SMALL), p, 100, 5, stall=3).evaluations) == 20
    assert len(run_search(RandomSearch(SMALL), p, 100, 5).evaluations) == 100


@pytest.mark.parametrize("stall", [0, -1])
def test_a_stall_of_no_batches_is_refused(stall: int) -> None:
    with pytest.raises(UserError, match=rf"stall is {stall}; give batches without growth, 1 or more, or None"):
        run_search(RandomSearch(SMALL, n_objectives=2), problem(), 10, 5, stall=stall)


def test_gain_at_the_worst_cost_of_another_objective_is_no_stall() -> None:
    more = count()
    predictors = {"gain": lambda genes: np.full(len(genes), next(more)), "macs": lambda genes: np.ones(len(genes))}
    p = Problem(predictors, {"gain": -1, "macs": 1})
    assert len(run_search(RandomSearch(SMALL, n_objectives=2), p, 100, 5, stall=3).evaluations) == 100


def test_a_measurement_that_is_no_number_is_an_error_and_is_not_kept(tmp_path: Path) -> None:
    measured = Measured(lambda genes: np.array([np.nan]), tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="was measured as nan"):
        measured(SMALL.smallest())
    assert read_jsonl(tmp_path / "m.jsonl") == []
