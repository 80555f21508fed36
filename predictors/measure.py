"""Measure what the predictors learn from: accuracy of subnets on validation images.  N architectures, G genes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.files import append_jsonl, atomic_write, read_jsonl
from ofa.space import Arch, Genes, Space
from ofa.workers import end_with

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.supernet import Supernet

Load = Callable[[int], "State"]
Report = Callable[[dict[str, Any]], None]
State = tuple["Supernet", "ImageData"]
_worker: list[State] = []  # what a worker process holds


class SubnetAccuracy:
    """Top-1 (0 to 1) of a supernet's subnets on validation images: genes (N, G) to (N,), each measured once.

    Every result is appended to the log at `path` as it comes, {"arch", "accuracy"}, so a run that was killed goes on
    where it was.  load: gives the supernet and the data to the process of that number, which is this one, `number`, or
    one of `workers` others (then it must be picklable).  images: validation images (None: all).  calibration: images
    for batch-norm statistics.  int8: after 8-bit quantization, simulated, without training.  total: networks of all
    calls together, which `report` is told of (None: of each call).  Use it as a context, which ends the workers.
    """

    def __init__(
        self,
        space: Space,
        load: Load,
        path: Path,
        *,
        images: int | None = None,
        calibration: int = 1024,
        int8: bool = False,
        workers: int = 1,
        number: int = 0,
        total: int | None = None,
        report: Report = lambda values: None,
    ):
        if workers < 1:
            raise UserError(f"workers={workers} must be at least 1, the process that measures")
        self.space, self.load, self.path, self.workers, self.number = space, load, path, workers, number
        self.total, self.report = total, report
        self.options = {"images": images, "calibration": calibration, "int8": int8}
        self.known = {Arch.from_dict(row["arch"]): float(row["accuracy"]) for row in read_jsonl(path)}
        self._pool: ProcessPoolExecutor | None = None
        self._state: State | None = None

    def know(self, path: Path) -> Genes:
        """Take over what another log holds, so that it is not measured again: the genes of its networks (K, G)."""
        rows = {Arch.from_dict(row["arch"]): float(row["accuracy"]) for row in read_jsonl(path)}
        self.known |= rows
        return self.space.encode(list(rows))

    def __enter__(self) -> Self:
        """The measurer itself; workers start with the first call."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the workers; what they have not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, genes: Genes) -> NDArray[np.float64]:
        """Accuracy of each architecture, measured now where the log does not have it."""
        archs = self.space.decode(genes)
        missing = list(dict.fromkeys(arch for arch in archs if arch not in self.known))
        total = self.total or len(archs)
        done = len(self.known) if self.total else len(archs) - len(missing)
        for arch, top1 in self._measure(missing):
            append_jsonl(self.path, {"arch": arch.to_dict(), "accuracy": top1})
            self.known[arch] = top1
            done += 1
            self.report({"step": done, "steps": total, "accuracy": top1})
        return np.array([self.known[arch] for arch in archs])

    def _measure(self, archs: list[Arch]) -> Iterator[tuple[Arch, float]]:
        """Each architecture with its accuracy, in the order in which they are done."""
        if self.workers == 1 or not archs:
            for arch in archs:
                self._state = self._state or self.load(self.number)
                yield arch, _measure_one(arch, self.options, self._state)
            return
        if self._pool is None:
            context = get_context("spawn")
            numbers = context.SimpleQueue()
            for number in range(self.workers):
                numbers.put(number)
            given = (self.load, self.workers, os.getpid(), numbers)
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker, initargs=given)
        futures = {self._pool.submit(_measure_one, arch, self.options): arch for arch in archs}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def settle(self, genes: Genes) -> None:
        """Write the log anew in the order of `genes`, in which one worker would have measured them."""
        rows = [{"arch": arch.to_dict(), "accuracy": self.known[arch]} for arch in self.space.decode(genes)]
        atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def _start_worker(load: Load, workers: int, parent: int, numbers: SimpleQueue[int]) -> None:
    """Load everything once, on a share of the cores, and end with the process that started this one."""
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    end_with(parent)
    _worker.append(load(numbers.get()))


def _measure_one(arch: Arch, options: Mapping[str, Any], state: State | None = None) -> float:
    from ofa.evaluate import accuracy, specialise

    supernet, data = state or _worker[0]
    net = specialise(supernet, arch, data, images=options["calibration"])
    if options["int8"]:
        from ofa.compress.chain import Work
        from ofa.compress.linear import Linear

        quantized = Linear()(net, Work(data, arch.resolution))
        return accuracy(quantized, data, "val", resolution=arch.resolution, limit=options["images"])
    return accuracy(net, data, "val", resolution=arch.resolution, limit=options["images"])


def read_measured(path: Path, space: Space, value: str) -> tuple[Genes, np.ndarray]:
    """Genes (N, G) and measured values (N,) of a log that `SubnetAccuracy` or a latency measurement wrote."""
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path} holds no measured network; run ofa-measure first")
    most, rule = (1.0, "a share, 0 to 1") if value == "accuracy" else (sys.float_info.max, "finite and at least 0")
    for number, row in enumerate(rows, 1):
        if not 0 <= row[value] <= most:
            raise UserError(f"{path}, row {number}: {value} {row[value]} must be {rule}; mend the row or remove it")
    return space.encode([Arch.from_dict(row["arch"]) for row in rows]), np.array([row[value] for row in rows])
