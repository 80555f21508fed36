"""Augmentation of whole batches beyond moving and mirroring.  N images, C channels, S x S pixels, K classes.

Everything is drawn from the generator that comes in, so that a step of a resumed run sees the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from ofa.errors import UserError

LEVELS = 30  # magnitudes, as RandAugment counts them
TRANSLATE, SHEAR, ROTATE, ENHANCE = 150 / 331, 0.3, 30.0, 0.9  # largest share of the side, slope, degrees, change
ERASED = ((0.02, 1 / 3), (0.3, 3.3))  # area and aspect ratio of what is erased (Zhong et al. 2020, sec. 3.1)


def _affine(x: Tensor, *, degrees: float = 0.0, x_move: int = 0, y_move: int = 0, shear: tuple[float, float]) -> Tensor:
    slopes = [math.degrees(math.atan(slope)) for slope in shear]
    center = [0.0, 0.0] if any(slopes) else None
    return V.affine(x, degrees, [x_move, y_move], 1.0, slopes, center=center)


def _pixels(x: Tensor, level: float) -> int:
    return int(TRANSLATE * x.shape[-1] * level)


STILL = (0.0, 0.0)
SIGNED: dict[str, Callable[[Tensor, float], Tensor]] = {  # level -1 to 1
    "shear_x": lambda x, level: _affine(x, shear=(SHEAR * level, 0.0)),
    "shear_y": lambda x, level: _affine(x, shear=(0.0, SHEAR * level)),
    "translate_x": lambda x, level: _affine(x, x_move=_pixels(x, level), shear=STILL),
    "translate_y": lambda x, level: _affine(x, y_move=_pixels(x, level), shear=STILL),
    "rotate": lambda x, level: V.rotate(x, ROTATE * level),
    "brightness": lambda x, level: V.adjust_brightness(x, 1 + ENHANCE * level),
    "color": lambda x, level: V.adjust_saturation(x, 1 + ENHANCE * level),
    "contrast": lambda x, level: V.adjust_contrast(x, 1 + ENHANCE * level),
    "sharpness": lambda x, level: V.adjust_sharpness(x, 1 + ENHANCE * level),
}
UNSIGNED: dict[str, Callable[[Tensor, float], Tensor]] = {  # level 0 to 1
    "identity": lambda x, level: x,
    "posterize": lambda x, level: V.posterize(x, 8 - round(4 * level)),
    "solarize": lambda x, level: V.solarize(x, 255 * (1 - level)),
    "autocontrast": lambda x, level: V.autocontrast(x),
    "equalize": lambda x, level: V.equalize(x),
}
OPERATIONS = SIGNED | UNSIGNED


@dataclass(frozen=True, slots=True)
class Augment:
    """What training does to its batches besides what ImageData's `flip` and `shift` do.

    operations: of each image, drawn from RandAugment's 14 (Cubuk et al. 2020, sec. 3), at `magnitude` 0 to 30.
    erase: share of images of which a rectangle becomes the mean (Zhong et al. 2020).  mixup, cutmix: alpha of the Beta
    distribution of the shares by which two images are mixed (Zhang et al. 2018; Yun et al. 2019); 0: not at all; where
    both are given, half of the batches get one and half the other.
    """

    operations: int = 0
    magnitude: float = 9
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        most = {"magnitude": LEVELS, "erase": 1}
        for name in (field.name for field in fields(self)):
            value, limit = getattr(self, name), most.get(name, 100)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= limit:
                raise UserError(f"augment.{name} is {value}; give a number from 0 to {limit}")
        if not isinstance(self.operations, int):
            raise UserError(f"augment.operations is {self.operations}; give a whole number")

    def pixels(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """RandAugment of uint8 images (N, C, S, S); images with the same operation are worked on together."""
        for _ in range(self.operations):
            chosen = rng.integers(len(OPERATIONS), size=len(x))
            signs = rng.choice((-1, 1), size=len(x))
            out = torch.empty_like(x)
            for i, (name, operation) in enumerate(OPERATIONS.items()):
                for sign in (-1, 1) if name in SIGNED else (1,):
                    mask = (chosen == i) & ((signs == sign) | (name not in SIGNED))
                    if mask.any():
                        index = torch.from_numpy(np.flatnonzero(mask))
                        out[index] = operation(x[index], sign * self.magnitude / LEVELS)
            x = out
        return x

    def erased(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """Normalised images (N, C, S, S), a rectangle of some of them made 0, which is the mean, in place."""
        if not self.erase:
            return x
        n, side = len(x), x.shape[-1]
        (low, high), (flat, tall) = ERASED
        area = rng.uniform(low, high, n) * side**2
        ratio = np.exp(rng.uniform(math.log(flat), math.log(tall), n))
        size = np.minimum(np.rint(np.sqrt(np.stack([area * ratio, area / ratio]))), side)
        size *= rng.random(n) < self.erase
        start = np.floor(rng.random((2, n)) * (side - size + 1))
        boxes = np.stack([start, start + size]).astype(int)
        for i in np.flatnonzero(size.all(0)):
            (top, left), (bottom, right) = boxes[:, :, i]
            x[i, :, top:bottom, left:right] = 0.0
        return x

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another."""
        return bool(self.mixup or self.cutmix)

    def mixed(self, x: Tensor, labels: Tensor, classes: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Each image mixed with the one before it in the batch: (N, C, S, S), and shares of the classes, (N, K)."""
        target = F.one_hot(labels, classes).to(x.dtype)
        cut = not self.mixup or (bool(self.cutmix) and rng.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = rng.beta(alpha, alpha)
        if not cut:
            return torch.lerp(x.roll(1, 0), x, share), torch.lerp(target.roll(1, 0), target, share)
        side = x.shape[-1]
        half = int(0.5 * math.sqrt(1 - share) * side)
        middle = rng.integers(side, size=2)
        start, end = np.maximum(middle - half, 0), np.minimum(middle + half, side)
        box = _boxes(start[:, None], (end - start)[:, None], side).to(x.device)
        share = 1 - float(np.prod(end - start)) / side**2
        return torch.where(box, x.roll(1, 0), x), torch.lerp(target.roll(1, 0), target, share)


NOTHING = Augment()


def _boxes(start: np.ndarray, size: np.ndarray, side: int) -> Tensor:
    """Rectangles as masks (N, 1, S, S); start, size: (2, N) rows and columns."""
    place = np.arange(side)
    inside = (place >= start[:, :, None]) & (place < (start + size)[:, :, None])
    return torch.from_numpy(inside[0][:, None, :, None] & inside[1][:, None, None, :])
