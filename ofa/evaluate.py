"""How good a network is on images: top-1 accuracy, of a plain net or of a subnet with its own batch-norm statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ofa.extraction import extract, recalibrate
from ofa.inference import fast
from ofa.kernels import keep_memory
from ofa.space import Arch
from ofa.static import StaticNet
from ofa.supernet import Supernet

if TYPE_CHECKING:
    from ofa.data import ImageData

CALIBRATION_IMAGES = 1024
BATCH = 256


@torch.inference_mode()
def accuracy(net: nn.Module, data: ImageData, split: str, *, resolution: int, limit: int | None = None) -> float:
    """Top-1 accuracy (0 to 1) of a plain net on a split, or on `limit` of its images, spread evenly over it."""
    keep_memory()
    device = next(net.parameters()).device
    if not net.training:
        net = fast(net)
    right, total = torch.zeros((), dtype=torch.long, device=device), 0
    for x, y in data.batches(split, BATCH, resolution, rng=None, limit=limit):
        right += (
            net(x.to(device)).argmax(1) == y.to(device)
        ).sum()  # read at the end: a GPU works while images are made
        total += len(y)
    return int(right) / total


def specialise(supernet: Supernet, arch: Arch, data: ImageData, *, images: int = CALIBRATION_IMAGES) -> StaticNet:
    """Extract an architecture and give it batch-norm statistics of its own, from augmented validation images."""
    keep_memory()
    net = extract(supernet, arch)
    device = next(net.parameters()).device
    recalibrate(net, (x.to(device) for x in data.calibration("val", images, arch.resolution, augment=True)))
    return net
