"""A worker for a test to kill: python -m tests.search.shared_worker <storage> <evaluations> <seed> <its log>."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from ofa.files import append_jsonl
from ofa.space import Genes
from search.problem import Problem
from search.shared import work
from tests.search.toy import SPACE, problem

NAME = "test"


def told(path: Path | None = None, wait: float = 0.0) -> Problem:
    """The toy problem; every measurement takes a while, and its end is written down."""
    predictors = dict(problem().predictors)
    gain = predictors["gain"]

    def slow(genes: Genes) -> np.ndarray:
        time.sleep(wait)
        if path is not None:
            append_jsonl(path, {"genes": genes[0].tolist()})
        return gain(genes)

    return Problem(predictors | {"gain": slow}, {"gain": -1, "macs": 1}, {"macs": 6})


if __name__ == "__main__":
    storage, evaluations, seed, file = sys.argv[1:]
    work(storage, NAME, SPACE, told(Path(file), 0.2), int(evaluations), sampler="random", seed=int(seed))
