"""Numbers of half the width in training: automatic mixed precision, and the scale that keeps small gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ofa.errors import UserError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_precision(name: str) -> None:
    """Raise UserError for a precision that is not known."""
    if name not in PRECISIONS:
        raise UserError(f"precision {name!r} is not known; choose from {', '.join(PRECISIONS)}")


class Precision:
    """How the forward pass computes on a device: "float32", or "bfloat16" or "float16" by autocast.

    float16 has 5 bits of exponent, so the loss is scaled up by a factor that adapts (Micikevicius et al. 2018, sec.
    3.2); a step whose gradients overflow is left out and halves it.  Weights, gradients and optimizer stay float32.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        check_precision(name)
        self.dtype, self.device = PRECISIONS[name], device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")

    def cast(self) -> AbstractContextManager[Any]:
        """Within it operations compute in this precision where that is safe."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled."""
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale; to be called when all have been added, before they are clipped."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer take its step, unless gradients overflowed."""
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()

    @property
    def stuck(self) -> bool:
        """Whether gradients overflow even unscaled, so that every step is left out."""
        return self.scaler.is_enabled() and self.scaler.get_scale() < 1

    def state(self) -> dict[str, Any]:
        """The scale, for a checkpoint; empty but for float16."""
        return self.scaler.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the scale of a checkpoint; one of another precision has none."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)
