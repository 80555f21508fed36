"""Measure what the predictors learn from: accuracy of subnets on validation images.  N architectures, G genes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ofa.errors import UserError
from ofa.files import append_jsonl, read_jsonl
from ofa.space import Arch, Genes, Space

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.supernet import Supernet


def choose_subnets(space: Space, n: int, seed: int) -> Genes:
    """The smallest, the largest and n - 2 different random architectures: (n, G), fewer where the space is smaller."""
    rng = np.random.default_rng((seed, 4))
    drawn = np.concatenate([space.smallest(), space.largest(), space.sample(4 * n, rng)])
    first = np.unique(drawn, axis=0, return_index=True)[1]
    return drawn[np.sort(first)[:n]]


def measure_accuracy(
    supernet: Supernet,
    genes: Genes,
    data: ImageData,
    path: Path,
    *,
    images: int | None = None,
    calibration: int = 1024,
    report: Callable[[dict[str, Any]], None] = lambda values: None,
) -> None:
    """Top-1 on `images` validation images (None: all) of each architecture that the log at `path` lacks.

    Each result is appended as it comes, {"arch", "accuracy"}, so a run that was killed goes on where it was.
    """
    from ofa.evaluate import accuracy, specialise

    done = {Arch.from_dict(row["arch"]) for row in read_jsonl(path)}
    archs = supernet.space.decode(genes)
    for i, arch in enumerate(archs, 1):
        if arch not in done:
            net = specialise(supernet, arch, data, images=calibration)
            top1 = accuracy(net, data, "val", resolution=arch.resolution, limit=images)
            append_jsonl(path, {"arch": arch.to_dict(), "accuracy": top1})
            report({"step": i, "steps": len(archs), "accuracy": top1})


def read_measured(path: Path, space: Space, value: str) -> tuple[Genes, np.ndarray]:
    """Genes (N, G) and measured values (N,) of a log that `measure_accuracy` or a latency measurement wrote."""
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path} holds no measured network; run ofa-measure first")
    return space.encode([Arch.from_dict(row["arch"]) for row in rows]), np.array([row[value] for row in rows])
