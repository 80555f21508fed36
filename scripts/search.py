"""ofa-search: the best subnet for each device, by each agent."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache, partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ofa.errors import UserError
from ofa.files import atomic_write, write_json, write_parquet
from ofa.space import Space
from scripts.cli import make, stage_command, use_threads
from scripts.iterate import MEASURED, iterate
from scripts.parts import SEARCH, fitted, objectives, searched_space
from scripts.progress import Progress
from scripts.stage import note, open_stage, plain
from search.compare import curves, finals, summary
from search.loop import run_search
from search.problem import Problem
from search.result import SearchResult, best_result

if TYPE_CHECKING:
    import pandas as pd

MODES = ("predict", "iterate")
Results = dict[tuple[str, int], SearchResult]


@stage_command("search", "agent", "device")
def main(cfg: DictConfig) -> None:
    """Search the space for the best network within each device's limits.  Writes <run>/search/<device>/<agent>."""
    space = searched_space(cfg)
    note(cfg.run, devices=list(cfg.device))
    seeds = cfg.seeds
    if not isinstance(seeds, int) or seeds < 1:
        raise UserError(f"seeds={seeds} must be a whole number, 1 or more")
    if cfg.mode not in MODES:
        raise UserError(f"mode={cfg.mode} is not known; choose from {', '.join(MODES)}")
    if not isinstance(cfg.workers, int) or cfg.workers < 1:
        raise UserError(f"workers={cfg.workers} must be at least 1, the process itself")
    many = cfg.mode == "predict" and cfg.workers > 1 and len(cfg.device) * len(cfg.agent) > 1
    found_by = _side_by_side(cfg) if many else {}
    predictors: dict[str, Any] = {}
    earlier: list[Path] = []
    for device, settings in plain(cfg.device).items():
        results: Results = {}
        if cfg.mode == "iterate":
            reads: tuple[str, ...] = (*SEARCH, f"device.{device}")
            with open_stage(cfg, f"search/{device}/iterate", reads, needs=("fit",)) as stage:
                predictors = predictors or fitted(cfg, space)
                found = iterate(cfg, predictors, settings["limits"], space, stage.folder, earlier)
                results["iterate", cfg.seed] = found
                earlier.append(stage.folder / MEASURED)
        for agent in cfg.agent if cfg.mode == "predict" else ():
            if not many:
                predictors = predictors or fitted(cfg, space)
                found_by[device, agent] = _agent(cfg, device, agent, space, predictors)
            results |= found_by[device, agent]
        write_json(Path(cfg.run, "search", device, "chosen.json"), _choose(settings, results))
        _compare(Path(cfg.run, "search", device), settings["name"], results, seeds)


def _agent(cfg: DictConfig, device: str, agent: str, space: Space, predictors: dict[str, Any]) -> Results:
    """What one agent finds for one device, with every seed."""
    reads, results = (*SEARCH, f"agent.{agent}", f"device.{device}"), {}
    with open_stage(cfg, f"search/{device}/{agent}", reads, needs=("fit",)) as stage:
        problem = Problem(predictors, objectives(cfg), plain(cfg.device[device].limits))
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            folder = stage.folder if seed == cfg.seed else stage.folder / f"seed-{seed}"
            title = f"search {device} {agent}" + (f" seed {seed}" if cfg.seeds > 1 else "")
            results[agent, seed] = _search(cfg, agent, seed, problem, space, folder, title)
    return results


def _side_by_side(cfg: DictConfig) -> dict[tuple[str, str], Results]:
    """What each device's agents find, by device and agent, in processes of their own."""
    options = json.dumps(plain(cfg))
    jobs = [(options, str(device), str(agent)) for agent in reversed(list(cfg.agent)) for device in cfg.device]
    with ProcessPoolExecutor(min(cfg.workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_job, *job): job[1:] for job in jobs}
        try:
            return {futures[done]: done.result() for done in as_completed(futures)}
        except BaseException:
            for child in active_children():
                child.terminate()  # as if this process had been stopped: what they logged stays
            raise


def _job(options: str, device: str, agent: str) -> Results:
    return _agent(_loaded(options)[0], device, agent, *_loaded(options)[1:])


@lru_cache(maxsize=1)
def _loaded(options: str) -> tuple[DictConfig, Space, dict[str, Any]]:
    """Configuration, space and predictors, which a process makes once for all its jobs."""
    use_threads(1)
    cfg = OmegaConf.create(json.loads(options))
    space = searched_space(cfg)
    return cfg, space, fitted(cfg, space)


def _search(
    cfg: DictConfig, agent: str, seed: int, problem: Problem, space: Space, folder: Path, title: str
) -> SearchResult:
    strategy = make(cfg.agent[agent], space, seed=seed, n_objectives=len(problem.objectives))
    if hasattr(strategy, "violation") and "accuracy" not in problem.bounds:
        strategy.violation = problem.exceeds  # all other limits are of sums and maxima over layers, cheap to look up
    size = cfg.search.evaluations, cfg.search.batch
    with Progress(title) as progress:
        return run_search(strategy, problem, *size, folder=folder, progress=partial(_show, progress))


def _show(progress: Progress, done: int, total: int, best: dict[str, float]) -> None:
    progress.update(done, total, **best)


def _choose(device: dict[str, Any], results: Results) -> dict[str, Any]:
    """The best network that any agent found, and what the predictors say of it."""
    (agent, _), result = list(results.items())[best_result(list(results.values()))]
    found = result.describe([result.chosen])[0]
    top1 = found["values"]["accuracy"]
    word = "measured" if agent == "iterate" else "predicted"
    print(f"{device['name']}: {agent} found {found['arch']}, {word} accuracy {top1:.4f}")
    limited = device | {"limits": result.limits}  # as numbers, in the units of their names
    chosen = {"device": limited, "agent": agent, "arch": found["arch"], "predicted": found["values"]}
    if "accuracy_int8" in found["values"]:
        from ofa.report.summary import ranking_text

        chosen["ranking"] = ranking(result)
        print(f"  {ranking_text(chosen['ranking'])}")
    return chosen


def ranking(result: SearchResult) -> dict[str, Any]:
    """How int8 ranks the feasible networks of a search against their float accuracy: Kendall's tau, and the best."""
    from scipy.stats import kendalltau

    feasible = result.evaluations[result.evaluations["violation"] <= 0]
    order = feasible.sort_values("accuracy", ascending=False, kind="stable")
    best = int(feasible["accuracy_int8"].to_numpy().argmax())
    place = 1 + list(order.index).index(feasible.index[best])
    tau = float(kendalltau(feasible["accuracy"], feasible["accuracy_int8"]).statistic) if len(feasible) > 1 else 1.0
    return {"networks": len(feasible), "kendall_tau": tau, "float_rank_of_best_int8": place, "changed": place > 1}


def _compare(folder: Path, device: str, results: Results, seeds: int) -> None:
    """Write compare.parquet, compare.json and compare.svg: what each agent and seed reaches, and how fast."""
    table = curves(results)
    write_parquet(folder / "compare.parquet", table)
    write_json(folder / "compare.json", {"device": device, "searches": finals(results).to_dict("records")})
    atomic_write(folder / "compare.svg", _plot(table, device))
    if seeds > 1:
        print("\n".join([f"{device}, mean and spread over {seeds} seeds", *summary(results)]))


def _plot(table: pd.DataFrame, device: str) -> str:
    """Hypervolume against evaluations as SVG: the mean of each agent, and all its seeds between the edges of a band."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for agent, rows in table.groupby("agent"):
        volume = rows.groupby("evaluations")["hypervolume"].agg(["mean", "min", "max"])
        axes.plot(volume.index, volume["mean"], label=str(agent))
        axes.fill_between(volume.index, volume["min"], volume["max"], alpha=0.2)
    axes.set(xlabel="networks evaluated", ylabel="hypervolume", title=device)
    axes.legend()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


if __name__ == "__main__":
    main()
