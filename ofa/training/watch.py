"""How good the supernet's nets are while it trains, and whether one of them collapsed."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ofa.errors import UserError
from ofa.evaluate import accuracy, specialise
from ofa.kinds import check_fields
from ofa.parallel import World
from ofa.space import Arch, Space

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.supernet import Supernet


ERRORS = 3  # standard errors of a difference of accuracies that may be luck
LEARNED, ABOVE = 0.3, 0.05  # of the images that chance would miss: what a net was right for that had learned, and begun


@dataclass(frozen=True, slots=True)
class Watch:
    """What each epoch's log measures: `random_nets` fixed random nets besides the largest and the smallest.

    images: validation images used (None: all).  calibration: images for batch-norm statistics.
    """

    random_nets: int = 2
    images: int | None = 2000
    calibration: int = 1024

    def __post_init__(self) -> None:
        check_fields(self)
        if self.calibration < 2:
            raise UserError(f"watch.calibration is {self.calibration}; give at least 2 images, 1024 is usual")
        if self.random_nets < 0 or (self.images is not None and self.images < 1):
            given = f"watch.random_nets is {self.random_nets}, watch.images {self.images}"
            raise UserError(f"{given}; give at least 0 nets, and 1 image or null for all")

    def nets(self, space: Space) -> dict[str, Arch]:
        """The watched architectures by name; the random ones are the same in every run."""
        drawn = space.decode(space.sample(self.random_nets, np.random.default_rng(1)))
        ends = {"largest": space.decode(space.largest())[0], "smallest": space.decode(space.smallest())[0]}
        return ends | {f"random_{i}": arch for i, arch in enumerate(drawn)}

    def validate(self, supernet: Supernet, data: ImageData, world: World | None = None) -> dict[str, float]:
        """Top-1 accuracy (0 to 1) of each watched net on validation images, batch norm recalibrated.

        The processes of a world measure a part of the nets each.
        """
        world, nets, scores = world or World(), self.nets(supernet.space), {}
        for name, arch in list(nets.items())[world.rank :: world.size]:
            net = specialise(supernet, arch, data, images=self.calibration)
            scores[name] = accuracy(net, data, "val", resolution=arch.resolution, limit=self.images)
        return world.merged(scores, nets)


def collapsed(val: Mapping[str, float], log: Iterable[Mapping[str, Any]], chance: float, images: int) -> list[str]:
    """Nets that had learned and fell below half the accuracy above chance that they once had, and not by luck.

    A net had learned once it was right for `LEARNED` of the images that chance would miss.

    val: their accuracies now, of so many images.  log: the lines of earlier epochs, each with its own "val".  chance:
    the accuracy of guessing, see `ImageData.guessing`.
    """
    lines = list(log)
    best = {name: max((line["val"].get(name, 0.0) for line in lines), default=0.0) for name in val}
    learned = {name: top for name, top in best.items() if top - chance > LEARNED * (1 - chance)}
    error = {name: math.sqrt((top * (1 - top) + val[name] * (1 - val[name])) / images) for name, top in learned.items()}
    fell = [name for name, top in learned.items() if val[name] - chance < (top - chance) / 2]
    return [name for name in fell if learned[name] - val[name] > ERRORS * error[name]]


def diverged(val: Mapping[str, float], loss: float, classes: int, chance: float) -> bool:
    """Whether an epoch's mean loss is more than twice that of guessing, ln(classes), and no net is above chance.

    So a rate that is too high often ends where batch norm keeps every number finite.  val: accuracies of nets, 0 to 1.
    """
    return loss > 2 * math.log(classes) and at_chance(max(val.values()), chance)


def at_chance(accuracy: float, chance: float) -> bool:
    """Whether an accuracy (0 to 1) is next to that of guessing."""
    return accuracy - chance < ABOVE * (1 - chance)


def memory(device: torch.device) -> dict[str, int]:
    """Most memory that this process has held so far, in bytes: "peak_rss_bytes", on a GPU also "gpu_memory_bytes"."""
    found = {"peak_rss_bytes": peak_rss()}
    return found | ({"gpu_memory_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})


def peak_rss() -> int:
    """Most memory that this process has held so far, in bytes.

    From Linux's own count where there is one: that of getrusage starts at the peak of the parent process.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
