"""Labelled images and the batches drawn from them.  N images, C channels, S x S stored pixels, R x R asked for.

Images are uint8 in memory wherever they fit; cropping, flipping and resizing then work on whole batches of bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ofa.data.augment import NOTHING, Augment
from ofa.data.decode import Encoded
from ofa.errors import UserError

SPLITS = ("train", "val", "test")
STATISTICS_IMAGES = 5000  # of encoded data: the mean is then known to 0.004


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Images, uint8 (N, C, S, S) channels_last or still encoded, and their labels, int64 (N,)."""

    images: Tensor | Encoded
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def order(self, limit: int | None, rng: np.random.Generator | None) -> NDArray[np.int64]:
        """Indices of at most `limit` images: spread evenly, or shuffled by a generator, as they are read best."""
        order = _order(len(self), limit, rng)
        windows = self.images.source.windows if isinstance(self.images, Encoded) else None
        return windows.gather(order, rng) if windows and rng else order

    def read(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        """Images of each batch of indices, uint8 (n, C, S, S) channels_last."""
        if isinstance(self.images, Encoded):
            yield from self.images.stream(batches)
            return
        pixels = self.images.permute(0, 2, 3, 1)
        rows = pixels.reshape(len(self), -1)
        for index in batches:
            yield rows.index_select(0, torch.from_numpy(index)).view(-1, *pixels.shape[1:]).permute(0, 3, 1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class ImageData:
    """A data set, and how it is augmented.

    mean, std: of each channel of train, for pixels from 0 to 1.  flip: whether training mirrors images.  shift: stored
    pixels by which training moves images at most, each way; their mirror image fills the gap.  augment: what else
    training does.  Raises UserError where train or val has less than 2 images, or shift is more than a side.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = False
    shift: int = 0
    augment: Augment = NOTHING

    def __post_init__(self) -> None:
        for split in ("train", "val"):
            if (n := self.size(split)) < 2:
                few = f"{n} of the 2 images that statistics of batch norm take at least"
                raise UserError(f"{split} of {self.name} has {few}; add some, or change data.val_size")
        if self.shift > self.side:
            raise UserError(f"data.shift is {self.shift}; give at most {self.side}, the side of the stored images")

    @property
    def channels(self) -> int:
        """Channels of each image: 1 or 3."""
        return len(self.mean)

    @property
    def side(self) -> int:
        """Height and width of the stored images, in pixels."""
        images = self.train.images
        return images.form.side if isinstance(images, Encoded) else images.shape[-1]

    def split(self, name: str) -> Split:
        """The split of that name."""
        if name not in SPLITS:
            raise UserError(f"split {name!r} is not known; choose from {', '.join(SPLITS)}")
        return getattr(self, name)

    def size(self, split: str) -> int:
        """Number of images of a split."""
        return len(self.split(split))

    def guessing(self, split: str) -> float:
        """Top-1 accuracy (0 to 1) of naming the most frequent class of a split for each of its images."""
        labels = self.split(split).labels
        return int(labels.bincount().max()) / len(labels)

    def batches(
        self,
        split: str,
        batch_size: int,
        resolution: int | Callable[[int], int],
        *,
        rng: np.random.Generator | None,
        limit: int | None = None,
        drop_last: bool = False,
        start: int = 0,
        share: tuple[int, int] = (0, 1),
        epoch: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images, float32 (n, C, R, R) channels_last, and labels, int64 (n,).

        resolution: R, or a function from the number of the batch to R.  rng: shuffles and augments, the same way for
        the same generator; None: in order, as they are.  limit: at most so many images, spread evenly over the split
        where there is no rng.  drop_last: leave out a batch that is not full.  start: number of the first batch given.
        share: (i, n) gives every n-th image of each batch from its i-th on; the n shares together are the batch.
        epoch: its number; an image mirrored in one is not in the next (Jordan 2024, as `Schedule` cites it).
        """
        images, (first, every) = self.split(split), share
        order = images.order(limit, rng)
        if drop_last:
            order = order[: len(order) // batch_size * batch_size]
        if batch_size < 1 or not len(order):
            raise UserError(f"batches of {batch_size} cannot be drawn from {len(images)} images; change batch_size")
        parts = np.split(order, range(batch_size, len(order), batch_size))
        moves = [_draw_moves(part, self.shift, self.flip, epoch, rng) for part in parts] if rng else None
        seeds = rng.integers(2**62, size=len(parts)) + first if rng and self.augment != NOTHING else None
        if every > 1:
            parts = [part[first::every] for part in parts]
            moves = moves and [each.share(first, every) for each in moves]
        return self._batches(images, parts, moves, seeds, resolution, start)

    def _batches(
        self,
        split: Split,
        parts: list[NDArray[np.int64]],
        moves: list[Moves] | None,
        seeds: NDArray[np.int64] | None,
        resolution: int | Callable[[int], int],
        start: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for i, x in enumerate(split.read(parts[start:]), start):
            if moves:
                x = _move(x, moves[i], self.shift)
            rng = None if seeds is None else np.random.default_rng(seeds[i])
            x = self.augment.pixels(x, rng) if rng else x
            x = self.normalise(resize(x, resolution(i) if callable(resolution) else resolution))
            yield self.augment.erased(x, rng) if rng else x, split.labels[torch.from_numpy(parts[i])]

    def calibration(
        self, split: str, images: int, resolution: int, *, batch_size: int = 256, augment: bool = False
    ) -> Iterator[Tensor]:
        """Images alone, the same ones each time: for quantization ranges, or, augmented, for batch-norm statistics.

        Batch norm wants what training saw: statistics of images that were not moved and erased cost accuracy.
        The batches are as large as one another, or a short last one would count as much as the others.
        """
        rng = np.random.default_rng(0) if augment else None
        images = min(images, self.size(split))
        size = -(-images // -(-images // batch_size))
        for x, _ in self.batches(split, size, resolution, rng=rng, limit=images):
            yield x

    def normalise(self, x: Tensor) -> Tensor:
        """From uint8 to float32, each channel with mean 0 and standard deviation 1; (n, C, R, R) channels_last."""
        return normalise(x, self.mean, self.std)

    def digest(self) -> str:
        """Another one where classes, labels or images of a split are others; encoded images count by their names."""
        found = hashlib.blake2b("\0".join(self.classes).encode(), digest_size=16)
        for split in map(self.split, SPLITS):
            found.update(split.labels.numpy().tobytes())
            if isinstance(split.images, Encoded):
                names = (split.images.source.name(i).rpartition("/")[2] for i in range(len(split)))
                found.update("\0".join(names).encode())
            else:
                found.update(split.images.permute(0, 2, 3, 1).contiguous().numpy().data)
        return found.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a model's card says about its data; JSON."""
        sizes = {name: self.size(name) for name in SPLITS}
        numbers = {"side": self.side, "mean": list(self.mean), "std": list(self.std)}
        return {"name": self.name, "classes": list(self.classes), "images": sizes} | numbers


@dataclass(frozen=True, slots=True)
class Moves:
    """How one batch is augmented: crop offsets (n,) from 0 to twice the shift, and which images are mirrored, (n,)."""

    down: Tensor
    right: Tensor
    mirrored: Tensor

    def share(self, first: int, every: int) -> Moves:
        """Those of every n-th image, from the first on."""
        return Moves(self.down[first::every], self.right[first::every], self.mirrored[first::every])


def resize(x: Tensor, side: int) -> Tensor:
    """Images (n, C, S, S), uint8 or float, at `side` pixels: bilinear, antialiased; equal to Pillow's on uint8."""
    return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="bilinear", antialias=True)


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """From uint8 (n, C, R, R) to float32, each channel (x / 255 - mean) / std; channels_last."""
    means, stds = torch.tensor([mean, std], dtype=torch.float64)[:, None, :, None, None]
    scale, offset = _planes(1 / (255 * stds), x), _planes(-means / stds, x)
    return x.contiguous(memory_format=torch.channels_last).float().mul_(scale).add_(offset)


def statistics(train: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, from 0 to 1; over some evenly spread images if they are encoded."""
    order = _order(len(train), STATISTICS_IMAGES if isinstance(train.images, Encoded) else None, None)
    counts = sum(_histograms(x) for x in train.read(np.split(order, range(256, len(order), 256))))
    assert isinstance(counts, Tensor)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = counts @ levels / counts.sum(1)
    variance = counts @ levels.square() / counts.sum(1) - mean.square()
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp_min(1 / 255).tolist())


def _histograms(x: Tensor) -> Tensor:
    """How often each channel takes each level: (C, 256)."""
    return torch.stack([torch.bincount(c.flatten(), minlength=256) for c in x.unbind(1)]).double()


def _order(n: int, limit: int | None, rng: np.random.Generator | None) -> NDArray[np.int64]:
    count = n if limit is None else min(n, limit)
    return rng.permutation(n)[:count] if rng else np.arange(count) * n // max(count, 1)


def _draw_moves(images: NDArray[np.int64], shift: int, flip: bool, epoch: int, rng: np.random.Generator) -> Moves:
    """Of images by their index (n,).  An epoch mirrors about half of them, and the next one the others."""
    down, right = torch.from_numpy(rng.integers(0, 2 * shift + 1, (2, len(images))))
    hashed = images.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(63)  # Fibonacci hashing (Knuth)
    return Moves(down, right, torch.from_numpy((hashed == epoch % 2) & flip))


def _move(x: Tensor, moves: Moves, shift: int) -> Tensor:
    """Shifted and mirrored images, which may be the tensor that came in."""
    x = _crop(x, moves, shift) if shift else x
    if moves.mirrored.any():
        x[moves.mirrored] = x[moves.mirrored].flip(3)
    return x


def _crop(x: Tensor, moves: Moves, shift: int) -> Tensor:
    """Crops at the offsets of `moves` of the images in a frame that mirrors them at their edges.

    The bytes of a crop's row lie side by side in the framed batch, so a crop is S of all its overlapping runs of S
    pixels: one `index_select` of rows, ten times faster than indexing pixels.
    """
    n, c, side, _ = x.shape
    framed = side + 2 * shift
    frame = x.new_empty(n, framed, framed, c)
    frame[:, shift : shift + side, shift : shift + side] = x.permute(0, 2, 3, 1)
    for axis in (2, 1):
        frame.narrow(axis, 0, shift).copy_(frame.narrow(axis, shift, shift).flip(axis))
        frame.narrow(axis, side + shift, shift).copy_(frame.narrow(axis, side, shift).flip(axis))
    runs = frame.as_strided((n * framed**2 - side + 1, side * c), (c, 1))
    rows = torch.arange(n)[:, None] * framed + moves.down[:, None] + torch.arange(side)
    crops = runs.index_select(0, (rows * framed + moves.right[:, None]).flatten())
    return crops.view(n, side, side, c).permute(0, 3, 1, 2)


def _planes(values: Tensor, x: Tensor) -> Tensor:
    """Values (1, C, 1, 1) over a whole image: ten times faster than broadcasting over the innermost channels."""
    return values.float().expand(1, *x.shape[1:]).contiguous(memory_format=torch.channels_last)
