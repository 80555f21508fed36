"""How the gradients of a step come about: over processes, in parts of a batch, at a precision, by compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ofa.blocks import BLOCKS
from ofa.errors import UserError
from ofa.kinds import check_fields
from ofa.parallel import Averaging, Parallel, World
from ofa.precision import Precision
from ofa.supernet import Supernet
from ofa.units import largest_units

Add = Callable[[Tensor], None]
Losses = Callable[[Tensor, Tensor, Add], Tensor]


@dataclass(frozen=True, slots=True)
class Scale:
    """What makes a step larger or faster and, up to batch norm and rounding, changes no result.

    world: the processes that share each batch.  parallel: what they send one another.  precision: see Precision.
    accumulate: parts in which a process takes its share of a batch, one after the other, to save memory.  compile:
    whether blocks are compiled.
    """

    world: World = field(default_factory=World)
    parallel: Parallel = field(default_factory=Parallel)
    precision: str = "float32"
    accumulate: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, batch_size: int) -> None:
        """Raise UserError where a part of a batch would be too small for batch norm."""
        if self.accumulate < 1:
            raise UserError(f"accumulate is {self.accumulate}; give a whole number of at least 1")
        parts = self.world.size * self.accumulate
        if batch_size < 2 * parts:
            shares = f"{self.world.size} processes with accumulate={self.accumulate}"
            raise UserError(
                f"a batch of {batch_size} has less than 2 images for each part of {shares}; raise batch_size"
            )


class Gradients:
    """The gradients of `net` for batches of `batch_size` images, those of all processes together.

    Each process gets its share of a batch; its parts are weighted so that the mean over the processes is the mean over
    the batch, however they divide it.
    """

    def __init__(self, net: nn.Module, batch_size: int, scale: Scale) -> None:
        scale.check(batch_size)
        self.net, self.batch_size, self.scale = net, batch_size, scale
        self.device = next(net.parameters()).device
        self.precision = Precision(scale.precision, self.device)
        self.average = Averaging(net.parameters(), scale.world, scale.parallel)

    def of(self, losses: Losses, x: Tensor, y: Tensor) -> float:
        """Set the gradients to those of a share of a batch; the loss of the whole batch, the same in all processes.

        losses: calls its third argument with each loss whose gradient is wanted, and returns the one to report.
        """
        total = 0.0
        self.net.zero_grad()  # a step that diverged leaves its own
        parts = min(self.scale.accumulate, max(1, len(y) // 2))  # of two images and more, for batch norm
        for images, labels in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            weight = len(labels) * self.scale.world.size / self.batch_size

            def add(loss: Tensor, weight: float = weight) -> None:
                with torch.autocast(self.device.type, enabled=False):
                    self.precision.backward(loss * weight)

            with self.precision.cast():
                total += weight * float(losses(images, labels, add).detach())
        return self.scale.world.sum(total) / self.scale.world.size

    def apply(self, optimizer: torch.optim.Optimizer, clip: Callable[[nn.Module], None] = lambda net: None) -> None:
        """Average the gradients over all processes, clip them, let the optimizer step, and forget them."""
        self.average()
        self.precision.unscale(optimizer)
        clip(self.net)
        self.precision.step(optimizer)
        optimizer.zero_grad()

    def memory(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What to go on from: tensors and JSON values for a checkpoint."""
        return self.average.memory(), {"loss_scale": self.precision.state()}

    def recall(self, tensors: dict[str, Tensor], values: dict[str, Any], step: int) -> None:
        """Go on from the `memory` that a checkpoint of `step` steps holds; one of other settings may hold less."""
        self.average.recall(tensors, step)
        self.precision.restore(values.get("loss_scale", {}))


def compile_blocks(supernet: Supernet, backend: str = "inductor") -> None:
    """Let every block compile its forward pass, in place, once for each kind of Unit that it is called with.

    Whole networks would be compiled once for each architecture.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 512  # of all blocks of a kind together, as they share their code
    torch._dynamo.config.accumulated_recompile_limit = 4096
    for module, (unit, _) in zip(supernet.units, largest_units(supernet.space), strict=True):
        if unit.kind in BLOCKS:
            module.compile(backend=backend)
