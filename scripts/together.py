"""What ofa-search mode=shared does for one device: processes, here and on other machines, measure one search."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from ofa.errors import UserError
from ofa.space import Genes, Space
from ofa.workers import end_with
from scripts.cli import use_threads
from scripts.parts import fitted, load_trained, objectives, searched_space
from scripts.progress import Progress
from scripts.stage import plain
from search.feasible import feasible_network
from search.problem import Problem
from search.result import RESULT, SearchResult, load_result

LOGS = "measured-*.jsonl"
OPTUNA = "search.optuna_agent.OptunaAgent"


def optuna_options(cfg: DictConfig) -> dict[str, Any]:
    """The options of the Optuna agent, whose sampler and storage the processes share; UserError where there is none."""
    for options in plain(cfg.agent).values():
        if options["_target_"] == OPTUNA:
            return dict(options)
    raise UserError("mode=shared searches by Optuna; give agent=optuna")


def together(cfg: DictConfig, device: str, space: Space, folder: Path, known: list[Path]) -> SearchResult:
    """Search with measured accuracy, this process and cfg.workers - 1 more, and all that share the storage elsewhere.

    The study's name holds a digest of the supernet and of all that is asked, so that only equal searches meet in it.
    What the logs in `known` hold is not measured again, and may be chosen.
    """
    from search.shared import create_shared, shared_result, tell_shared

    if (folder / RESULT).exists():
        return load_result(folder)
    storage, study = _place(cfg, device, folder)
    problem = Problem(fitted(cfg, space), objectives(cfg), plain(cfg.device[device].limits))
    feasible_network(space, problem)  # raises before anything is made
    create_shared(storage, study, problem)
    with _measuring(cfg, device, space, folder, known, 0) as (measured, genes):
        tell_shared(storage, study, space, measured, genes)
    with _others(cfg, device, folder, known), Progress(f"search {device} shared") as progress:
        _take_part(cfg, device, folder, known, 0, progress.update)
    found = shared_result(storage, study, space, problem, seed=cfg.seed)
    found.save(folder)
    return found


def _place(cfg: DictConfig, device: str, folder: Path) -> tuple[str, str]:
    """Where the processes meet: the storage, by default a journal in the stage's folder, and the study's name."""
    from ofa.training.trained import WEIGHTS

    options, run = optuna_options(cfg), Path(cfg.run)
    asked = [plain(cfg.device[device].limits), objectives(cfg), plain(cfg.predictor), plain(cfg.measure.images)]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for name in (f"train/{WEIGHTS[cfg.measure.weights]}", "fit/accuracy.json", "measure/latency.parquet"):
        path = run / name
        digest.update(path.read_bytes() if path.exists() else b"none")
    storage = options["storage"] or f"journal:{folder}/study.journal"
    return storage, f"{options['study']}/{device}/shared/seed-{cfg.seed}/{digest.hexdigest()[:12]}"


@contextmanager
def _others(cfg: DictConfig, device: str, folder: Path, known: list[Path]) -> Iterator[None]:
    """The other processes of this machine, on a share of its cores; they end when this one does."""
    threads = cfg.threads or max(1, len(os.sched_getaffinity(0)) // cfg.workers)
    if cfg.workers > 1:
        use_threads(threads)
    spawn, given = get_context("spawn"), (json.dumps(plain(cfg)), device, folder, known, threads, os.getpid())
    others = [spawn.Process(target=_other, args=(number, *given), daemon=True) for number in range(1, cfg.workers)]
    for other in others:
        other.start()
    try:
        yield
        for number, other in enumerate(others, start=1):
            other.join()
            if other.exitcode:
                print(f"process {number} ended with status {other.exitcode}; the others measured its share")
    finally:
        for other in others:
            other.terminate()


def _other(number: int, options: str, device: str, folder: Path, known: list[Path], threads: int, parent: int) -> None:
    end_with(parent)
    use_threads(threads)
    _take_part(OmegaConf.create(json.loads(options)), device, folder, known, number)


@contextmanager
def _measuring(
    cfg: DictConfig, device: str, space: Space, folder: Path, known: list[Path], number: int
) -> Iterator[tuple[Problem, Genes]]:
    """The problem by which process `number` measures, and the networks of the logs in `known` (K, G)."""
    from predictors.measure import SubnetAccuracy

    load, log = partial(load_trained, plain(cfg)), folder / LOGS.replace("*", str(number))
    with SubnetAccuracy(space, load, log, images=cfg.measure.images, number=number) as accuracy:
        for path in sorted(folder.glob(LOGS)):
            accuracy.know(path)
        genes = [np.empty((0, len(space.genes)), dtype=np.int8), *(accuracy.know(path) for path in known)]
        predictors, limits = fitted(cfg, space) | {"accuracy": accuracy}, plain(cfg.device[device].limits)
        yield Problem(predictors, objectives(cfg), limits, frugal=True), np.unique(np.concatenate(genes), axis=0)


def _take_part(
    cfg: DictConfig,
    device: str,
    folder: Path,
    known: list[Path],
    number: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure with the others until all is measured; each process has a log of its own."""
    from search.shared import work

    space, options, (storage, study) = searched_space(cfg), optuna_options(cfg), _place(cfg, device, folder)
    with _measuring(cfg, device, space, folder, known, number) as (problem, _):
        host = zlib.crc32(socket.gethostname().encode())
        work(
            storage,
            study,
            space,
            problem,
            cfg.search.measurements,
            sampler=options["sampler"],
            options=options["options"],
            seed=int(np.random.SeedSequence([cfg.seed, host, number]).generate_state(1)[0]),
            violation=problem.exceeds,
            progress=progress,
        )
