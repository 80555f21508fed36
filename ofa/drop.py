"""Stochastic depth and dropout of one forward pass.  N images, C channels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ofa.spec import Unit


@dataclass(frozen=True, slots=True, eq=False)
class Drop:
    """What one training pass leaves out, drawn from `rng`.

    path: share of images for which the last block with a shortcut is skipped; a block before it has less, in proportion
    to its place among the blocks that the architecture keeps (Huang et al. 2016, eq. 4).  features: share of the
    classifier's inputs that are 0 (Hinton et al. 2012).  What stays is scaled so that its mean is the same.
    """

    path: float
    features: float
    rng: np.random.Generator

    def after(self, x: Tensor, y: Tensor, unit: Unit, place: float) -> Tensor:
        """Output y (N, C, H, W) of a unit with input x, or x itself for some images; place: 0 to 1 in the network."""
        share = self.path * place
        if not unit.shortcut or not share:
            return y
        y = x + (y - x) * self._kept(x, (len(x), 1, 1, 1), share)
        return F.relu(y) if unit.kind == "bottleneck" else y  # its activation follows the addition

    def before_classifier(self, x: Tensor) -> Tensor:
        """Features with some of them 0, any shape (N, C, ...)."""
        return x * self._kept(x, tuple(x.shape), self.features) if self.features else x

    def _kept(self, x: Tensor, shape: tuple[int, ...], share: float) -> Tensor:
        kept = (self.rng.random(shape, dtype=np.float32) >= share) / np.float32(1 - share)
        return torch.from_numpy(kept).to(x.device, x.dtype)
