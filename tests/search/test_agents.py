"""The contract of every search agent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from optuna.samplers import TPESampler

from ofa.errors import UserError
from ofa.space import Genes, Space, load_space
from search.agents import Agent, Ancestry, RandomSearch, keys
from search.aging import AgingEvolution
from search.evolution import Evolution
from search.genetic import Genetic
from search.loop import run_search
from search.optuna_agent import SAMPLERS, OptunaAgent
from search.problem import Problem
from search.result import SearchResult
from search.variation import cross, draw, draw_all, mutate, mutate_one, places_of, redraw
from tests.search.toy import AGENTS, SMALL, SPACE, all_networks, model_based, problem

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
    return run_search(made(name, SPACE, p), p, evaluations, 10)


def made(name: str, space: Space, p: Problem) -> Any:
    """An agent for a problem; only one that computes its limits is given the problem itself."""
    if name == "model_based":
        return model_based(space, p=p)
    return AGENTS[name](space, seed=0, n_objectives=len(p.objectives))


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
        assert len(set(keys(genes))) == TINY.size

    def test_learns_of_networks_that_it_did_not_propose(self, name: str) -> None:
        agent = AGENTS[name](TINY, seed=0, n_objectives=2)
        known = all_networks(TINY)[::2]
        evaluation = problem(TINY).evaluate(known)
        agent.tell(known, evaluation.cost, evaluation.violation)
        assert not set(keys(agent.ask(10))) & set(keys(known))

    def test_a_batch_of_none_is_no_mistake(self, name: str) -> None:
        agent = AGENTS[name](SPACE, seed=0, n_objectives=2)
        genes = agent.ask(0)
        assert genes.shape == (0, len(SPACE.genes))
        agent.tell(genes, np.empty((0, 2)), np.empty(0))
        assert len(asked(agent, 2)) == 20

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
    rng = np.random.default_rng(0)
    genes = SMALL.sample(50, rng)
    changed = mutate(SMALL, genes, 1.0, rng) != genes
    assert np.array_equal(changed, np.broadcast_to(SMALL.counts > 1, genes.shape))
    assert not (mutate(SMALL, genes, 0.0, rng) != genes).any()


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "random"])
def test_every_optuna_sampler_works_with_two_objectives(sampler: str) -> None:
    genes = asked(OptunaAgent(SPACE, seed=0, n_objectives=2, sampler=sampler), p=problem(macs=5))
    assert len(set(keys(genes))) == 60


@pytest.mark.parametrize("multivariate", [True, False])
def test_tpe_that_remembers_proposes_what_plain_tpe_does(multivariate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def proposals(seed: int) -> Genes:
        agent = OptunaAgent(SMALL, seed=seed, n_objectives=2, options={"multivariate": multivariate})
        return asked(agent, rounds=3, p=problem(SMALL, macs=6))

    remembered, other = proposals(0), proposals(1)
    monkeypatch.setitem(SAMPLERS, "tpe", (TPESampler, SAMPLERS["tpe"][1]))
    assert np.array_equal(remembered, proposals(0))
    assert not np.array_equal(remembered, other)


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
    with pytest.raises(UserError, match=r"population 4 with parents 0\.25 leaves 1"):
        Genetic(SPACE, population=4)
    with pytest.raises(UserError, match="sample 30 of population 20"):
        AgingEvolution(SPACE, population=20, sample=30)


def test_mutations_reach_every_other_choice_evenly_and_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    genes = np.zeros((20_000, len(SPACE.genes)), dtype=np.int8)
    changed = mutate(SPACE, genes, 0.1, rng)
    assert (changed != 0)[:, SPACE.counts > 1].mean() == pytest.approx(0.1, abs=0.002)
    for column in np.flatnonzero(SPACE.counts > 2):
        share = np.bincount(changed[:, column], minlength=SPACE.counts[column])[1:] / 20_000
        assert share == pytest.approx(0.1 / (SPACE.counts[column] - 1), abs=0.01)


def test_a_block_is_drawn_anew_as_a_whole_and_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    space = load_space("ofa_mbv3_w1.0")  # kernel and expand ratio for each of 20 blocks, 3 choices of each
    places, genes = places_of(space), np.zeros((20_000, len(space.genes)), dtype=np.int8)
    changed = redraw(space, genes, 0.1, rng, places) > 0
    kernel, expand = (changed[:, space.columns(name)] for name in ("kernel", "expand"))
    assert changed[:, space.counts == 3].mean() == pytest.approx(0.1 * 2 / 3, abs=0.002)
    assert (kernel & expand).mean() == pytest.approx(0.1 * 4 / 9, abs=0.002)  # apart it were 0.0044
    assert (kernel[:, 0] & expand[:, 1]).mean() == pytest.approx((0.1 * 2 / 3) ** 2, abs=0.002)
    assert len(set(places)) == len(space.genes) - 20


def test_one_gene_that_matters_is_changed_in_each_network() -> None:
    rng = np.random.default_rng(0)
    genes = draw(SPACE, 500, rng)
    changed = SPACE.canonical(mutate_one(SPACE, genes, rng))
    assert not (changed == genes).all(axis=1).any()
    stages = slice(2, 2 + len(SPACE.stages))  # another depth brings or takes the genes of its blocks
    same_depth = (changed[:, stages] == genes[:, stages]).all(axis=1)
    assert ((changed != genes).sum(axis=1)[same_depth] == 1).all()


def test_a_child_has_each_gene_from_one_of_its_parents() -> None:
    rng = np.random.default_rng(0)
    mothers, fathers = draw(SPACE, 2000, rng), draw(SPACE, 2000, rng)
    child = cross(mothers, fathers, rng)
    assert ((child == mothers) | (child == fathers)).all()
    differ = mothers != fathers
    assert (child == fathers)[differ].mean() == pytest.approx(0.5, abs=0.02)


def test_aging_forgets_the_best_network_and_genetic_does_not() -> None:
    best = SPACE.largest()
    others = draw(SPACE, 40, np.random.default_rng(0))
    for agent, keeps in (
        (AgingEvolution(SPACE, population=40, sample=40), False),
        (Genetic(SPACE, population=40), True),
    ):
        agent.tell(best, np.array([[-99.0]]), np.zeros(1))
        agent.tell(others, np.zeros((40, 1)), np.zeros(40))
        assert (keys(best)[0] in keys(agent._genes)) == keeps


def test_children_may_repeat_networks_only_where_that_is_asked_for() -> None:
    for repeats in (False, True):
        genes = asked(Genetic(TINY, seed=0, population=8, parents=0.25, repeats=repeats), 3, 10, problem_of_gain(TINY))
        assert (len(set(keys(genes))) < len(genes)) == repeats


def test_a_network_is_a_parent_twice_only_where_that_is_asked_for() -> None:
    genes = np.repeat(SPACE.largest(), 10, axis=0)
    for repeats in (False, True):
        agent = Genetic(SPACE, population=20, repeats=repeats)
        agent.tell(genes, np.zeros((10, 1)), np.zeros(10))
        assert len(agent._genes) == (5 if repeats else 1)


def problem_of_gain(space: Space) -> Problem:
    return Problem(problem(space).predictors, {"gain": -1})


def test_random_search_covers_every_gene_evenly() -> None:
    genes = RandomSearch(SPACE, seed=0).ask(3000)
    for column in (0, 1, 2):
        share = np.bincount(genes[:, column]) / 3000
        assert np.allclose(share, 1 / SPACE.counts[column], atol=0.05)


def test_a_block_that_comes_back_has_the_genes_of_its_ancestors() -> None:
    full = draw_all(SPACE, 200, np.random.default_rng(0))
    ancestry = Ancestry(SPACE)
    genes = ancestry.express(full)
    assert np.array_equal(genes, SPACE.canonical(full))
    assert (genes != full).any()
    assert np.array_equal(SPACE.canonical(ancestry.recall(genes)), genes)
    last = dict(zip(keys(genes), full, strict=True))  # of equal networks the latest counts
    assert np.array_equal(ancestry.recall(genes), np.stack([last[key] for key in keys(genes)]))
    assert np.array_equal(Ancestry(SPACE).recall(genes), genes)


@pytest.mark.parametrize("kind", [Evolution, Genetic, AgingEvolution])
def test_exact_limits_repair_networks_before_they_are_proposed(kind: Any) -> None:
    values = problem().predictors["macs"](SPACE.sample(2000, np.random.default_rng(0)))
    p = Problem(problem().predictors, {"gain": -1}, {"macs": float(np.quantile(values, 0.2))})
    options = {"population": 40} | ({"sample": 10} if kind is AgingEvolution else {})
    shares = []
    for violation in (p.exceeds, None):
        agents = [kind(SPACE, seed=seed, violation=violation, **options) for seed in range(8)]
        runs = np.stack([asked(agent, 4, 40, p) for agent in agents])
        genes = runs.reshape(-1, runs.shape[-1])
        kept = (p.exceeds(genes) <= 0).reshape(8, -1)
        shares.append((kept[:, :40].mean(), kept[:, 40:].mean()))  # of the first population, random; of children
        SPACE.validate(genes)
        assert np.array_equal(genes, SPACE.canonical(genes))
    (first, children), (random, unrepaired) = shares
    assert 0.1 < random < 0.3  # 0.2, by the limit
    assert first > 0.8 and children > 0.9
    assert children > unrepaired + 0.1
    assert "violation" not in repr(agents[0])
