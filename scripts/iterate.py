"""What ofa-search mode=iterate does for one device: measure the most promising networks, fit, choose again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from ofa.files import read_json, write_json
from ofa.space import Space
from scripts.parts import learner, load_trained, objectives
from scripts.progress import Progress
from scripts.stage import plain
from search.feasible import feasible_network
from search.loop import run_search
from search.model_based import ModelBased
from search.problem import Problem
from search.result import SearchResult

MEASURED = "measured.jsonl"
START = "start.json"  # genes of the networks that were measured before


def iterate(
    cfg: DictConfig, predictors: dict[str, Any], limits: dict[str, Any], space: Space, folder: Path, earlier: list[Path]
) -> SearchResult:
    """Search with measured accuracy: the predictor only proposes (Cummings et al. 2022, LINAS).

    It starts from what ofa-measure and the `earlier` searches measured, and keeps its own measurements in `folder`.
    """
    from predictors.measure import SubnetAccuracy

    options, model = cfg.search, partial(learner(cfg, space), seed=cfg.seed)
    load, log = partial(load_trained, plain(cfg)), folder / MEASURED
    with (
        Progress(f"search {folder.parent.name} iterate") as progress,
        SubnetAccuracy(space, load, log, images=cfg.measure.images, workers=cfg.workers) as accuracy,
    ):
        problem = Problem(predictors | {"accuracy": accuracy}, objectives(cfg), limits)
        pool = [accuracy.know(path) for path in (Path(cfg.run, "measure", "subnets.jsonl"), *earlier)]
        feasible_network(space, problem, np.concatenate(pool))  # raises before anything is made
        start = folder / START
        if not start.exists():  # the log is of this start, whatever later commands search before
            write_json(start, np.unique(np.concatenate(pool), axis=0).tolist())
        initial = np.array(read_json(start), dtype=np.int8).reshape(-1, len(space.genes))
        agent = ModelBased(space, model=model, problem=problem, seed=cfg.seed)
        found = run_search(
            agent,
            problem,
            len(initial) + options.measurements,
            options.measure_batch,
            folder=folder,
            initial=initial,
            stall=options.stall,
            progress=lambda done, total, best: progress.update(done - len(initial), options.measurements, **best),
        )
        count = len(found.evaluations) - len(initial)
        if count < options.measurements and len(found.evaluations) < space.size:
            stalled = f"the last {options.stall} batches added no hypervolume (search.stall)"
            progress.print(f"ended after {count} of {options.measurements} measurements: {stalled}")
        return found
