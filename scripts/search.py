"""ofa-search: the best subnet for each device, by each agent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, lru_cache, partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ofa.errors import UserError
from ofa.files import atomic_write, write_json, write_parquet
from ofa.space import Space, load_space
from ofa.workers import end_with
from scripts.cli import make, stage_command, use_threads
from scripts.iterate import MEASURED, iterate
from scripts.parts import SEARCH, check_devices, fitted, objectives, require_whole, searched_space
from scripts.progress import Progress
from scripts.stage import INFEASIBLE, open_stage, plain, run_id
from scripts.together import LOGS, optuna_options, together
from search.compare import curves, finals, summary
from search.feasible import InfeasibleError
from search.limits import refuse_measured, show
from search.loop import run_search
from search.problem import Problem
from search.result import SearchResult, best_result

if TYPE_CHECKING:
    import pandas as pd

MODES = ("predict", "iterate", "shared")
CHOSEN = "chosen.json"
Results = dict[tuple[str, int], SearchResult]


class OutOfReachError(UserError):
    """No network fits some of the devices; the others were searched."""


@stage_command("search", "agent", "device")
def main(cfg: DictConfig) -> None:
    """Search the space for the best network within each device's limits.  Writes <run>/search/<device>/<agent>."""
    check(cfg)
    space = searched_space(cfg)
    many = cfg.mode == "predict" and cfg.workers > 1 and len(cfg.device) * len(cfg.agent) > 1
    found_by = _side_by_side(cfg) if many else {}
    predictors = cache(partial(fitted, cfg, space))
    earlier: list[Path] = []
    infeasible = {}
    for device, settings in plain(cfg.device).items():
        folder = Path(cfg.run, "search", device)
        try:
            if cfg.mode == "iterate":
                results = _iterate(cfg, device, space, predictors, earlier)
            elif cfg.mode == "shared":
                results = _shared(cfg, device, space, earlier)
            else:
                results = {}
                for agent in cfg.agent:
                    found = found_by[device, agent] if many else _agent(cfg, device, agent, space, predictors)
                    if isinstance(found, InfeasibleError):
                        raise found
                    results |= found
        except InfeasibleError as error:  # the other devices are searched all the same
            infeasible[device] = f"{settings['name']}: {error}"
            (folder / CHOSEN).unlink(missing_ok=True)  # by an earlier search
            write_json(folder / INFEASIBLE, {"device": settings, "reason": str(error)})
            continue
        (folder / INFEASIBLE).unlink(missing_ok=True)
        write_json(folder / CHOSEN, _choose(settings, results))
        _compare(folder, settings["name"], results, cfg.seeds)
    if infeasible:
        some = len(infeasible) < len(cfg.device)
        raise (OutOfReachError if some else UserError)("; ".join(infeasible.values()))


def check(cfg: DictConfig) -> None:
    """Raise UserError for settings that would fail only after a search, name no predictor or fit no agent."""
    counts = ("evaluations", "batch", "measurements", "measure_batch")
    require_whole(cfg, "seeds", "workers", *(f"search.{name}" for name in counts))
    require_whole(cfg, "search.stall", null=True)
    if cfg.mode not in MODES:
        raise UserError(f"mode={cfg.mode} is not known; choose from {', '.join(MODES)}")
    if cfg.mode != "predict" and cfg.seeds > 1:
        raise UserError(f"mode={cfg.mode} measures for one seed, not seeds={cfg.seeds}; give each seed a run=<folder>")
    if cfg.mode == "shared":
        optuna_options(cfg)
    check_devices(cfg)
    for settings in plain(cfg.device).values():
        predictors: Any = dict.fromkeys(cfg.predictor)  # which are not asked yet
        problem = Problem(predictors, objectives(cfg), settings["limits"])
        if cfg.mode != "predict":
            refuse_measured(problem.bounds, ["accuracy"])
            if "accuracy" not in problem.objectives:
                names = ",".join(problem.objectives)
                raise UserError(f"mode={cfg.mode} measures accuracy, which objectives=[{names}] leaves out; add it")
    space = load_space(plain(cfg.space))
    for settings in cfg.agent.values():
        own = {"storage": None} if "storage" in settings else {}  # there a new agent would begin its study anew
        make(settings, space, n_objectives=len(objectives(cfg)), **own)


def _iterate(
    cfg: DictConfig, device: str, space: Space, predictors: Callable[[], dict[str, Any]], earlier: list[Path]
) -> Results:
    """What measuring the most promising networks finds; its log joins the `earlier` ones."""
    with open_stage(cfg, f"search/{device}/iterate", (*SEARCH, f"device.{device}"), needs=("fit",)) as stage:
        limits = plain(cfg.device[device].limits)
        found = iterate(cfg, predictors(), limits, space, stage.folder, earlier)
        earlier.append(stage.folder / MEASURED)
    return {("iterate", cfg.seed): found}


def _shared(cfg: DictConfig, device: str, space: Space, earlier: list[Path]) -> Results:
    """What several processes measure together; their logs join the `earlier` ones."""
    with open_stage(cfg, f"search/{device}/shared", (*SEARCH, f"device.{device}"), needs=("fit",)) as stage:
        found = together(cfg, device, space, stage.folder, [Path(cfg.run, "measure", "subnets.jsonl"), *earlier])
        earlier.extend(sorted(stage.folder.glob(LOGS)))
    return {("shared", cfg.seed): found}


def _agent(cfg: DictConfig, device: str, agent: str, space: Space, predictors: Callable[[], dict[str, Any]]) -> Results:
    """What one agent finds for one device, with every seed."""
    reads, results = (*SEARCH, f"agent.{agent}", f"device.{device}"), {}
    with open_stage(cfg, f"search/{device}/{agent}", reads, needs=("fit",)) as stage:
        problem = Problem(predictors(), objectives(cfg), plain(cfg.device[device].limits))
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            folder = stage.folder if seed == cfg.seed else stage.folder / f"seed-{seed}"
            results[agent, seed] = _search(cfg, device, agent, seed, problem, space, folder)
    return results


def _side_by_side(cfg: DictConfig) -> dict[tuple[str, str], Results | InfeasibleError]:
    """What each device's agents find, or that none can, by device and agent, in processes of their own."""
    options = json.dumps(plain(cfg))
    jobs = [(options, str(device), str(agent)) for agent in reversed(list(cfg.agent)) for device in cfg.device]
    for agent in plain(cfg.agent).values():
        if agent.get("storage"):  # two processes at once cannot make a database's tables
            from search.storage import opened

            with opened(agent["storage"]):
                pass
    workers = min(cfg.workers, len(jobs))
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with, initargs=(os.getpid(),)) as pool:
        futures = {pool.submit(_job, *job): job[1:] for job in jobs}
        try:
            return {futures[done]: done.result() for done in as_completed(futures)}
        except BaseException:
            for child in active_children():
                child.terminate()  # as if this process had been stopped: what they logged stays
            raise


def _job(options: str, device: str, agent: str) -> Results | InfeasibleError:
    try:
        return _agent(_loaded(options)[0], device, agent, *_loaded(options)[1:])
    except InfeasibleError as error:
        return error


@lru_cache(maxsize=1)
def _loaded(options: str) -> tuple[DictConfig, Space, Callable[[], dict[str, Any]]]:
    """Configuration, space and predictors, which a process makes once for all its jobs."""
    use_threads(1)
    cfg = OmegaConf.create(json.loads(options))
    space = searched_space(cfg)
    return cfg, space, cache(partial(fitted, cfg, space))


def _search(
    cfg: DictConfig, device: str, agent: str, seed: int, problem: Problem, space: Space, folder: Path
) -> SearchResult:
    settings = plain(cfg.agent[agent])
    own = {}
    if "study" in settings:
        own = {"study": f"{settings['study']}/{device}/{agent}/seed-{seed}", "owner": run_id(cfg.run)}
    strategy = make(cfg.agent[agent], space, seed=seed, n_objectives=len(problem.objectives), **own)
    if hasattr(strategy, "violation") and "accuracy" not in problem.bounds:
        strategy.violation = problem.exceeds  # all other limits are of sums and maxima over layers, cheap to look up
    size = cfg.search.evaluations, cfg.search.batch
    with Progress(f"search {device} {agent}" + (f" seed {seed}" if cfg.seeds > 1 else "")) as progress:
        result = run_search(strategy, problem, *size, folder=folder, progress=partial(_show, progress))
        if (count := len(result.evaluations)) < min(cfg.search.evaluations, space.size):
            progress.print(f"{agent} proposed no other networks after {count} of {cfg.search.evaluations}")
        return result


def _show(progress: Progress, done: int, total: int, best: dict[str, float]) -> None:
    progress.update(done, total, **best)


def _choose(device: dict[str, Any], results: Results) -> dict[str, Any]:
    """The best network that any agent found, and what the predictors say of it."""
    (agent, _), result = list(results.items())[best_result(list(results.values()))]
    found = result.describe([result.chosen])[0]
    name = "accuracy" if "accuracy" in found["values"] else next(iter(result.objectives))
    word = "measured" if name in result.measured else "predicted"
    print(f"{device['name']}: {agent} found {found['arch']}, {word} {name} {show(found['values'][name])}")
    limited = device | {"limits": result.limits}  # as numbers, in the units of their names
    chosen = {"device": limited, "agent": agent, "arch": found["arch"], "predicted": found["values"]}
    if "accuracy_int8" in found["values"]:
        from ofa.report.summary import ranking_text

        chosen["ranking"] = ranking(result)
        print(f"  {ranking_text(chosen['ranking'])}")
    return chosen


def ranking(result: SearchResult) -> dict[str, Any]:
    """How int8 ranks the feasible networks of a search against their float accuracy: Kendall's tau, and the best."""
    from predictors.scores import kendall_tau

    feasible = result.evaluations[result.evaluations["violation"] <= 0]
    order = feasible.sort_values("accuracy", ascending=False, kind="stable")
    best = int(feasible["accuracy_int8"].to_numpy().argmax())
    place = 1 + list(order.index).index(feasible.index[best])
    tau = kendall_tau(feasible["accuracy_int8"], feasible["accuracy"]) if len(feasible) > 1 else 1.0
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
