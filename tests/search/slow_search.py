"""A search for a test to kill: python -m tests.search.slow_search <agent> <folder> <seconds per batch>."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ofa.space import Genes
from search.loop import run_search
from search.problem import Problem
from search.result import SearchResult
from tests.search.toy import AGENTS, SPACE, problem

EVALUATIONS, BATCH = 80, 8


def search(name: str, folder: Path, wait: float = 0.0, evaluations: int = EVALUATIONS) -> SearchResult:
    """The same search every time, only slower."""
    predictors = problem().predictors

    def slow(genes: Genes) -> object:
        time.sleep(wait)
        return predictors["gain"](genes)

    p = Problem({"gain": slow, "macs": predictors["macs"]}, {"gain": -1, "macs": 1}, {"macs": 6})  # type: ignore[dict-item]
    return run_search(AGENTS[name](SPACE, seed=0, n_objectives=2), p, evaluations, BATCH, folder=folder)


if __name__ == "__main__":
    search(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
