"""Muon: convolutions take steps of the same size in all directions of their gradient, not in its steepest alone.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".  Convolutions C_out x C_in x K x K are
matrices of C_out rows here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ofa.parallel import World
from ofa.processor import flags

QUINTIC = 3.4445, -4.7750, 2.0315  # of Newton and Schulz, so that 5 steps take singular values of .01 to 1 near 1
STEPS = 5


class Muon(torch.optim.SGD):
    """SGD, but groups with `turn` (a share) take steps along the nearest orthogonal matrix to their Nesterov momentum.

    A step is `lr` times `turn` times the norm of a weight, and leaves that norm as it is: for weights that a batch norm
    follows, to which their scale does not matter.  Momentum buffers are those of SGD.
    world: the processes that hold the same weights and gradients; each turns a part of the weights for all.
    """

    def __init__(self, groups: list[dict[str, Any]], world: World | None = None, **options: Any) -> None:
        super().__init__(groups, **options)
        self.world = world or World()
        self._step_supports_amp_scaling = False  # of fused SGD; a GradScaler leaves out whole steps instead

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all groups, in place."""
        for group in self.param_groups:
            if group.get("turn"):
                self._turn([weight for weight in group["params"] if weight.grad is not None], group)
        return super().step(closure)

    def _turn(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Step weights, each in its own process, and take their gradients, so that SGD passes them over."""
        if not weights:
            return
        grads: list[Tensor] = [weight.grad for weight in weights if weight.grad is not None]
        buffers: list[Tensor] = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        owners = dealt(weights, self.world.size)
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for weight, grad, buffer, owner in zip(weights, grads, buffers, owners, strict=True):
            if owner == self.world.rank:
                nesterov = grad.add_(buffer, alpha=group["momentum"])
                alike.setdefault(weight.shape, []).append((weight, nesterov))
        for same in alike.values():
            old, along = (torch.stack(tensors).flatten(2) for tensors in zip(*same, strict=True))
            norm = old.norm(dim=(1, 2), keepdim=True)
            new = old - group["lr"] * group["turn"] * norm / min(old.shape[1:]) ** 0.5 * orthogonal(along)
            new *= norm / new.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
            for (weight, _), turned in zip(same, new, strict=True):
                weight.copy_(turned.view_as(weight))
        self.world.spread(weights, owners)
        for weight in weights:
            weight.grad = None


def dealt(weights: Sequence[Tensor], processes: int) -> list[int]:
    """Which process turns each weight, so that all have about as much to do."""
    work = [weight.numel() * min(len(weight), weight[0].numel()) for weight in weights]
    owners, busy = [0] * len(work), [0] * processes
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        owners[i] = busy.index(min(busy))
        busy[owners[i]] += work[i]
    return owners


def turnable(net: nn.Module) -> list[Tensor]:
    """Weights of the dense convolutions right before a batch norm, in the order of the network, but of the first."""
    pairs = pairwise(net.modules())
    found = [
        conv.weight
        for conv, norm in pairs
        if isinstance(conv, nn.Conv2d) and conv.groups == 1 and hasattr(norm, "running_var")
    ]
    return found[1:]


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices (N, R, C) whose singular values are all about 1 (.7 to 1.2), in the dtype given.

    A matrix of zeros stays one; singular values below a hundredth of the norm end below 1.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)).to(_dtype(x.device))
    a, b, c = QUINTIC
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def _dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where products in it are fast; it is exact enough here."""
    return torch.bfloat16 if device.type != "cpu" or "bf16" in flags() else torch.float32
