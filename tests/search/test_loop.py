"""The search loop: its result, and that a kill at any moment loses nothing and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ofa.errors import UserError
from ofa.files import read_json, read_jsonl
from search.agents import RandomSearch
from search.evolution import Evolution
from search.feasible import InfeasibleError
from search.loop import LOG, run_search
from search.pareto import hypervolume
from search.problem import Problem
from search.result import EVALUATIONS, RESULT, best_result, load_result
from tests.search import slow_search
from tests.search.slow_search import search
from tests.search.toy import AGENTS, SMALL, SPACE, all_networks, problem

ROOT = Path(__file__).parents[2]


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same result, the time it took left aside."""
    cards = [{k: v for k, v in read_json(folder / RESULT).items() if k != "seconds"} for folder in (one, other)]
    return cards[0] == cards[1] and (one / EVALUATIONS).read_bytes() == (other / EVALUATIONS).read_bytes()


def kill_after(lines: int, name: str, folder: Path) -> None:
    """Start a search and kill it once its log has some lines."""
    command = [sys.executable, "-m", "tests.search.slow_search", name, str(folder), "0.05"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            deadline = time.monotonic() + 300
            while len(read_jsonl(folder / LOG)) < lines and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
        finally:
            process.kill()


@pytest.mark.parametrize("name", AGENTS)
def test_a_killed_search_ends_like_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    search(name, tmp_path / "whole")
    kill_after(4, name, tmp_path / "killed")
    before = read_jsonl(tmp_path / "killed" / LOG)
    assert 4 <= len(before) < len(read_jsonl(tmp_path / "whole" / LOG))
    assert not (tmp_path / "killed" / RESULT).exists()
    search(name, tmp_path / "killed")
    assert same(tmp_path / "whole", tmp_path / "killed")
    after = read_jsonl(tmp_path / "killed" / LOG)
    assert after[: len(before)] == before  # nothing was evaluated again
    search("random" if name != "random" else "evolution", tmp_path / "other")
    assert not same(tmp_path / "whole", tmp_path / "other")


def test_a_log_cut_at_any_byte_is_continued(tmp_path: Path) -> None:
    search("evolution", tmp_path / "whole")
    log = (tmp_path / "whole" / LOG).read_bytes()
    for i, end in enumerate(np.random.default_rng(0).integers(0, len(log), 12)):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / LOG).write_bytes(log[:end])
        search("evolution", folder)
        assert same(tmp_path / "whole", folder)


def test_a_result_that_was_not_finished_is_written_again(tmp_path: Path) -> None:
    search("evolution", tmp_path / "whole")
    search("evolution", tmp_path / "killed")
    (tmp_path / "killed" / RESULT).unlink()
    (tmp_path / "killed" / EVALUATIONS).write_bytes(b"half")
    search("evolution", tmp_path / "killed")
    assert same(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_search_is_read_instead_of_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = search("evolution", tmp_path)
    monkeypatch.setattr(slow_search, "AGENTS", {"evolution": _Unasked})
    again = search("evolution", tmp_path)
    assert again.evaluations.equals(first.evaluations)
    assert again.seconds == pytest.approx(first.seconds, abs=1e-3)


class _Unasked(Evolution):
    """The same settings as the toy's evolution; fails when it is asked."""

    def __init__(self, space: Any, **settings: Any) -> None:
        super().__init__(space, population=20, **settings)

    def ask(self, n: int) -> Any:
        raise AssertionError("asked")

    def __repr__(self) -> str:
        return super().__repr__().replace("_Unasked", "Evolution")


def test_a_log_of_other_settings_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    run_search(Evolution(SPACE, seed=0, n_objectives=2), problem(), 60, 10, folder=tmp_path)
    log = (tmp_path / LOG).read_bytes()
    for kind, space, seed in ((Evolution, SPACE, 1), (RandomSearch, SPACE, 1), (Evolution, SMALL, 0)):
        agent = kind(space, seed=seed, n_objectives=2)
        with pytest.raises(UserError, match=r"progress\.jsonl holds a search with other settings"):
            run_search(agent, problem(space), 60, 10, folder=tmp_path)
    other = Problem(dict(problem().predictors) | {"gain": problem().predictors["macs"]}, {"gain": -1, "macs": 1})
    with pytest.raises(UserError, match="was searched with other predictors"):
        run_search(Evolution(SPACE, seed=0, n_objectives=2), other, 60, 10, folder=tmp_path)
    assert (tmp_path / LOG).read_bytes() == log


def test_a_search_can_be_extended(tmp_path: Path) -> None:
    short = search("evolution", tmp_path, evaluations=48)
    longer = search("evolution", tmp_path, evaluations=96)
    assert len(longer.evaluations) == 96
    assert longer.evaluations["gain"][:48].equals(short.evaluations["gain"])
    assert load_result(tmp_path).evaluations.equals(longer.evaluations)


def test_the_search_starts_from_a_network_within_the_limits() -> None:
    least = float(problem(SMALL).predictors["macs"](all_networks(SMALL)).min())
    result = run_search(RandomSearch(SMALL, seed=0, n_objectives=2), problem(SMALL, macs=least * 1.0001), 20, 10)
    assert result.chosen == 0
    assert (result.evaluations["violation"] > 0).sum() == 19


def test_a_network_within_the_limits_comes_before_initial_ones_that_are_not() -> None:
    least = float(problem(SMALL).predictors["macs"](all_networks(SMALL)).min())
    tight, largest = problem(SMALL, macs=least * 1.0001), SMALL.largest()
    agent = RandomSearch(SMALL, seed=0, n_objectives=2)
    assert run_search(agent, tight, 1, 1, initial=largest).chosen == 0


def test_initial_networks_are_all_kept_where_fewer_evaluations_are_wanted() -> None:
    macs = problem(SMALL).predictors["macs"](all_networks(SMALL))
    initial = all_networks(SMALL)[np.argsort(-macs)[[0, 1, 2, 3, 4, 5, -1]]]
    p = Problem(problem(SMALL).predictors, {"gain": -1}, {"macs": float(np.median(macs))})
    result = run_search(RandomSearch(SMALL), p, 5, 5, initial=initial)
    assert (len(result.evaluations), result.chosen) == (7, 6)  # the one within the limit comes last


def test_a_frugal_search_is_continued(tmp_path: Path) -> None:
    limit = float(problem(SMALL).predictors["macs"](SMALL.largest())[0]) * 0.9

    def search(evaluations: int) -> int:
        frugal = Problem(problem(SMALL).predictors, {"gain": -1}, {"macs": limit}, frugal=True)
        agent = RandomSearch(SMALL, seed=0)
        initial = np.concatenate([SMALL.largest(), SMALL.smallest()])
        return len(run_search(agent, frugal, evaluations, 5, folder=tmp_path, initial=initial).evaluations)

    assert (search(10), search(10), search(20)) == (10, 10, 20)


def test_a_frugal_search_ends_where_a_lavish_one_does() -> None:
    predictors = problem(SMALL).predictors
    limit = {"macs": float(np.quantile(predictors["macs"](all_networks(SMALL)), 0.3))}
    both = [Problem(predictors, {"gain": -1, "macs": 1}, limit, frugal=frugal) for frugal in (True, False)]
    frugal, lavish = (run_search(RandomSearch(SMALL, n_objectives=2), p, 60, 5, stall=3) for p in both)
    assert len(frugal.evaluations) == len(lavish.evaluations) > 20
    seen: list[int] = []
    run_search(
        RandomSearch(SMALL, n_objectives=2), both[0], 200, 5, stall=1, progress=lambda done, *_: seen.append(done)
    )
    early = run_search(RandomSearch(SMALL, n_objectives=2), both[0], 200, 5, stall=1)
    assert seen[-1] == len(early.evaluations) < 200, "the last batch is told too"
    assert frugal.hypervolume() == lavish.hypervolume()


def test_no_search_is_begun_for_an_infeasible_budget(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match="relax macs"):
        run_search(RandomSearch(SMALL, seed=0, n_objectives=2), problem(SMALL, macs=1e-3), 20, 10, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_search_of_more_networks_than_there_are_finds_them_all_and_ends() -> None:
    result = run_search(Evolution(SMALL, seed=0, n_objectives=2), problem(SMALL), 10**6, 500)
    assert len(result.evaluations) == SMALL.size
    everything = problem(SMALL).evaluate(all_networks(SMALL))
    assert result.cost[result.chosen, 0] == everything.cost[:, 0].min()


def test_an_agent_that_only_repeats_itself_is_stopped() -> None:
    class Stuck(RandomSearch):
        def ask(self, n: int) -> Any:
            return self.space.smallest().repeat(n, axis=0)

    assert len(run_search(Stuck(SPACE, seed=0, n_objectives=2), problem(), 100, 10).evaluations) == 1


def test_an_agent_may_do_what_it_likes_with_what_it_is_told() -> None:
    class Careless(RandomSearch):
        def tell(self, genes: Any, cost: Any, violation: Any) -> None:
            super().tell(genes.copy(), cost, violation)
            genes[:], cost[:], violation[:] = 0, 0, 1

    careless, careful = (
        run_search(kind(SPACE, seed=0, n_objectives=2), problem(), 60, 10) for kind in (Careless, RandomSearch)
    )
    pd.testing.assert_frame_equal(careless.evaluations, careful.evaluations)


def test_a_network_counts_once_whatever_the_genes_of_its_skipped_blocks() -> None:
    skipped = ~SPACE.active(SPACE.smallest())[0]

    class Hidden(RandomSearch):
        def ask(self, n: int) -> Any:
            genes = SPACE.smallest().repeat(n, axis=0)
            genes[:, skipped] = self._rng.integers(0, SPACE.counts[skipped], (n, skipped.sum()))
            return genes

    assert skipped.any() and len(run_search(Hidden(SPACE, seed=0, n_objectives=2), problem(), 40, 10).evaluations) == 1


def test_progress_tells_the_best_network_so_far() -> None:
    seen: list[tuple[int, int, dict[str, float]]] = []
    agent = Evolution(SPACE, seed=0, n_objectives=2)
    result = run_search(agent, problem(), 95, 20, progress=lambda *said: seen.append(said))
    assert [done for done, _, _ in seen] == [20, 40, 60, 80, 95]
    gains = [best["gain"] for _, _, best in seen]
    assert gains == sorted(gains)
    assert gains[-1] == result.evaluations["gain"][result.chosen]


@pytest.mark.parametrize(("evaluations", "batch"), [(0, 10), (10, 0)])
def test_nothing_to_do_is_a_mistake(evaluations: int, batch: int) -> None:
    with pytest.raises(UserError, match="must be whole numbers, at least 1"):
        run_search(RandomSearch(SPACE), problem(), evaluations, batch)


def test_an_agent_made_for_another_number_of_objectives_is_refused() -> None:
    with pytest.raises(UserError, match=r"RandomSearch\(seed=0, n_objectives=1\) is not made for 2 objectives"):
        run_search(RandomSearch(SPACE), problem(), 10, 10)


# -- the result -------------------------------------------------------------------------------------------------------


def test_a_result_is_what_the_evaluations_say(tmp_path: Path) -> None:
    p = problem(macs=6)
    result = run_search(Evolution(SPACE, seed=0, n_objectives=2), p, 200, 20, folder=tmp_path)
    frame = result.evaluations
    evaluation = Problem(p.predictors, p.objectives, p.limits).evaluate(result.genes)
    assert frame["gain"].to_numpy() == pytest.approx(evaluation.values["gain"], rel=1e-12)
    assert result.cost == pytest.approx(evaluation.cost, rel=1e-12)
    assert frame["violation"].to_numpy() == pytest.approx(evaluation.violation, abs=1e-12)
    feasible = frame[frame["violation"] <= 0]
    assert 0 < len(feasible) < len(frame)
    assert frame["gain"][result.chosen] == feasible["gain"].max()
    for _, row in result.front.iterrows():
        worse = (feasible["gain"] >= row["gain"]) & (feasible["macs"] <= row["macs"])
        assert worse.sum() == 1  # itself
    assert result.front["gain"].is_monotonic_decreasing
    front_cost = result.front[["gain", "macs"]].to_numpy() * [-1, 1]
    assert result.hypervolume() == pytest.approx(hypervolume(front_cost, np.array(result.reference)))


def test_hypervolume_grows_with_the_evaluations() -> None:
    curve = run_search(Evolution(SPACE, seed=0, n_objectives=2), problem(), 300, 20).curve()
    volumes = [volume for _, volume in curve]
    assert volumes == sorted(volumes)
    assert volumes[0] < volumes[-1]
    assert curve[-1][0] == 300


def test_a_saved_result_comes_back_and_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_search(Evolution(SPACE, seed=seed, n_objectives=2), problem(macs=6), 80, 20).save(tmp_path / name)
    assert same(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")
    loaded = load_result(tmp_path / "a")
    assert loaded.space == SPACE
    card = json.loads((tmp_path / "a" / RESULT).read_text())
    assert json.loads(json.dumps(loaded.to_dict())) == card
    assert card["chosen"]["arch"] == SPACE.decode(loaded.genes[[loaded.chosen]])[0].to_dict()
    table = pd.read_parquet(tmp_path / "a" / EVALUATIONS)
    assert list(table.columns) == [*(g.name for g in SPACE.genes), "gain", "macs", "violation", "front"]


def test_the_best_of_several_results_is_feasible_and_best_in_the_first_objective() -> None:
    results = [run_search(RandomSearch(SPACE, seed=seed, n_objectives=2), problem(macs=6), 60, 20) for seed in range(3)]
    gains = [r.evaluations["gain"][r.chosen] for r in results]
    assert best_result(results) == int(np.argmax(gains))


def test_a_finished_search_does_not_answer_for_other_initial_networks_or_another_reference(tmp_path: Path) -> None:
    first = run_search(RandomSearch(SMALL, n_objectives=2), problem(space=SMALL), 8, 4, folder=tmp_path)
    unseen = [genes for genes in all_networks(SMALL) if genes.tolist() not in first.genes.tolist()][:1]
    with pytest.raises(UserError, match="holds a search with other settings"):
        run_search(
            RandomSearch(SMALL, n_objectives=2), problem(space=SMALL), 8, 4, folder=tmp_path, initial=np.array(unseen)
        )
    reference = (100.0, 100.0)
    again = run_search(
        RandomSearch(SMALL, n_objectives=2), problem(space=SMALL), 8, 4, folder=tmp_path, reference=reference
    )
    assert again.reference == reference
    assert np.array_equal(again.genes, first.genes)
