"""The comparison of agents says what their results say."""

from __future__ import annotations

import numpy as np
import pytest

from search.compare import curves, finals, summary
from search.loop import run_search
from search.result import SearchResult
from tests.search.toy import AGENTS, SPACE, problem


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, int], SearchResult]:
    return {
        (name, seed): run_search(AGENTS[name](SPACE, seed=seed, n_objectives=2), problem(macs=6), 120, 20)
        for name in ("random", "evolution")
        for seed in (0, 1, 2)
    }


def test_every_agent_and_seed_has_its_curve(results: dict[tuple[str, int], SearchResult]) -> None:
    table = curves(results)
    for (agent, seed), result in results.items():
        rows = table[(table["agent"] == agent) & (table["seed"] == seed)]
        assert list(zip(rows["evaluations"], rows["hypervolume"], strict=True)) == result.curve()
    assert len(table) == sum(len(result.curve()) for result in results.values())


def test_the_summary_has_mean_and_spread_best_agent_first(results: dict[tuple[str, int], SearchResult]) -> None:
    volumes = {name: [results[name, seed].hypervolume() for seed in (0, 1, 2)] for name in ("random", "evolution")}
    assert np.mean(volumes["evolution"]) > np.mean(volumes["random"])
    lines = summary(results)
    assert [line.split()[0] for line in lines[1:]] == ["evolution", "random"]
    assert f"{np.mean(volumes['random']):.5g} ± {np.std(volumes['random']):.2g}" in lines[2]
    gains = [results["random", seed].evaluations["gain"][results["random", seed].chosen] for seed in (0, 1, 2)]
    assert f"{np.mean(gains):.5g} ± {np.std(gains):.2g}" in lines[2]
    assert len(finals(results)) == 6


def test_a_large_spread_is_written_out(
    results: dict[tuple[str, int], SearchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes = iter([40_000.0, 41_900.0])
    monkeypatch.setattr(SearchResult, "hypervolume", lambda _: next(volumes))
    assert "40950 ± 950" in summary({key: results[key] for key in [("random", 0), ("random", 1)]})[1]
