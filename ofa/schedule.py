"""Training schedules as data: which architectures train when, for how long, at which learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ofa.errors import UserError
from ofa.space import DIMENSIONS, Arch, Space, record

RULES = ("largest", "sandwich", "random")
TEACHERS = ("none", "inplace", "previous")
CURVES = ("cosine", "triangular")


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of training over a smaller space.

    keep: choices kept of each dimension, as `Space.restrict` takes them (`{kernel: 1}`: only the largest kernel).
    rule: "largest" trains the largest net alone; "sandwich" the largest, the smallest and `random_nets` random ones
    (Yu et al. 2020); "random" `random_nets` random ones (Cai et al. 2020).
    teacher: "inplace" distils the others from the largest net of the same step, "previous" from a frozen copy of the
    largest net as the phase found it, "none" trains on labels alone.
    """

    name: str
    epochs: float
    lr: float
    rule: str = "sandwich"
    random_nets: int = 1
    teacher: str = "inplace"
    keep: Mapping[str, int | Sequence[float]] = field(default_factory=dict)
    sort_channels: bool = False

    def __post_init__(self) -> None:
        _one_of("rule", self.rule, RULES)
        _one_of("teacher", self.teacher, TEACHERS)
        if self.epochs <= 0 or self.lr <= 0 or self.random_nets < 0:
            raise UserError(f"phase {self.name}: epochs and lr must be above 0 and random_nets at least 0")
        if self.rule != "sandwich" and self.teacher == "inplace":
            object.__setattr__(self, "teacher", "none")
        if unknown := set(self.keep) - set(DIMENSIONS):
            raise UserError(f"phase {self.name} keeps unknown {sorted(unknown)}; choose from {', '.join(DIMENSIONS)}")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Phases that follow one another, and the optimizer they share (SGD with Nesterov momentum).

    scale: multiplies the epochs of every phase.  warmup: share of a phase in which the rate rises linearly (for
    "triangular" the position of its peak).  lr is for `batch_size` images.
    """

    phases: tuple[Phase, ...]
    batch_size: int = 128
    scale: float = 1.0
    curve: str = "cosine"
    warmup: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 3e-5
    label_smoothing: float = 0.1
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        phases = tuple(p if isinstance(p, Phase) else record(Phase, p) for p in self.phases)
        object.__setattr__(self, "phases", phases)
        _one_of("curve", self.curve, CURVES)
        names = [phase.name for phase in phases]
        if not names or len(set(names)) != len(names):
            raise UserError(f"phases {names} must be at least one, each with a name of its own")
        if self.batch_size < 2 or self.scale <= 0 or not 0 <= self.warmup < 1:
            raise UserError("a schedule needs batch_size >= 2, scale > 0 and 0 <= warmup < 1")

    def steps(self, steps_per_epoch: int) -> tuple[int, ...]:
        """Optimizer steps of each phase, at least one."""
        return tuple(max(1, round(phase.epochs * self.scale * steps_per_epoch)) for phase in self.phases)

    def rate(self, phase: Phase, done: float) -> float:
        """Learning rate when a share `done` (0 to 1) of a phase has run."""
        if done < self.warmup:
            return phase.lr * (0.05 + 0.95 * done / self.warmup)
        left = (1 - done) / (1 - self.warmup)
        return phase.lr * (left if self.curve == "triangular" else (1 - math.cos(math.pi * left)) / 2)


def draw(phase: Phase, space: Space, rng: np.random.Generator, *, resolution: int) -> list[Arch]:
    """Architectures of one step, all at one resolution; a sandwich starts with its largest and smallest.

    `space` is the phase's own.  A net drawn twice is trained once.
    """
    n = 0 if phase.rule == "largest" else phase.random_nets
    archs = space.decode(space.sample(n, rng)) if n else []
    if phase.rule != "random":
        ends = [space.largest()] if phase.rule == "largest" else [space.largest(), space.smallest()]
        archs = space.decode(np.concatenate(ends)) + archs
    return list(dict.fromkeys(replace(arch, resolution=resolution) for arch in archs))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name} {value!r} is not known; choose from {', '.join(known)}")
