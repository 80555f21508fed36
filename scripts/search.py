"""ofa-search: the best subnet for each device, by each agent."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ofa.files import write_json
from scripts.cli import make, stage_command
from scripts.parts import SEARCH, fitted, load_parts, plain
from scripts.progress import Progress
from scripts.stage import open_stage
from search.loop import run_search
from search.problem import Problem
from search.result import SearchResult, best_result


@stage_command("search", "agent", "device")
def main(cfg: DictConfig) -> None:
    """Search the space for the best network within each device's limits.  Writes <run>/search/<device>/<agent>."""
    _, space = load_parts(cfg)
    predictors: dict[str, Any] = {}
    for device, settings in plain(cfg.device).items():
        results = {}
        for agent in cfg.agent:
            reads = (*SEARCH, f"agent.{agent}", f"device.{device}")
            with open_stage(cfg, f"search/{device}/{agent}", reads, needs=("fit",)) as stage:
                predictors = predictors or fitted(cfg, space)
                problem = Problem(predictors, plain(cfg.search.objectives), settings["limits"])
                with Progress(f"search {device} {agent}") as progress:
                    results[agent] = run_search(
                        make(cfg.agent[agent], space, seed=cfg.seed, n_objectives=len(problem.objectives)),
                        problem,
                        cfg.search.evaluations,
                        cfg.search.batch,
                        folder=stage.folder,
                        progress=partial(_show, progress),
                    )
        write_json(Path(cfg.run, "search", device, "chosen.json"), _choose(settings, results))


def _show(progress: Progress, done: int, total: int, best: dict[str, float]) -> None:
    progress.update(done, total, **best)


def _choose(device: dict[str, Any], results: dict[str, SearchResult]) -> dict[str, Any]:
    """The best network that any agent found, and what the predictors say of it."""
    names = list(results)
    best = best_result(list(results.values()))
    assert best is not None, "the check before the search found a feasible network"
    result = results[names[best]]
    assert result.chosen is not None
    found = result.describe([result.chosen])[0]
    top1 = found["values"]["accuracy"]
    print(f"{device['name']}: {names[best]} found {found['arch']}, predicted accuracy {top1:.4f}")
    return {"device": device, "agent": names[best], "arch": found["arch"], "predicted": found["values"]}


if __name__ == "__main__":
    main()
