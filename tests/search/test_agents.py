"""The contract of every search agent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ofa.errors import UserError
from ofa.space import Genes
from search.agents import Agent, RandomSearch, keys
from search.evolution import Evolution
from search.loop import run_search
from search.optuna_agent import OptunaAgent
from search.problem import Problem
from search.result import SearchResult
from tests.search.toy import AGENTS, SMALL, SPACE, all_networks, problem

INFORMED = [name for name in AGENTS if name != "random"]
TINY = SPACE.restrict(resolution=1, width=1, depth=[1], expand=[2, 3])  # 64 networks


def asked(agent: Any, rounds: int = 6, n: int = 10, p: Problem | None = None) -> Genes:
    """What an agent proposes over some rounds, told the truth after each."""
    p = p or problem()
    proposals = []
    for _ in range(rounds):
        genes = agent.ask(n)
        evaluation = p.evaluate(genes)
        agent.tell(genes, evaluation.cost, evaluation.violation)
        proposals.append(genes)
    return np.concatenate(proposals)


def search(name: str, p: Problem, evaluations: int = 150) -> SearchResult:
    return run_search(AGENTS[name](SPACE, seed=0, n_objectives=len(p.objectives)), p, evaluations, 10)


@pytest.mark.parametrize("name", AGENTS)
class TestAgent:
    def test_proposals_are_canonical_genes_of_the_space(self, name: str) -> None:
        agent = AGENTS[name](SPACE, seed=0, n_objectives=2)
        for n in (1, 7):
            genes = agent.ask(n)
            assert genes.shape == (n, len(SPACE.genes))
            assert genes.dtype == np.int8
        genes = asked(agent)
        SPACE.validate(genes)
        assert np.array_equal(genes, SPACE.canonical(genes))

    def test_same_seed_gives_the_same_proposals_and_another_seed_others(self, name: str) -> None:
        first, again, other = (asked(AGENTS[name](SPACE, seed=seed, n_objectives=2)) for seed in (0, 0, 1))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_no_network_is_proposed_twice_while_others_are_left(self, name: str) -> None:
        genes = asked(AGENTS[name](TINY, seed=0, n_objectives=2), rounds=3, p=problem(TINY))
        assert len(set(keys(genes))) == len(genes)

    def test_a_space_that_is_used_up_gives_known_networks_again(self, name: str) -> None:
        genes = asked(AGENTS[name](TINY, seed=0, n_objectives=2), rounds=8, p=problem(TINY))
        assert len(genes) == 80
        assert len(set(keys(genes))) > 0.9 * TINY.size

    def test_learns_of_networks_that_it_did_not_propose(self, name: str) -> None:
        agent = AGENTS[name](TINY, seed=0, n_objectives=2)
        known = all_networks(TINY)[::2]
        evaluation = problem(TINY).evaluate(known)
        agent.tell(known, evaluation.cost, evaluation.violation)
        assert not set(keys(agent.ask(10))) & set(keys(known))

    def test_a_setting_shows_in_its_repr(self, name: str) -> None:
        agent = AGENTS[name](SPACE, seed=5, n_objectives=2)
        assert "seed=5, n_objectives=2" in repr(agent)


@pytest.mark.parametrize("name", INFORMED)
class TestInformedAgent:
    def test_finds_better_networks_than_random_search(self, name: str) -> None:
        p = Problem(problem().predictors, objectives={"gain": -1})
        best = {agent: search(agent, p).cost.min() for agent in (name, "random")}
        assert best[name] < best["random"] - 0.5  # of a range of about 10

    def test_turns_to_networks_within_the_limits(self, name: str) -> None:
        values = problem().predictors["macs"](SPACE.sample(2000, np.random.default_rng(0)))
        p = Problem(problem().predictors, {"gain": -1}, {"macs": float(np.quantile(values, 0.05))})
        violation = search(name, p).evaluations["violation"].to_numpy()
        assert np.mean(violation[75:] <= 0) > 0.15  # of random networks 0.05 are

    def test_not_told_of_limits_it_ignores_them(self, name: str) -> None:
        values = problem().predictors["macs"](SPACE.sample(2000, np.random.default_rng(0)))
        limit = np.quantile(values, 0.05)
        genes = asked(AGENTS[name](SPACE, seed=0), 15, p=Problem(problem().predictors, {"gain": -1}))
        assert np.mean(problem().predictors["macs"](genes[75:]) <= limit) < 0.05

    def test_two_objectives_are_both_pursued(self, name: str) -> None:
        p = problem(SMALL)
        everything = p.evaluate(all_networks(SMALL))
        reference = tuple(everything.cost.max(axis=0))
        volume = {}
        for agent in (name, "random"):
            result = run_search(AGENTS[agent](SMALL, seed=0, n_objectives=2), p, 150, 10, reference=reference)
            volume[agent] = result.hypervolume()
        assert volume[name] > volume["random"]


def test_evolution_finds_the_optimum_of_an_enumerated_space() -> None:
    p = Problem(problem(SMALL).predictors, {"gain": -1}, {"macs": 6})
    everything = p.evaluate(all_networks(SMALL))
    optimum = everything.cost[everything.violation <= 0].min()
    assert (everything.violation > 0).any()

    def found(agent: Agent) -> bool:
        result = run_search(agent, p, 600, 20)
        return bool(result.cost[result.chosen, 0] == optimum)

    assert all(found(Evolution(SMALL, seed=seed, population=20)) for seed in range(5))
    assert not all(found(RandomSearch(SMALL, seed=seed)) for seed in range(5))


def test_a_mutation_always_changes_a_gene_that_has_a_choice() -> None:
    agent = Evolution(SMALL, seed=0, mutation=1.0)
    genes = SMALL.sample(50, np.random.default_rng(0))
    changed = agent._mutate(genes) != genes
    assert np.array_equal(changed, np.broadcast_to(SMALL.counts > 1, genes.shape))
    assert not (Evolution(SMALL, seed=0, mutation=0.0)._mutate(genes) != genes).any()


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "random"])
def test_every_optuna_sampler_works_with_two_objectives(sampler: str) -> None:
    genes = asked(OptunaAgent(SPACE, seed=0, n_objectives=2, sampler=sampler), p=problem(macs=5))
    assert len(set(keys(genes))) == 60


@pytest.mark.slow
def test_the_gaussian_process_of_optuna_works() -> None:
    agent = OptunaAgent(TINY, seed=0, sampler="gp", options={"n_startup_trials": 3})
    assert len(asked(agent, rounds=5, n=1, p=Problem(problem(TINY).predictors, {"gain": -1}, {"macs": 5}))) == 5


def test_mistaken_settings_are_answered_with_the_rule() -> None:
    with pytest.raises(UserError, match="'tpp' is not known; choose from tpe, nsga2"):
        OptunaAgent(SPACE, sampler="tpp")
    with pytest.raises(UserError, match="population 1 cannot breed"):
        Evolution(SPACE, population=1)
    with pytest.raises(UserError, match=r"mutation 1\.5 is a chance"):
        Evolution(SPACE, mutation=1.5)


def test_random_search_covers_every_gene_evenly() -> None:
    genes = RandomSearch(SPACE, seed=0).ask(3000)
    for column in (0, 1, 2):
        share = np.bincount(genes[:, column]) / 3000
        assert np.allclose(share, 1 / SPACE.counts[column], atol=0.05)
