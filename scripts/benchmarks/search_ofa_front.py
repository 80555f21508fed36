"""The front of ImageNet top-1 and MACs in once-for-all's MobileNetV3 space, beside the points of published searches.

    OFA_DATA=<folder> python scripts/benchmarks/search_ofa_front.py [--seeds 3] [--out front.json]

The truth of a network outside the table is not known: an accuracy predictor fitted on all 1,215 published networks (of
DyNAS-T's searches) stands in for it, for ours and for theirs; of another kind than the one that the model-based search
learns with, or this one would know the form of its judge.  Hypervolume: percentage points times millions of MACs,
counted from the lowest top-1 and the most MACs of the table.  The model-based search measures 25 networks at a time.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.files import write_json
from ofa.space import Genes, Space
from predictors.accuracy import Accuracy
from predictors.costs import Macs
from scripts.benchmarks.about import about, run_main
from scripts.benchmarks.predictors_accuracy import read_measured
from search.agents import RandomSearch
from search.evolution import Evolution
from search.loop import run_search
from search.model_based import ModelBased
from search.pareto import hypervolume
from search.problem import Problem

TABLE = "tables/ofa_mbv3_w1.0_imagenet_r224.csv"
STEPS = (50, 100, 250)
Floats = NDArray[np.float64]


class Oracle:
    """Top-1 by the predictor of all published networks, with a memo."""

    def __init__(self, space: Space, model: str, genes: Genes, top1: Floats) -> None:
        self._fitted = Accuracy(space, model).fit(genes, top1)

    def __call__(self, genes: Genes) -> Floats:
        """Top-1 in percent (N,)."""
        return self._fitted(genes)


def agents(space: Space, problem: Problem, seed: int) -> dict[str, Callable[[], Any]]:
    """Makers of the agents by name."""
    options: dict[str, Any] = {"seed": seed, "n_objectives": 2}
    return {
        "random": partial(RandomSearch, space, **options),
        "nsga2": partial(Evolution, space, **options, population=50),
        "model": partial(ModelBased, space, model=partial(Accuracy, space, "gp"), problem=problem, seed=seed),
    }


def main() -> None:
    """Print the hypervolumes, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["random", "nsga2", "model"])
    parser.add_argument("--table", type=Path, help=f"CSV file (default: {TABLE} in OFA_DATA)")
    parser.add_argument("--space", default="ofa_mbv3_w1.0")
    parser.add_argument("--column", default="top1")
    parser.add_argument("--judge", default="svr", help="kind of predictor that stands in for the truth")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    path = args.table or Path(os.environ.get("OFA_DATA", "../shared/data"), TABLE)
    space, genes, top1 = read_measured(path, args.space, args.column)
    oracle, macs = Oracle(space, args.judge, genes, top1), Macs(space)
    corner = np.array([-top1.min(), macs(genes).max() / 1e6])

    def volume(genes: Genes, accuracy: Floats) -> float:
        return hypervolume(np.stack([-accuracy, macs(genes) / 1e6], axis=1), corner)

    published = {"measured": volume(genes, top1), "by the oracle": volume(genes, oracle(genes))}
    volumes = ", ".join(f"{name} {value:.1f}" for name, value in published.items())
    print(f"published networks, n={len(genes)}, judged by {args.judge}: {volumes}")
    rows = []
    for name in args.methods:
        start, found = perf_counter(), []
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            problem = Problem({"accuracy": oracle, "macs": macs}, {"accuracy": -1, "macs": 1})
            agent = agents(space, problem, seed)[name]()
            result = run_search(agent, problem, STEPS[-1], 25, reference=tuple(corner * [1, 1e6]))
            found.append([result.hypervolume(step) / 1e6 for step in STEPS])
        values, seconds = np.array(found), (perf_counter() - start) / args.seeds
        cells = " ".join(f"{m:.1f} ± {s:.1f}" for m, s in zip(values.mean(axis=0), values.std(axis=0), strict=True))
        print(f"{name:8} after {STEPS}: {cells}  n={args.seeds} {seconds:.0f} s/run", flush=True)
        rows.append({"method": name, "volumes": found, "seconds": seconds})
    print(about())
    if args.out:
        write_json(args.out, {"published": published, "rows": rows, "steps": STEPS, "about": about()})


if __name__ == "__main__":
    run_main(main)
