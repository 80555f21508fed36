"""How fast the search is beside once-for-all's finders and pymoo, in one run on the same work.  Use one thread.

    OMP_NUM_THREADS=1 python scripts/benchmarks/search_speed.py [--ofa FOLDER] [--pymoo FOLDER] [--rounds 3]

--ofa: a folder that holds once-for-all's package (pip download ofa==0.1.0.post202307202001, unpacked).
--pymoo: a folder that holds pymoo (pip install --target FOLDER pymoo==0.6.2).

finder: a whole evolutionary search, population 100, 500 generations, under a limit of MACs, with the same 3x400 MLP (of
random weights) and the same table of MACs; the tutorial's finder in this process, in turns with ours; the library's
with its own encoder, MLP and closed form of MACs in a process of its own for 3 generations, extrapolated to 500.
nsga2: 10,000 evaluations, 45 genes, 2 limits; the hypervolume is of all networks that were evaluated.

The finders have the same settings: the best quarter has children, half of them mutants with each block redrawn with a
chance of 0.1, and a network may be a parent twice.  The tutorial draws a child again until it meets the limit; ours
draws so many that about 100 of them do, and goes on until as many networks that meet it were proposed.  The tutorial
predicts every child, 50,100; ours each different network once, and says how many.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import process_time
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.files import write_json
from ofa.space import Genes, Space, load_space
from predictors.costs import Macs, Params
from predictors.models import Network
from predictors.perceptron import perceptron
from scripts.benchmarks.about import about
from search.evolution import Evolution
from search.genetic import Genetic
from search.pareto import hypervolume
from search.problem import Problem
from search.variation import cross, draw, mutate

LIMIT = 250e6  # MACs
GENERATIONS, POPULATION = 500, 100
EVALUATIONS = 10_000
Floats = NDArray[np.float64]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what the work returned."""
    start = process_time()
    result = work()
    return process_time() - start, result


# -- once-for-all's finders -------------------------------------------------------------------------------------------


def tutorial_space() -> Space:
    """The space that the tutorial searches."""
    return load_space("ofa_mbv3_w1.0").restrict(resolution=[160, 176, 192, 208, 224])


def mlp_of(model: Any, space: Space) -> Callable[[Genes], Floats]:
    """The tutorial's network in this project's, whose first layer takes one-hot genes in the order of the space.

    The tutorial has 60 columns for kernels, 60 for expand ratios, 8 for the resolution from 112 pixels on, none for
    depths.
    """
    ends = np.concatenate([[0], np.cumsum(space.counts)])
    layers: Any = [(m.weight.detach().numpy().T.copy(), m.bias.detach().numpy()) for m in model[::2]]
    ordered = np.zeros((ends[-1], layers[0][0].shape[1]), dtype=np.float32)
    for name, first, n in (("kernel", 0, 60), ("expand", 60, 60), ("resolution", 123, 5)):
        ordered[ends[space.columns(name).start] :][:n] = layers[0][0][first : first + n]
    network = Network(0)
    layers[0] = ordered, layers[0][1]
    network.forward = perceptron(layers)
    return lambda genes: network.predict(space.onehot(genes))[0]  # type: ignore[arg-type]  # float32 as it works


def tutorial_modules(folder: Path) -> tuple[ModuleType, ModuleType, ModuleType]:
    """The tutorial's finder, accuracy predictor and MACs table, which import little else of their package."""
    for name in ("ofa.utils", "ofa.utils.layers"):
        stand_in = ModuleType(name)
        stand_in.download_url = None  # type: ignore[attr-defined]
        sys.modules[name] = stand_in
    return tuple(
        _load(folder / f"ofa/tutorial/{n}.py") for n in ("evolution_finder", "accuracy_predictor", "flops_table")
    )  # type: ignore[return-value]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tutorial_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def macs_table(space: Space) -> dict[int, Any]:
    """MACs in millions as the tutorial's table holds them: by resolution, block, and (kernel, expand ratio).

    Read off whole networks: what a block of a choice has more than one of the first choice.  A block that can be left
    out is told from the network without it; that of the first two blocks of each stage is counted in "other_blocks".
    """
    macs, table = Macs(space), {}
    kernel, expand, depth = (space.columns(name).start for name in ("kernel", "expand", "depth"))
    for index, resolution in enumerate(space.resolution):
        base = space.smallest()
        base[0, 0] = index
        fixed = int(macs(base)[0])
        blocks: dict[int, Any] = {0: {(3, 1): 0.0}}
        for block, (stage, position) in enumerate(space.blocks):
            genes = np.repeat(base, 9, axis=0)
            genes[:, depth + stage] = max(0, position - 1)
            genes[:, kernel + block], genes[:, expand + block] = np.repeat(range(3), 3), np.tile(range(3), 3)
            without = base.copy()
            without[:, depth + stage] = max(0, position - 2)
            cost = (macs(genes) - macs(without)[0]) / 1e6
            names = [(k, e) for k in (3, 5, 7) for e in (3, 4, 6)]
            blocks[block + 1] = dict(zip(names, cost.tolist(), strict=True))
        table[int(resolution)] = {"mobile_inverted_blocks": blocks, "other_blocks": {"fixed": fixed / 1e6}}
    return table


def ours(space: Space, predict: Callable[[Genes], Floats], seed: int) -> tuple[float, int]:
    """Search for as many networks within the limit as the tutorial: the best prediction; how many were predicted."""
    asked: list[int] = []

    def score(genes: Genes) -> Floats:
        asked.append(len(genes))
        return predict(genes)

    problem = Problem({"score": score, "macs": Macs(space)}, {"score": -1}, {"macs": LIMIT}, frugal=True)
    agent = Genetic(space, seed=seed, population=POPULATION, repeats=True)
    best, allowed, proposed = -np.inf, 0, 0
    while allowed < (GENERATIONS + 1) * POPULATION:
        found = problem.evaluate(agent.ask(round(POPULATION * proposed / allowed) if allowed else POPULATION))
        proposed += len(found.genes)
        agent.tell(found.genes, found.cost, found.violation)
        scores = -found.cost[:, 0][found.violation <= 0]
        allowed += len(scores)
        best = max(best, float(scores.max(initial=-np.inf)))
    return best, sum(asked)


def finder(folder: Path, rounds: int) -> dict[str, Any]:
    """Both searches in turns, and the library's finder."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    evolution, accuracy, flops = tutorial_modules(folder)
    space = tutorial_space()
    predictor = accuracy.AccuracyPredictor(pretrained=False, device="cpu")
    order = [accuracy.ks_map[k] for k in (3, 5, 7)] + [accuracy.ex_map[e] for e in (3, 4, 6)]
    if order != [0, 1, 2, 0, 1, 2]:
        raise RuntimeError(f"once-for-all orders its one-hot columns as {order} in this process; run it again")
    table = flops.FLOPsTable.__new__(flops.FLOPsTable)
    table.efficiency_dict = macs_table(space)
    predict = mlp_of(predictor.model, space)
    check(space, predictor, table, predict)
    names = ("tutorial", "ours", "tutorial score", "our score", "we predicted")
    found: dict[str, Any] = {name: [] for name in names}
    for seed in range(rounds):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        theirs = evolution.EvolutionFinder("flops", LIMIT / 1e6, table, predictor)
        seconds, result = timed(theirs.run_evolution_search)
        found["tutorial"].append(seconds)
        found["tutorial score"].append(result[1][0])
        seconds, (score, predicted) = timed(partial(ours, space, predict, seed))
        found["ours"].append(seconds)
        found["our score"].append(score)
        found["we predicted"].append(predicted)
    found["library, extrapolated"] = library(folder)
    return found


def check(space: Space, predictor: Any, table: Any, predict: Callable[[Genes], Floats]) -> None:
    """Raise unless both sides give the same numbers for the same networks."""
    genes = draw(space, 50, np.random.default_rng(0))
    specs = []
    for row in genes[:, None]:
        values = {name: space.values(row, name)[0].astype(int).tolist() for name in ("kernel", "expand", "depth")}
        resolution = [int(space.values(row, "resolution")[0, 0])]
        specs.append(
            {"ks": values["kernel"], "e": values["expand"], "d": values["depth"], "r": resolution, "wid": None}
        )
    macs = [table.predict_efficiency(spec) for spec in specs]
    np.testing.assert_allclose(macs, Macs(space)(genes) / 1e6, rtol=1e-9)
    np.testing.assert_allclose(predictor.predict_accuracy(specs).numpy()[:, 0], predict(genes), atol=1e-5)


LIBRARY = """
import sys, types, time
for name in ("gdown", "torch._six"):
    module = types.ModuleType(name); sys.modules[name] = module
sys.modules["torch._six"].string_classes = str; sys.modules["torch._six"].int_classes = int
import torch; torch.set_num_threads(1)
import torch._utils; torch._six = sys.modules["torch._six"]
from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3
from ofa.nas.accuracy_predictor import AccuracyPredictor, MobileNetArchEncoder
from ofa.nas.efficiency_predictor import Mbv3FLOPsModel
from ofa.nas.search_algorithm import EvolutionFinder
net = OFAMobileNetV3(ks_list=[3, 5, 7], expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4], width_mult=1.0)
encoder = MobileNetArchEncoder(image_size_list=[160, 176, 192, 208, 224])
accuracy = AccuracyPredictor(encoder, 400, 3, device="cpu")
def seconds(generations):
    finder = EvolutionFinder(Mbv3FLOPsModel(net), accuracy, population_size=100, max_time_budget=generations)
    start = time.process_time(); finder.run_evolution_search(250.0); return time.process_time() - start
with torch.no_grad():
    first, rest = seconds(0), seconds(3)
print(first + (rest - first) / 3 * 500)
"""


def library(folder: Path) -> float | str:
    """CPU seconds of the library's finder: its first population, and 500 times what one of 3 generations takes."""
    run = subprocess.run([sys.executable, "-c", LIBRARY], cwd=folder, capture_output=True, text=True)
    return float(run.stdout.split()[-1]) if run.returncode == 0 else run.stderr.strip().splitlines()[-1]


# -- NSGA-II ----------------------------------------------------------------------------------------------------------


class Task:
    """Costs and excesses of networks, the same array functions for both programs; remembers what it was asked."""

    def __init__(self, space: Space, objectives: int) -> None:
        rng = np.random.default_rng(5)
        width = int(space.counts.sum())
        self.space, self.objectives = space, objectives
        self.linear, self.mixed = np.sort(rng.random(width)), rng.normal(size=(width, 12)) / np.sqrt(width)
        self.macs, self.params = Macs(space), Params(space)
        probes = draw(space, 2000, rng)
        self.limits = np.quantile(self.macs(probes), 0.4), np.quantile(self.params(probes), 0.5)
        self.cost: list[Floats] = []

    def __call__(self, genes: Genes) -> tuple[Floats, Floats]:
        """Costs (N, M) and relative excesses over both limits (N, 2)."""
        onehot = self.space.onehot(genes)
        gain = onehot @ self.linear + np.tanh(onehot @ self.mixed).sum(axis=1)
        macs, params = self.macs(genes), self.params(genes)
        cost = np.stack([-gain, macs / 1e6, params / 1e6], axis=1)[:, : self.objectives]
        excess = np.stack([macs / self.limits[0] - 1, params / self.limits[1] - 1], axis=1)
        self.cost.append(cost[(excess <= 0).all(axis=1)])
        return cost, excess

    def hypervolume(self) -> float:
        """Of everything that was asked and meets the limits, up to a corner that is the same for all."""
        corner = np.array([-10.0, self.limits[0] / 1e6, self.limits[1] / 1e6])[: self.objectives]
        return hypervolume(np.concatenate(self.cost), corner)


def our_nsga2(task: Task, seed: int) -> None:
    """10,000 evaluations by this project's agent."""
    agent = Evolution(task.space, seed=seed, n_objectives=task.objectives, population=POPULATION)
    for _ in range(EVALUATIONS // POPULATION):
        genes = agent.ask(POPULATION)
        cost, excess = task(genes)
        agent.tell(genes, cost, np.maximum(excess, 0).sum(axis=1))


def pymoo_nsga2(task: Task, seed: int, evaluations: int = EVALUATIONS) -> None:
    """10,000 evaluations by pymoo, with its operators for whole numbers."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem as PymooProblem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    class Wrapped(PymooProblem):
        def _evaluate(self, x: Any, out: Any, *args: Any, **kwargs: Any) -> None:
            out["F"], out["G"] = task(task.space.canonical(x.astype(np.int8)))

    counts = task.space.counts
    problem = Wrapped(n_var=len(counts), n_obj=task.objectives, n_ieq_constr=2, xl=0, xu=counts - 1, vtype=int)
    algorithm = NSGA2(
        pop_size=POPULATION,
        sampling=IntegerRandomSampling(),
        crossover=SBX(prob=0.9, eta=3, vtype=float, repair=RoundingRepair()),
        mutation=PM(eta=3, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    minimize(problem, algorithm, ("n_eval", evaluations), seed=seed, verbose=False)


def nsga2(seeds: int) -> dict[str, Any]:
    """CPU seconds and hypervolumes, in turns."""
    space, found = load_space("ofa_mbv3_w1.0").restrict(resolution=[224]), {}
    for objectives in (2, 3):
        rows: dict[str, list[float]] = {"ours": [], "pymoo": [], "our volume": [], "pymoo volume": []}
        for seed in range(seeds):
            for name, volume, run in (("ours", "our volume", our_nsga2), ("pymoo", "pymoo volume", pymoo_nsga2)):
                task = Task(space, objectives)
                rows[name].append(timed(partial(run, task, seed))[0])
                rows[volume].append(task.hypervolume())
        found[f"{objectives} objectives"] = rows
    return found


# -- parts ------------------------------------------------------------------------------------------------------------


def rates(n: int = 20_000) -> dict[str, float]:
    """Networks a second, medians of 7."""
    space, rng = load_space("ofa_mbv3_w1.0"), np.random.default_rng(0)
    genes, others, macs = draw(space, n, rng), draw(space, n, rng), Macs(space)
    parts: dict[str, Callable[[], Any]] = {
        "sampling": lambda: draw(space, n, rng),
        "mutation": lambda: mutate(space, genes, 0.02, rng),
        "crossover": lambda: cross(genes, others, rng),
        "table of MACs": lambda: macs(genes),
        "canonical form": lambda: space.canonical(genes),
    }
    return {name: n / float(np.median([timed(part)[0] for _ in range(7)])) for name, part in parts.items()}


def main() -> None:
    """Print rates, mean ratios and hypervolumes, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ofa", type=Path)
    parser.add_argument("--pymoo", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="of the finders")
    parser.add_argument("--seeds", type=int, default=10, help="of NSGA-II")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"networks/s": rates()}
    for name, rate in found["networks/s"].items():
        print(f"{name:15} {rate:12,.0f} networks/s")
    if args.ofa:
        found["finder"] = finder(args.ofa, args.rounds)
        _show_finder(found["finder"])
    if args.pymoo:
        sys.path.append(str(args.pymoo))
        pymoo_nsga2(Task(load_space("ofa_mbv3_w1.0"), 2), 0, 2 * POPULATION)  # its imports are not timed
        found["nsga2"] = nsga2(args.seeds)
        _show_nsga2(found["nsga2"])
    print(about())
    if args.out:
        write_json(args.out, found | {"about": about()})


def _show_finder(found: dict[str, Any]) -> None:
    ratios = np.array(found["tutorial"]) / np.array(found["ours"])
    print(f"finder: tutorial {_spread(found['tutorial'])} s, ours {_spread(found['ours'])} s, ratio {_spread(ratios)}")
    print(f"  best score: tutorial {_spread(found['tutorial score'])}, ours {_spread(found['our score'])}")
    print(f"  networks that ours predicted: {_spread(found['we predicted'])}")
    library = found["library, extrapolated"]
    ratio = library / np.median(found["ours"]) if isinstance(library, float) else library
    print(f"  library's finder, extrapolated from 3 generations: {library} s, ratio {ratio}")


def _show_nsga2(found: dict[str, Any]) -> None:
    for name, rows in found.items():
        ratios = np.array(rows["pymoo"]) / np.array(rows["ours"])
        print(
            f"nsga2, {name}: ours {_spread(rows['ours'])} s, pymoo {_spread(rows['pymoo'])} s, ratio {_spread(ratios)}"
        )
        print(f"  hypervolume: ours {_spread(rows['our volume'])}, pymoo {_spread(rows['pymoo volume'])}")


def _spread(values: Any) -> str:
    return f"{np.mean(values):.4g} ± {np.std(values):.2g} (n={len(values)})"


if __name__ == "__main__":
    main()
