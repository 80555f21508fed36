"""Array types that spaces, units, blocks and tables share.  Needs no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]
Bool = NDArray[np.bool_]
Float = NDArray[np.float64]
_NUMPY = (np.ndarray, np.generic)  # a union would be made anew in each call


def python(value: Any) -> Any:
    """An array as a list and a number of NumPy's as Python's, which JSON can hold; anything else as it is.

    A number of half or single precision becomes the shortest that it stands for: .65, not .6499999761581421.
    """
    if not isinstance(value, _NUMPY):
        return value
    short = value.dtype in (np.float16, np.float32)
    return (value.astype(str).astype(np.float64) if short else value).tolist()


def make_divisible(channels: Int | Float | float, divisor: int = 8) -> Int:
    """Nearest multiple of `divisor`, never below 90 % of `channels` (Howard et al. 2017, TF slim)."""
    channels = np.asarray(channels, dtype=np.float64)
    rounded = np.maximum(divisor, (channels + divisor / 2) // divisor * divisor)
    return np.where(rounded < 0.9 * channels, rounded + divisor, rounded).astype(np.int64)
