"""From the body of a request to the network's input, within limits.  C channels, R x R pixels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ofa.data.decode import MODES, Form, decode
from ofa.data.images import normalise, resize
from ofa.errors import UserError
from ofa.serve.settings import Served

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
NAME = "the body"


class RefusedError(Exception):
    """A request that is answered with an HTTP status and a reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True, slots=True)
class Body:
    """One encoded image: an `ofa.data.decode.Source`."""

    content: bytes
    windows: None = None

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: NDArray[np.int64]) -> Body:
        return self

    def read(self, i: int) -> bytes:
        """The image."""
        return self.content

    def name(self, i: int) -> str:
        """What messages call it."""
        return NAME


def check(content: bytes, max_pixels: int) -> None:
    """Raise RefusedError, from the header alone: 400 nothing, 415 not one of `FORMATS`, 413 too many pixels."""
    if not content:
        raise RefusedError(400, "the body is empty; send one image")
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            size = Image.open(BytesIO(content), formats=FORMATS).size
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        known = f"more pixels than {max_pixels}, or than the {Image.MAX_IMAGE_PIXELS} that Pillow decodes"
        raise RefusedError(413, f"the image has {known}") from None
    except Exception:  # Pillow's parsers raise errors of any type
        known = f"send the file itself, one of {', '.join(FORMATS)}: curl --data-binary @photo.png"
        raise RefusedError(415, f"the body is no image; {known}") from None
    if size[0] * size[1] > max_pixels:
        raise RefusedError(413, f"the image has {size[0]} x {size[1]} pixels; at most {max_pixels} are allowed")


def read(content: bytes, served: Served) -> NDArray[np.uint8]:
    """An image of the stored side, (S, S, C); raises RefusedError (400) where it is damaged."""
    form = Form(served.stored_side, MODES[len(served.mean)], None, convert=True)
    try:
        return decode(Body(content), 0, form)
    except UserError as error:
        raise RefusedError(400, str(error)) from None


def prepare(pixels: Sequence[NDArray[np.uint8]], served: Served) -> NDArray[np.float32]:
    """Images (N of S, S, C) as the network was tested on them, (N, C, R, R)."""
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return normalise(resize(x, served.resolution), served.mean, served.std).contiguous().numpy()
