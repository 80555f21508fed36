"""From encoded images (PNG, JPEG, WebP, ...) to uint8 pixels of one form.  N images, C channels, S x S pixels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ofa.data.shards import Windows
from ofa.errors import UserError

MODES = {1: "L", 3: "RGB"}
CHUNK = 256
# Of image files.  One that Pillow cannot read, such as HEIC without a plugin, is named and not passed over.
ENDINGS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".avif"),
    *(".heic", ".heif", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"),
)
SET_CHANNELS = "set data.channels=1 (grey) or 3 (RGB) to convert all"


class Source(Protocol):
    """Encoded images, read one by one in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: NDArray[np.int64], /) -> Self: ...

    @property
    def windows(self) -> Windows | None:
        """Which images are read together; None: any order is as fast as any other."""

    def read(self, i: int, /) -> bytes:
        """Image `i`, encoded."""

    def name(self, i: int, /) -> str:
        """Where a person finds image `i`."""


@dataclass(frozen=True, slots=True)
class Form:
    """What all images become: `side` pixels high and wide, mode "L" (grey) or "RGB".

    size: width and height that every image must have; None: images are resized.  convert: whether images of other
    modes are converted; otherwise they are errors.
    """

    side: int
    mode: str
    size: tuple[int, int] | None
    convert: bool

    @property
    def image_bytes(self) -> int:
        """Bytes of one decoded image."""
        return self.side**2 * len(self.mode)


class Encoded(Dataset[Tensor | UserError]):
    """Images that are decoded when they are read; an index is an array of indices, of a whole batch."""

    def __init__(self, source: Source, form: Form, workers: int) -> None:
        self.source, self.form, self.workers = source, form, workers

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: NDArray[np.int64]) -> Tensor | UserError:
        """uint8 (n, C, S, S) channels_last; an error is returned, as a worker process would add its traceback."""
        try:
            pixels = np.stack([decode(self.source, i, self.form) for i in index.tolist()])
        except UserError as error:
            return error
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def stream(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        """Images of each batch of indices, decoded ahead by worker processes."""
        self.source.read(0)  # opens files here, once, rather than in each worker
        own = torch.Generator()  # else the loader would draw from the global one
        with warnings.catch_warnings():  # workers only decode, on one thread each; how many is the user's choice
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader = DataLoader(self, batch_size=None, sampler=batches, generator=own, num_workers=self.workers)
            reading = iter(loader)
        for images in reading:
            if isinstance(images, UserError):
                raise images
            yield images


def form_of(source: Source, side: int | None, channels: int | None) -> Form:
    """The form that was asked for; what is None, the first image decides."""
    image = _open(source, 0)
    _require_8_bits(image, source.name(0))
    if channels is None and image.mode not in MODES.values():
        raise UserError(f"{source.name(0)} has mode {image.mode}, neither grey (L) nor RGB; {SET_CHANNELS}")
    mode = image.mode if channels is None else MODES[channels]
    return Form(side or min(image.size), mode, None if side else image.size, channels is not None)


def decode_all(source: Source, form: Form) -> Tensor:
    """All images, decoded in threads: uint8 (N, C, S, S) channels_last."""
    pixels = np.empty((len(source), form.side, form.side, len(form.mode)), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + CHUNK, len(source))):
            pixels[i] = decode(source, i, form)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(fill, range(0, len(source), CHUNK)):
            pass
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def decode(source: Source, i: int, form: Form) -> NDArray[np.uint8]:
    """Image `i`, upright, cropped to the square in its middle, white where it is transparent: (S, S, C)."""
    image, name = _open(source, i), source.name(i)
    if form.size is None:
        image.draft(None, (2 * form.side, 2 * form.side))  # a JPEG of 12 megapixels decodes 7 times faster
    elif image.size != form.size:
        sizes = f"{_pixels(image.size)} where the first image has {_pixels(form.size)}"
        raise UserError(f"{name} has {sizes}; set data.size=<pixels> to resize all to one square")
    with _readable(name):
        image.load()
        if "exif" in image.info:
            ImageOps.exif_transpose(image, in_place=True)
    square = (form.side, form.side)
    image = _converted(image, name, form)
    if image.size != square:
        image = ImageOps.fit(image, square, Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(*square, len(form.mode))


def _open(source: Source, i: int) -> Image.Image:
    encoded = source.read(i)
    with _readable(source.name(i)):
        return Image.open(BytesIO(encoded))


def _converted(image: Image.Image, name: str, form: Form) -> Image.Image:
    if image.mode == form.mode and not image.has_transparency_data:
        return image
    _require_8_bits(image, name)
    if image.mode != form.mode and not form.convert:
        raise UserError(f"{name} has mode {image.mode} where the first image has {form.mode}; {SET_CHANNELS}")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(form.mode)


def _require_8_bits(image: Image.Image, name: str) -> None:
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{name} has more than 8 bits a channel (mode {image.mode}); save it with 8")


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what Pillow's decoders raise, which is of any type, into a UserError that names the image."""
    try:
        yield
    except Exception as error:
        reason = str(error).split(" <_io")[0]
        raise UserError(f"{name} cannot be read as an image ({reason}); mend or remove it") from None


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} pixels"
