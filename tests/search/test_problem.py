"""The problem that agents solve, and whether it can be solved at all."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes, load_space
from predictors import Macs
from search.agents import RandomSearch
from search.evolution import Evolution
from search.feasible import InfeasibleError, feasible_network
from search.limits import reach
from search.loop import run_search
from search.pareto import best_first
from search.problem import Problem
from tests.search.toy import SMALL, SPACE, all_networks, model_based, problem, separable

GENES = SPACE.sample(20, np.random.default_rng(0))


class Counted:
    """A predictor that counts the networks it was asked for."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, genes: Genes) -> NDArray[np.int64]:
        self.calls.append(len(genes))
        return genes.sum(axis=1, dtype=np.int64)


def test_costs_are_minimised_and_violations_are_relative_excess() -> None:
    values = problem().evaluate(GENES).values
    result = problem(macs=5, gain=8).evaluate(GENES)
    assert np.array_equal(result.cost, np.stack([-values["gain"], values["macs"]], axis=1))
    above, below = np.maximum(values["macs"] / 5 - 1, 0), np.maximum(1 - values["gain"] / 8, 0)
    assert (above > 0).any()
    assert (below > 0).any()  # a limit on what is maximised is the least it may be
    assert result.violation == pytest.approx(above + below)
    assert (problem().evaluate(GENES).violation == 0).all()


def test_a_limit_on_accuracy_is_the_least_whether_it_is_sought_or_not() -> None:
    predictors = {"accuracy": lambda genes: np.array([0.2, 0.95]), "macs": lambda genes: np.array([1.0, 2.0])}
    for objectives in ({"macs": 1}, {"macs": 1, "accuracy": -1}):
        found = Problem(predictors, objectives, {"accuracy": 0.9})
        assert found.limit("accuracy") == "accuracy >= 0.9"
        np.testing.assert_allclose(found.evaluate(GENES[:2]).violation, [1 - 0.2 / 0.9, 0])


def test_a_limit_that_percent_would_void_is_refused() -> None:
    percent = {"accuracy": lambda genes: np.full(len(genes), 93.1)}
    assert not Problem(percent, {"accuracy": -1}).evaluate(GENES).violation.any()
    above = {"accuracy": lambda genes: np.full(len(genes), 1.02)}  # what a fit on shares near 1 may expect
    assert not Problem(above, {"accuracy": -1}, {"accuracy": "92%"}).evaluate(GENES).violation.any()
    with pytest.raises(
        UserError, match=r"accuracy gives percent, as 93.1, and its limit 0.92 is a share; give .* / 100"
    ):
        Problem(percent, {"accuracy": -1}, {"accuracy": "92%"}).evaluate(GENES)


def test_a_repeated_network_is_free() -> None:
    counted = Counted()
    p = Problem({"macs": counted}, {"macs": 1})
    first = p.evaluate(np.concatenate([GENES, GENES[:5]]))
    again = p.evaluate(GENES[::-1])
    p.evaluate(SPACE.sample(3, np.random.default_rng(9)))
    assert counted.calls == [20, 3]
    assert np.array_equal(first.values["macs"][:20], again.values["macs"][::-1])
    assert np.array_equal(first.values["macs"], np.concatenate([GENES, GENES[:5]]).sum(axis=1))


@pytest.mark.parametrize("mistake", [{"objectives": {"gian": -1}}, {"limits": {"mac": 5}}])
def test_a_misspelt_name_is_an_error_that_lists_the_known_ones(mistake: dict[str, Any]) -> None:
    settings = {"objectives": {"gain": -1}} | mistake
    with pytest.raises(UserError, match=r"'(gian|mac)' is not known; choose from gain, macs"):
        Problem(problem().predictors, **settings)


def test_a_direction_is_1_or_minus_1_and_an_objective_is_needed() -> None:
    with pytest.raises(UserError, match="1 minimises, -1 maximises"):
        Problem(problem().predictors, {"gain": 2})
    with pytest.raises(UserError, match="needs an objective; choose from gain, macs"):
        Problem(problem().predictors, {})


@pytest.mark.parametrize("wrong", [np.full(20, np.nan), np.zeros(19), np.zeros((20, 1))])
def test_a_predictor_that_gives_no_number_for_each_network_is_named(wrong: NDArray[np.float64]) -> None:
    with pytest.raises(UserError, match="predictor gain must give one finite number for each of 20 networks"):
        Problem({"gain": lambda genes: wrong}, {"gain": -1}).evaluate(GENES)
    with pytest.raises(UserError, match=r"genes have shape \(.*,\); give \(N, G\)"):
        problem().evaluate(GENES[0])


def test_the_reference_point_is_the_worst_of_many_networks_or_a_stricter_limit() -> None:
    worst_gain, limit = problem(macs=5).reference(SPACE)
    assert limit == 5
    assert problem(macs=50).reference(SPACE)[1] == problem().reference(SPACE)[1]
    assert worst_gain == pytest.approx(-problem().predictors["gain"](SPACE.smallest())[0])
    assert problem().reference(SPACE)[1] == pytest.approx(problem().predictors["macs"](SPACE.largest())[0])


@pytest.mark.parametrize("measured", [False, True])
def test_a_limit_that_one_value_reaches_leaves_a_hypervolume(measured: bool) -> None:
    gain = separable(SMALL, 1)
    p = Problem({"gain": gain, "size": lambda genes: 3.0 + genes[:, 2]}, {"gain": -1, "size": 1}, {"size": 3})
    agent = model_based(SMALL, n_objectives=2, p=p) if measured else RandomSearch(SMALL, n_objectives=2)
    found = run_search(agent, p, 30, 10)
    feasible = found.genes[found.evaluations["violation"] <= 0]
    above = gain(feasible).max() + found.reference[0]
    assert found.hypervolume() == pytest.approx(above * 1) and above > 0


# -- whether any network fits -----------------------------------------------------------------------------------------


def lowest(name: str) -> float:
    """The least value in the small space, by enumeration."""
    return float(problem(SMALL).predictors[name](all_networks(SMALL)).min())


@pytest.mark.parametrize("share", [1.000001, 1.1, 2])
def test_a_network_is_found_however_few_fit(share: float) -> None:
    p = problem(SMALL, macs=lowest("macs") * share)
    genes = feasible_network(SMALL, p)
    assert genes.shape == (1, len(SMALL.genes))
    assert p.evaluate(genes).violation[0] == 0


def test_without_limits_there_is_nothing_to_find() -> None:
    assert len(feasible_network(SMALL, problem(SMALL))) == 0


def test_a_budget_out_of_reach_names_the_binding_limit_and_the_nearest_network() -> None:
    least = lowest("macs")
    with pytest.raises(InfeasibleError) as error:
        feasible_network(SMALL, problem(SMALL, macs=least * 0.999, gain=0.1))
    assert error.value.binding == ("macs",)
    assert SMALL.encode([error.value.nearest]).tolist() == SMALL.smallest().tolist()
    text = str(error.value)
    best = f"meets macs <= {least * 0.999:.4g} (at best {reach(least, 1)});"
    for part in (best, "relax macs or", "the nearest, Arch("):
        assert part in text
    assert "\n" not in text


def test_limits_that_only_clash_with_each_other_say_so() -> None:
    p = problem(SMALL)
    everything = p.evaluate(all_networks(SMALL))
    top = everything.values["gain"].max()
    limits = {"gain": float(top), "macs": float(np.quantile(everything.values["macs"], 0.3))}
    clash = problem(SMALL, **limits)
    with pytest.raises(InfeasibleError, match="together with the other limits") as error:
        feasible_network(SMALL, clash)
    nearest = clash.evaluate(SMALL.encode([error.value.nearest])).violation[0]
    assert nearest == pytest.approx(clash.evaluate(all_networks(SMALL)).violation.min())
    assert set(error.value.binding) <= set(limits)


def test_networks_that_only_a_long_search_finds_are_not_told_to_be_none() -> None:
    space, rng = load_space("mcunet"), np.random.default_rng(1)
    pairs = rng.normal(size=(len(space.genes) - 1, 8, 8))

    def gain(genes: Genes) -> NDArray[np.float64]:
        return 100 + sum((pair[genes[:, i], genes[:, i + 1]] for i, pair in enumerate(pairs)), np.zeros(len(genes)))

    predictors = {"gain": gain, "macs": Macs(space)}
    front = run_search(
        Evolution(space, n_objectives=2), Problem(predictors, {"gain": -1, "macs": 1}), 8000, 100
    ).front.sort_values("macs")
    found = 0
    for share in range(1, 10):
        limits = {name: float(front[name].iloc[share * len(front) // 10]) for name in predictors}
        with suppress(InfeasibleError):
            found += len(feasible_network(space, Problem(predictors, {"gain": -1}, limits)))
    assert found >= 8  # of these a search of 20 generations finds 6


def test_a_known_network_within_the_limits_is_one() -> None:
    clash = problem(SMALL, gain=1e9)
    assert len(feasible_network(SMALL, problem(SMALL, macs=lowest("macs")), SMALL.smallest())) == 1
    with pytest.raises(InfeasibleError, match=r"no network of space .* meets gain >= 1,000,000,000"):
        feasible_network(SMALL, clash, SMALL.smallest())


@pytest.mark.parametrize(
    ("sign", "value", "text"), [(1, 0.15222, "0.1523"), (-1, 0.15228, "0.1522"), (1, 2000.2, "2,001")]
)
def test_the_best_value_told_can_be_given_as_the_limit(sign: int, value: float, text: str) -> None:
    assert reach(value, sign) == text
    assert reach(float(text.replace(",", "")), sign) == text


def test_the_answer_takes_less_than_a_second_in_a_space_of_10_to_the_20() -> None:
    space = load_space("ofa_mbv3_w1.0")
    p = Problem({"gain": separable(space, 1), "macs": separable(space, 2)}, {"gain": -1}, {"macs": 1e-3, "gain": 1e3})
    started = time.process_time()
    with pytest.raises(InfeasibleError) as error:
        feasible_network(space, p)
    assert time.process_time() - started < 1
    assert error.value.binding == ("macs", "gain")


def test_a_frugal_problem_asks_nothing_of_networks_beyond_a_limit() -> None:
    counted = Counted()
    macs = problem().predictors["macs"]
    limit = float(np.median(macs(GENES)))
    p = Problem({"sum": counted, "macs": macs}, {"sum": -1}, {"macs": limit}, frugal=True)
    found = p.evaluate(GENES)
    allowed = macs(GENES) <= limit
    assert counted.calls == [int(allowed.sum())]
    assert np.array_equal(found.values["sum"][allowed], GENES.sum(axis=1)[allowed])
    assert (found.cost[~allowed] == np.inf).all()
    assert np.array_equal(found.violation > 0, ~allowed)
    everything = Problem({"sum": Counted(), "macs": macs}, {"sum": -1}, {"macs": limit}).evaluate(GENES)
    assert (
        best_first(everything.cost, everything.violation).tolist() == best_first(found.cost, found.violation).tolist()
    )


@pytest.mark.parametrize("strange", [GENES + 0.9, GENES.astype(int) + 256])
def test_genes_that_are_no_choices_are_refused_whatever_is_in_the_memo(strange: NDArray[Any]) -> None:
    solved = problem()
    known = solved.evaluate(GENES)
    with pytest.raises(UserError, match="whole numbers, 0 to 127"):
        solved.evaluate(strange)
    same = solved.evaluate(GENES.astype(int).tolist())  # type: ignore[arg-type]
    assert np.array_equal(same.cost, known.cost)


def test_a_limit_on_a_cost_is_the_most_also_where_the_cost_is_sought() -> None:
    space = load_space("digits_mbv3")
    genes, macs = space.sample(200, np.random.default_rng(0)), Macs(space)
    limit = float(np.median(macs(genes)))
    sought = Problem({"macs": macs}, {"macs": -1}, {"macs": limit})
    found = sought.evaluate(genes)
    assert np.array_equal(found.violation > 0, macs(genes) > limit)
    assert sought.limit("macs").startswith("macs <= ")
    result = run_search(RandomSearch(space), sought, 100, 50)
    assert 0 < result.evaluations["macs"][result.chosen] <= limit
    assert result.hypervolume() > 0


@pytest.mark.parametrize(
    ("objectives", "limits", "words"),
    [
        (["macs"], {}, "objectives are .*; give them by name"),
        ({"macs": 1}, ["macs"], "limits are .*; give them by name"),
        ({"gain": 1, "gain ": -1}, {}, "'gain ' is not known"),
    ],
)
def test_what_names_nothing_is_refused(objectives: Any, limits: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Problem({"macs": lambda genes: genes[:, 0], "gain": lambda genes: genes[:, 0]}, objectives, limits)


def test_an_objective_is_named_once() -> None:
    with pytest.raises(UserError, match="name each once"):
        Problem({"peak_memory_bytes": lambda genes: genes[:, 0]}, {"peak_memory": 1, "peak_memory_bytes": -1})
