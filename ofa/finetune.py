"""Fine-tuning of a plain network: SGD on labels and, where there is a teacher, on its soft labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ofa.distill import label_loss, soft_label_loss
from ofa.errors import UserError
from ofa.evaluate import CALIBRATION_IMAGES
from ofa.extraction import recalibrate
from ofa.static import StaticNet

if TYPE_CHECKING:
    from ofa.data import ImageData

Report = Callable[[dict[str, Any]], None]
Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Finetuning:
    """How long and how fast: SGD with Nesterov momentum, a cosine from `lr` to 0.

    epochs: passes over the training images (0: only batch norm is recalibrated).  soft_labels: share of the teacher's
    soft labels in the loss, the rest is the labels', smoothed.
    """

    epochs: float = 5.0
    lr: float = 0.05
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 3e-5
    label_smoothing: float = 0.1
    soft_labels: float = 0.5

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.lr <= 0 or self.batch_size < 2:
            given = f"epochs {self.epochs}, lr {self.lr}, batch_size {self.batch_size}"
            raise UserError(f"{given}: give at least 0 epochs, an lr above 0 and a batch_size of at least 2")
        if not 0 <= self.soft_labels <= 1 or not 0 <= self.label_smoothing < 1:
            given = f"soft_labels {self.soft_labels}, label_smoothing {self.label_smoothing}"
            raise UserError(f"{given}: both are shares; give numbers from 0 to 1")


def finetune(
    net: Net,
    data: ImageData,
    settings: Finetuning,
    *,
    resolution: int | None = None,
    teacher: nn.Module | None = None,
    after_step: Callable[[Net], None] = lambda net: None,
    seed: int = 0,
    report: Report = lambda values: None,
) -> Net:
    """A trained copy of `net`, batch norm recalibrated on validation images, in evaluation mode.

    resolution: of the images, in pixels (None: the network's own).  Only parameters that require gradients are trained.
    `after_step` gets the copy after every optimizer step, and may change its weights in place: it holds pruned weights
    at zero, for instance.  `report` gets step, steps, loss and lr.  Raises UserError where the loss is not finite.
    """
    net = copy.deepcopy(net).train()
    teacher = None if teacher is None else teacher.eval()
    device = next(net.parameters()).device
    if resolution is None:
        resolution = net.spec.resolution if isinstance(net, StaticNet) else data.side
    optimizer = torch.optim.SGD(
        [parameter for parameter in net.parameters() if parameter.requires_grad],
        settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    size = min(settings.batch_size, data.size("train"))
    steps = round(settings.epochs * (data.size("train") // size))
    batches = _batches(data, size, resolution, seed)
    for step in range(steps):
        rate = settings.lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        x, y = (tensor.to(device) for tensor in next(batches))
        loss = _loss(net, teacher, x, y, settings)
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} at step {step} with learning rate {rate:.3g}; lower lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step(net)
        report({"step": step + 1, "steps": steps, "loss": loss.item(), "lr": rate})
    recalibrate(net, (x.to(device) for x in data.calibration("val", CALIBRATION_IMAGES, resolution, augment=True)))
    return net.eval()


def _batches(data: ImageData, size: int, resolution: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented training batches, epoch after epoch without end."""
    epoch = 0
    while True:
        rng = np.random.default_rng((seed, epoch))
        yield from data.batches("train", size, resolution, rng=rng, drop_last=True)
        epoch += 1


def _loss(net: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor, settings: Finetuning) -> Tensor:
    logits = net(x)
    loss = label_loss(logits, y, settings.label_smoothing)
    if teacher is None or not settings.soft_labels:
        return loss
    with torch.no_grad():
        soft = teacher(x)
    return (1 - settings.soft_labels) * loss + settings.soft_labels * soft_label_loss(logits, soft)
