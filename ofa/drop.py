"""Stochastic depth and dropout of one forward pass.  N images, C channels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
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

    def branch(self, x: Tensor, unit: Unit, place: float) -> Tensor | None:
        """What a unit with input x (N, C, H, W) multiplies its branch by, as `Elastic` blocks take it: (N, 1, 1, 1).

        0 for images that skip it; None: nothing is skipped.  place: 0 to 1 in the network.
        """
        share = self.path * place
        return self._kept(x, (len(x), 1, 1, 1), share) if unit.shortcut and share else None

    def before_classifier(self, x: Tensor) -> Tensor:
        """Features with some of them 0, any shape (N, C, ...)."""
        return x * self._kept(x, tuple(x.shape), self.features) if self.features else x

    def _kept(self, x: Tensor, shape: tuple[int, ...], share: float) -> Tensor:
        kept = (self.rng.random(shape, dtype=np.float32) >= share) / np.float32(1 - share)
        return torch.from_numpy(kept).to(x.device, x.dtype)


def joined(x: Tensor, y: Tensor, kept: Tensor | None) -> Tensor:
    """A block's input and branch added, (N, C, H, W) each; the branch times `kept` (N, 1, 1, 1), where it is given."""
    return x + (y if kept is None else y * kept)
