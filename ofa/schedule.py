"""Training schedules as data: which architectures train when, for how long, at which learning rate.  Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ofa.errors import UserError
from ofa.kinds import check_fields
from ofa.records import records
from ofa.space import DIMENSIONS, Arch, Space

if TYPE_CHECKING:
    from ofa.distill import Distillation

RULES = ("largest", "sandwich", "random", "fixed")
TEACHERS = ("none", "inplace", "previous", "full")
PREFERENCES = ("none", "best", "worst")
COUPLED = ("kernel", "expand")
CURVES = ("cosine", "triangular", "exponential")


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of training over a smaller space.

    name: letters, digits, _ and -, as files are named after it.
    keep: choices kept of each dimension, as `Space.restrict` takes them (`{kernel: 1}`: only the largest kernel).
    rule: "largest" trains the largest net alone; "sandwich" the largest, the smallest and `random_nets` random ones
    (Yu et al. 2020, BigNAS, sec. 3.1); "random" `random_nets` random ones (Cai et al. 2020, sec. 3.3); "fixed"
    one architecture, `arch`, at every resolution that is kept.
    couple: dimensions whose choice follows the stage's depth, deeper is wider (Sahni et al. 2021, CompOFA, sec. 3).
    prefer: "best" takes for each random net the best of `candidates` nets of about equal MACs, "worst" the worst, as a
    predictor ranks them that learned from `measured` nets as the phase began (Wang et al. 2021, AttentiveNAS, sec. 4).
    teacher: "inplace" distils the others from the largest net of the same step, "previous" from a frozen copy of the
    largest net as this phase found it, "full" as the second phase found it, "none" trains on labels alone.
    sort_channels: begin by ordering each block's middle channels by importance, so that narrow nets keep the best.
    warmup: share of the phase in which the rate rises (None: the schedule's).
    """

    name: str
    epochs: float
    lr: float
    rule: str = "sandwich"
    random_nets: int = 1
    teacher: str = "inplace"
    keep: Mapping[str, int | Sequence[float]] = field(default_factory=dict)
    couple: Sequence[str] = ()
    arch: Arch | Mapping[str, object] | None = None
    prefer: str = "none"
    candidates: int = 50
    measured: int = 64
    sort_channels: bool = False
    warmup: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not (isinstance(self.name, str) and re.fullmatch(r"[\w-]+", self.name)):
            raise UserError(f"phase name {self.name!r} is to name files; give a text of letters, digits, _ and -")
        if not isinstance(self.keep, Mapping):
            raise UserError(f"phase {self.name}: keep is {self.keep}; give choices, as {{kernel: 1}}, or {{}} for all")
        object.__setattr__(self, "couple", (self.couple,) if isinstance(self.couple, str) else tuple(self.couple))
        for name, known in {"rule": RULES, "teacher": TEACHERS, "prefer": PREFERENCES}.items():
            _one_of(f"phase {self.name}: {name}", getattr(self, name), known)
        for name in ("epochs", "lr"):
            positive(f"phase {self.name}: {name}", getattr(self, name))
        if isinstance(self.arch, Mapping):
            object.__setattr__(self, "arch", Arch.from_dict(self.arch))
        if (self.rule == "fixed") != (self.arch is not None):
            raise UserError(f"phase {self.name}: rule fixed needs an arch, and only it has one")
        counts = (self.random_nets, self.candidates - 1, self.measured - 10)
        if min(counts) < 0:
            raise UserError(f"phase {self.name}: random_nets must be at least 0, candidates 1 and measured 10")
        if self.rule == "random" and not self.random_nets:
            raise UserError(f"phase {self.name}: rule random with random_nets 0 trains no net; give at least 1")
        if self.rule != "sandwich" and self.teacher == "inplace":
            object.__setattr__(self, "teacher", "none")
        if unknown := set(self.keep) - set(DIMENSIONS):
            raise UserError(f"phase {self.name} keeps unknown {sorted(unknown)}; choose from {', '.join(DIMENSIONS)}")
        if unknown := set(self.couple) - set(COUPLED):
            raise UserError(f"phase {self.name} couples unknown {sorted(unknown)}; choose from {', '.join(COUPLED)}")
        if self.warmup is not None:
            share(f"phase {self.name}: warmup", self.warmup)

    def space(self, space: Space) -> Space:
        """The smaller space that this phase trains; raises UserError where its `arch` is not in it."""
        smaller = space.restrict(**self.keep)
        if isinstance(self.arch, Arch):
            smaller.encode([self.arch])
        return smaller


@dataclass(frozen=True, slots=True)
class Schedule:
    """Phases that follow one another, and the optimizer they share (SGD with Nesterov momentum, or Muon).

    epochs: of all phases together (None: as the phases say); each phase keeps its share.  curve: of the rate in each
    phase, "cosine", "triangular", or "exponential": times `decay` every `decay_epochs` epochs (of the phase as it is
    written), constant once below `floor` of it (Yu et al. 2020, sec. 3.1).  warmup: share of a phase in which the rate
    rises linearly (for "triangular" the position of its peak).  lr_batch_size: images that the phases' lr is for; with
    another batch_size it is scaled in proportion (Goyal et al. 2017, sec. 2.1; None: taken as it is).  gradient: "mean"
    or "sum" over the nets of a step.  clip_norm: of the gradient, clip_value: of each of its entries; None: unlimited.
    dropout: share of the classifier's inputs set to 0, drop_path: share of images that skip a block with a shortcut;
    regularize: whether these and label smoothing are for "all" nets or the "largest" alone.
    distill: how a net learns from its teacher, where its phase has one (None: from its soft labels alone).
    bias_lr: times the rate, for biases (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU": 64).
    muon: step of the convolutions before a batch norm, as a share of their norm, at a rate of 1: they take the steps of
    Muon (Jordan et al. 2024); 0: those of SGD, like all other weights.
    whiten: whether the first convolution starts with filters that decorrelate the training images' pixels.
    """

    phases: tuple[Phase, ...]
    batch_size: int = 128
    lr_batch_size: int | None = None
    epochs: float | None = None
    curve: str = "cosine"
    warmup: float = 0.1
    decay: float = 0.97
    decay_epochs: float = 2.4
    floor: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 3e-5
    label_smoothing: float = 0.1
    dropout: float = 0.0
    drop_path: float = 0.0
    regularize: str = "all"
    gradient: str = "mean"
    clip_norm: float | None = None
    clip_value: float | None = None
    distill: Distillation | None = None
    bias_lr: float = 1.0
    muon: float = 0.0
    whiten: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        phases = records(Phase, "phases", self.phases)
        object.__setattr__(self, "phases", phases)
        for name, known in {"curve": CURVES, "regularize": ("all", "largest"), "gradient": ("mean", "sum")}.items():
            _one_of(name, getattr(self, name), known)
        names = [phase.name for phase in phases]
        if not names or len(set(names)) != len(names):
            raise UserError(f"phases {names} must be at least one, each with a name of its own")
        if self.batch_size < 2:
            raise UserError(f"batch_size {self.batch_size} is too small for batch norm; give at least 2 images")
        optional = ("lr_batch_size", "epochs", "clip_norm", "clip_value")
        given = [name for name in optional if getattr(self, name) is not None]
        for name in (*given, "decay", "decay_epochs", "floor", "bias_lr"):
            positive(name, getattr(self, name))
        for name in ("decay", "floor"):
            if getattr(self, name) > 1:
                raise UserError(f"{name} is {getattr(self, name)}, and the rate would rise; give a number up to 1")
        for name in ("warmup", "momentum", "label_smoothing", "dropout", "drop_path", "weight_decay", "muon"):
            share(name, getattr(self, name))

    @property
    def scale(self) -> float:
        """What the epochs of every phase are multiplied by."""
        return 1.0 if self.epochs is None else self.epochs / sum(phase.epochs for phase in self.phases)

    def steps(self, steps_per_epoch: int) -> tuple[int, ...]:
        """Optimizer steps of each phase, at least one."""
        return tuple(max(1, round(phase.epochs * self.scale * steps_per_epoch)) for phase in self.phases)

    def rate(self, phase: Phase, done: float) -> float:
        """Learning rate when a share `done` (0 to 1) of a phase has run."""
        warmup = self.warmup if phase.warmup is None else phase.warmup
        lr = phase.lr * self.batch_size / (self.lr_batch_size or self.batch_size)
        if done < warmup:
            return lr * (0.05 + 0.95 * done / warmup)
        left = (1 - done) / (1 - warmup)
        if self.curve == "exponential":
            return lr * max(self.floor, self.decay ** (phase.epochs * (done - warmup) / self.decay_epochs))
        return lr * (left if self.curve == "triangular" else (1 - math.cos(math.pi * left)) / 2)


def positive(name: str, value: float) -> None:
    """Raise UserError for a number that is not above 0 and finite."""
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{name} is {value}; give a finite number above 0")


def share(name: str, value: float) -> None:
    """Raise UserError for a number that is not from 0 to 1, 1 excluded."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{name} is {value}; give a number of at least 0 and below 1")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name} {value!r} is not known; choose from {', '.join(known)}")
