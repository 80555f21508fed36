"""What happens when training goes wrong: back to the last good epoch, at a lower rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ofa.errors import UserError
from ofa.files import append_jsonl
from ofa.kinds import check_fields
from ofa.precision import Precision


@dataclass(frozen=True, slots=True)
class Safety:
    """After a collapse, or a loss or weight that is not finite: back to the last good epoch, `attempts` times a run.

    factor: of the learning rate for the rest of the phase that went wrong, each time.  attempts 0: a collapse is only a
    warning, and a loss that is not finite an error; so it is once the attempts are used up.
    """

    attempts: int = 3
    factor: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        if self.attempts < 0 or not 0 < self.factor < 1:
            raise UserError(
                f"rollback attempts {self.attempts}, factor {self.factor}: give at least 0 and a factor between 0 and 1"
            )


@dataclass(slots=True)
class Rollbacks:
    """The rollbacks of a run so far: how many, and the factor of each phase's rate.  Part of the checkpoint."""

    count: int = 0
    factors: dict[str, float] = field(default_factory=dict)

    def factor(self, phase: str) -> float:
        """What a phase's learning rate is multiplied by."""
        return self.factors.get(phase, 1.0)

    def add(self, phase: str, factor: float) -> None:
        """Count a rollback of a phase."""
        self.count += 1
        self.factors[phase] = self.factor(phase) * factor

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Rollbacks:
        """From `to_dict`."""
        return Rollbacks(**values)


class DivergedError(Exception):
    """The loss or a weight is not finite, in this phase."""

    def __init__(self, message: str, phase: str):
        super().__init__(message)
        self.phase = phase


def check_finite(loss: float, step: int, phase: str, rate: float) -> None:
    """Raise DivergedError where a loss is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(f"the loss is {loss} at step {step} of phase {phase} (learning rate {rate:.3g})", phase)


def check_gradients(precision: Precision, step: int, phase: str, rate: float) -> None:
    """Raise DivergedError where float16 cannot hold the gradients, so that no step is taken any more."""
    if precision.stuck:
        place = f"at step {step} of phase {phase} (learning rate {rate:.3g})"
        raise DivergedError(f"gradients overflow float16 {place}; give train.precision=bfloat16", phase)


def check_weights(net: nn.Module, step: int, phase: str) -> None:
    """Raise DivergedError where weights are not finite; an activation can hide that from the loss."""
    for name, parameter in net.named_parameters():
        if not torch.isfinite(parameter).all():
            raise DivergedError(f"weights are not finite at step {step} of phase {phase} ({name})", phase)


def note_rollback(folder: Path, reason: str, *, back_to: int, factor: float) -> dict[str, Any]:
    """Append a line on a rollback to <folder>/rollbacks.jsonl; returns it."""
    line = {"reason": reason, "back_to_step": back_to, "lr_factor": factor}
    append_jsonl(folder / "rollbacks.jsonl", line)
    return line
