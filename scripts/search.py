"""ofa-search: the best subnet for each device, by each agent."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ofa.files import write_json
from ofa.space import Space
from scripts.cli import make, stage_command
from scripts.parts import SEARCH, fitted, load_parts
from scripts.progress import Progress
from scripts.stage import note, open_stage, plain
from search.loop import run_search
from search.problem import Problem
from search.result import SearchResult, best_result


@stage_command("search", "agent", "device")
def main(cfg: DictConfig) -> None:
    """Search the space for the best network within each device's limits.  Writes <run>/search/<device>/<agent>."""
    _, space = load_parts(cfg)
    note(cfg.run, devices=list(cfg.device))
    predictors: dict[str, Any] = {}
    for device, settings in plain(cfg.device).items():
        results = {}
        for agent in cfg.agent:
            reads = (*SEARCH, f"agent.{agent}", f"device.{device}")
            with open_stage(cfg, f"search/{device}/{agent}", reads, needs=("fit",)) as stage:
                predictors = predictors or fitted(cfg, space)
                problem = Problem(predictors, plain(cfg.search.objectives), settings["limits"])
                results[agent] = _search(cfg, agent, problem, space, stage.folder, f"search {device} {agent}")
        write_json(Path(cfg.run, "search", device, "chosen.json"), _choose(settings, results))


def _search(cfg: DictConfig, agent: str, problem: Problem, space: Space, folder: Path, title: str) -> SearchResult:
    strategy = make(cfg.agent[agent], space, seed=cfg.seed, n_objectives=len(problem.objectives))
    size = cfg.search.evaluations, cfg.search.batch
    with Progress(title) as progress:
        return run_search(strategy, problem, *size, folder=folder, progress=partial(_show, progress))


def _show(progress: Progress, done: int, total: int, best: dict[str, float]) -> None:
    progress.update(done, total, **best)


def _choose(device: dict[str, Any], results: dict[str, SearchResult]) -> dict[str, Any]:
    """The best network that any agent found, and what the predictors say of it."""
    agent, result = list(results.items())[best_result(list(results.values()))]
    found = result.describe([result.chosen])[0]
    top1 = found["values"]["accuracy"]
    print(f"{device['name']}: {agent} found {found['arch']}, predicted accuracy {top1:.4f}")
    limited = device | {"limits": result.limits}  # as numbers, in the units of their names
    return {"device": limited, "agent": agent, "arch": found["arch"], "predicted": found["values"]}


if __name__ == "__main__":
    main()
