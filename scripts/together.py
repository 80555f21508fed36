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
from ofa.space import Space
from ofa.workers import end_with
from scripts.cli import use_threads
from scripts.parts import fitted, load_trained, objectives, searched_space
from scripts.progress import Progress
from scripts.stage import plain
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
    It does not measure again what the logs in `known` hold.
    """
    from search.shared import create_shared, shared_result

    if (folder / RESULT).exists():
        return load_result(folder)
    storage, study = _place(cfg, device, folder)
    with _measured(cfg, device, space, folder, 0, known) as problem:
        create_shared(storage, study, problem)
        with _others(cfg, device, folder, known), Progress(f"search {device} shared") as progress:
            _work(cfg, device, space, folder, 0, problem, progress.update)
        found = shared_result(storage, study, space, problem)
    found.save(folder)
    return found


def _place(cfg: DictConfig, device: str, folder: Path) -> tuple[str, str]:
    """Where the processes meet: the storage, by default a journal in the stage's folder, and the study's name."""
    options, run = optuna_options(cfg), Path(cfg.run)
    asked = [plain(cfg.device[device].limits), objectives(cfg), plain(cfg.predictor), plain(cfg.measure.images)]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for path in sorted([*run.glob("train/*.safetensors"), run / "fit/accuracy.json", run / "measure/latency.parquet"]):
        digest.update(path.read_bytes() if path.exists() else b"")
    storage = options["storage"] or f"journal:{folder}/study.journal"
    return storage, f"{options['study']}/{device}/shared/seed-{cfg.seed}/{digest.hexdigest()[:12]}"


@contextmanager
def _measured(
    cfg: DictConfig, device: str, space: Space, folder: Path, number: int, known: list[Path]
) -> Iterator[Problem]:
    """The problem of one of the processes, whose accuracies are measured, with a log of its own."""
    from predictors.measure import SubnetAccuracy

    load, log = partial(load_trained, plain(cfg)), folder / LOGS.replace("*", str(number))
    with SubnetAccuracy(space, load, log, images=cfg.measure.images) as accuracy:
        for path in (*known, *sorted(folder.glob(LOGS))):
            accuracy.know(path)
        limits = plain(cfg.device[device].limits)
        yield Problem(fitted(cfg, space) | {"accuracy": accuracy}, objectives(cfg), limits, frugal=True)


@contextmanager
def _others(cfg: DictConfig, device: str, folder: Path, known: list[Path]) -> Iterator[None]:
    """The other processes of this machine, on a share of its cores; they end when this one does."""
    threads = cfg.threads or max(1, len(os.sched_getaffinity(0)) // cfg.workers)
    if cfg.workers > 1:
        use_threads(threads)
    given = (json.dumps(plain(cfg)), device, str(folder), list(map(str, known)), threads, os.getpid())
    spawn = get_context("spawn")
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


def _other(number: int, options: str, device: str, folder: str, known: list[str], threads: int, parent: int) -> None:
    end_with(parent)
    use_threads(threads)
    cfg = OmegaConf.create(json.loads(options))
    space = searched_space(cfg)
    with _measured(cfg, device, space, Path(folder), number, list(map(Path, known))) as problem:
        _work(cfg, device, space, Path(folder), number, problem, lambda done, total: None)


def _work(
    cfg: DictConfig,
    device: str,
    space: Space,
    folder: Path,
    number: int,
    problem: Problem,
    progress: Callable[[int, int], None],
) -> None:
    from search.shared import work

    options, (storage, study) = optuna_options(cfg), _place(cfg, device, folder)
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
