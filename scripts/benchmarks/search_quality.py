"""How good the networks are that a search finds with few measurements, where the truth about every network is known.

    OFA_DATA=<folder> python scripts/benchmarks/search_quality.py [--methods random model] [--seeds 50] [--out q.json]

NAS-Bench-Macro: 6,561 networks of 8 blocks, each trained on CIFAR-10.  Three problems: the best accuracy; the best
accuracy under the 30 % quantile of FLOPs; the front of accuracy and FLOPs.  A value is what is missing after 25, 50,
75, 100, 200 and 500 measurements: points of accuracy, or percent of the whole front's hypervolume (corner: the median
accuracy, the most FLOPs).  FLOPs are exact and cost nothing: a network beyond the limit is not measured and not
counted, by whichever agent it was proposed.  Agents propose one network at a time, the model-based search 5 from
50 and 25 from 100 measurements on (--batch: from the start); its defaults were chosen on seeds 1000-1099.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.files import write_json
from ofa.space import Genes, Space
from predictors.costs import Macs
from predictors.gp import GroupedGP
from predictors.tables import distinct
from scripts.benchmarks.about import about, run_main
from scripts.benchmarks.predictors_accuracy import read_measured
from search.agents import RandomSearch, keys
from search.aging import AgingEvolution
from search.evolution import Evolution
from search.genetic import Genetic
from search.model_based import ModelBased
from search.optuna_agent import OptunaAgent
from search.pareto import hypervolume
from search.problem import Problem

TABLE = "tables/nas_bench_macro.csv"
STEPS = (25, 50, 75, 100, 200, 500)
Floats = NDArray[np.float64]


class TableModel:
    """A Gaussian process on one-hot genes and log FLOPs, with a length scale for each of the two."""

    def __init__(self, space: Space, flops: Callable[[Genes], Floats]) -> None:
        self.space, self.flops = space, flops

    def fit(self, genes: Genes, values: Floats) -> TableModel:
        """Learn from genes (N, G) and values (N,)."""
        x = self._features(genes)
        self.mean, self.std = x.mean(axis=0), np.where(x.std(axis=0) > 1e-9, x.std(axis=0), 1)
        self.centre, self.spread = values.mean(), values.std() or 1.0
        self.gp = GroupedGP([slice(0, x.shape[1] - 1), slice(x.shape[1] - 1, x.shape[1])])
        self.gp.fit((x - self.mean) / self.std, (values - self.centre) / self.spread)
        return self

    def predict(self, genes: Genes) -> tuple[Floats, Floats]:
        """Mean and standard deviation, (N,) each."""
        mean, std = self.gp.predict((self._features(genes) - self.mean) / self.std)
        return mean * self.spread + self.centre, np.maximum(std, 1e-6) * self.spread

    def _features(self, genes: Genes) -> Floats:
        return np.concatenate([self.space.onehot(genes), np.log(self.flops(genes))[:, None]], axis=1)


@dataclass(frozen=True)
class Bench:
    """A space, all its networks (N, G), and the truth about them as predictors of genes."""

    space: Space
    accuracy: Callable[[Genes], Floats]
    flops: Callable[[Genes], Floats]
    genes: Genes

    def problem(self, name: str) -> Problem:
        """One of PROBLEMS."""
        predictors = {"accuracy": self.accuracy, "flops": self.flops}
        limit = {"flops": float(np.quantile(self.flops(self.genes), 0.3))}
        return {
            "accuracy": Problem(predictors, {"accuracy": -1}),
            "accuracy, FLOPs limit": Problem(predictors, {"accuracy": -1}, limit),
            "front": Problem(predictors, {"accuracy": -1, "flops": 1}),
        }[name]


PROBLEMS = ("accuracy", "accuracy, FLOPs limit", "front")


def bench_of(path: Path, name: str, column: str) -> Bench:
    """A table of all networks of a space."""
    space, genes, accuracy = read_measured(path, name, column)
    genes, accuracy = distinct(genes, accuracy)
    row = dict(zip(keys(genes), range(len(genes)), strict=True))
    if len(row) < space.size:
        raise SystemExit(f"{path} has {len(row)} of the {space.size} networks of {name}; the truth needs all")
    macs = Macs(space)
    return Bench(
        space, lambda genes: accuracy[[row[key] for key in keys(genes)]], lambda genes: macs(genes).astype(float), genes
    )


def agents(bench: Bench, problem: Problem, seed: int) -> dict[str, Callable[[], Any]]:
    """Makers of the agents by name."""
    options: dict[str, Any] = {"seed": seed, "n_objectives": len(problem.objectives)}
    bred = options | {"violation": problem.exceeds}  # as ofa-search passes it where costs are exact
    model = partial(TableModel, bench.space, bench.flops)
    return {
        "random": partial(RandomSearch, bench.space, **options),
        "genetic": partial(Genetic, bench.space, **bred, population=20, parents=0.5),
        "nsga2": partial(Evolution, bench.space, **bred, population=20),
        "aging": partial(AgingEvolution, bench.space, **bred, population=20, sample=10),
        "optuna tpe": partial(OptunaAgent, bench.space, **options, sampler="tpe"),
        "optuna nsga2": partial(OptunaAgent, bench.space, **options, sampler="nsga2"),
        "optuna nsga3": partial(OptunaAgent, bench.space, **options, sampler="nsga3"),
        "optuna gp": partial(OptunaAgent, bench.space, **options, sampler="gp"),
        "model": partial(ModelBased, bench.space, model=model, problem=problem, seed=seed),
    }


def search(agent: Any, problem: Problem, until: int, batch: int, stop: Callable[[Floats], bool]) -> Floats:
    """Costs of the measured networks in their order (N, M), N >= `until` unless `stop` says that the rest is known."""
    model, costs, seen = isinstance(agent, ModelBased), np.empty((0, len(problem.objectives))), set[bytes]()
    for _ in range(20 * until):
        if len(costs) >= until or (len(costs) and stop(costs)):
            break
        genes = agent.ask(max(batch, 25 if len(costs) >= 100 else 5 if len(costs) >= 50 else 1) if model else 1)
        found = problem.evaluate(genes)
        agent.tell(genes, found.cost, found.violation)
        new = [key not in seen and v <= 0 for key, v in zip(keys(genes), found.violation, strict=True)]
        seen.update(keys(genes))
        costs = np.concatenate([costs, found.cost[new]])
    return costs


def missing(bench: Bench, name: str) -> Callable[[Floats], float]:
    """What measured costs (N, M) lack: points of accuracy, or percent of the hypervolume."""
    found = bench.problem(name).evaluate(bench.genes)
    truth = found.cost[found.violation <= 0]
    if truth.shape[1] == 1:
        return lambda costs: float(costs.min() - truth.min())
    corner = np.array([np.median(truth[:, 0]), truth[:, 1].max()])
    whole = hypervolume(truth, corner)
    return lambda costs: 100 * (1 - hypervolume(costs, corner) / whole)


def run(bench: Bench, name: str, method: str, seed: int, until: int, batch: int) -> list[float]:
    """What is missing at each of STEPS up to `until`."""
    problem, lack = bench.problem(name), missing(bench, name)
    agent = agents(bench, problem, seed)[method]()
    costs = search(agent, problem, until, batch, lambda costs: costs.shape[1] == 1 and lack(costs) <= 0)
    return [lack(costs[:step]) for step in STEPS if step <= until]


def main() -> None:
    """Print a row for each problem and method, and write all runs as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="default: all but optuna gp")
    parser.add_argument("--problems", nargs="+", default=PROBLEMS, choices=PROBLEMS)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--until", type=int, default=500)
    parser.add_argument("--batch", type=int, default=1, help="networks that the model-based search measures at a time")
    parser.add_argument("--table", type=Path, help=f"CSV file of every network (default: {TABLE} in OFA_DATA)")
    parser.add_argument("--space", default="nas_bench_macro")
    parser.add_argument("--column", default="mean_acc", help="accuracy, in percent or as a share")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    path = args.table or Path(os.environ.get("OFA_DATA", "../shared/data"), TABLE)
    bench = bench_of(path, args.space, args.column)
    every = agents(bench, bench.problem("accuracy"), 0)
    rows: list[dict[str, Any]] = []
    print(f"missing after {', '.join(map(str, STEPS))} measurements: mean ± spread over seeds")
    for name in args.problems:
        for method in args.methods or [m for m in every if m != "optuna gp"]:
            start, seeds = perf_counter(), range(args.first_seed, args.first_seed + args.seeds)
            runs = np.array([run(bench, name, method, seed, args.until, args.batch) for seed in seeds])
            seconds = (perf_counter() - start) / args.seeds
            rows.append({"problem": name, "method": method, "runs": runs.tolist(), "seconds": seconds})
            cells = " ".join(f"{m:6.3f} ± {s:5.3f}" for m, s in zip(runs.mean(axis=0), runs.std(axis=0), strict=True))
            print(f"{name:22} {method:13} {cells}  n={args.seeds} {seconds:6.1f} s/run", flush=True)
    print(about())
    if args.out:
        write_json(args.out, {"rows": rows, "steps": STEPS, "table": path.name, "about": about()})


if __name__ == "__main__":
    run_main(main)
