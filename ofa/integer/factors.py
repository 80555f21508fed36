"""The fixed-point factors of operators from the scales of their tensors, as LiteRT's kernels prepare them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ofa.integer.fixed import INT8, quantize_multiplier
from ofa.integer.net import Int32, Tensor

FREE = {"low": INT8.min, "high": INT8.max}  # no clamp but that of the type
RANGES = {"none": (None, None), "relu": (0.0, None), "relu6": (0.0, 6.0), "relu_n1_to_1": (-1.0, 1.0)}


def scale_of(tensor: Tensor) -> np.float64:
    """Its scale, which files hold in 32 bits, in 64."""
    return np.float64(np.float32(tensor.scale))


def limits(act: str, y: Tensor) -> dict[str, int]:
    """What a fused activation clamps the numbers of `y` to; raises KeyError for one that is none."""
    real = RANGES[act]
    low, high = (None if r is None else y.zero + round_half_away(r / np.float32(y.scale)) for r in real)
    return {
        "low": INT8.min if low is None else max(INT8.min, low),
        "high": INT8.max if high is None else min(INT8.max, high),
    }


def round_half_away(value: ArrayLike) -> int:
    """The nearest integer of one number."""
    value = float(np.asarray(value))
    return int(np.sign(value) * np.floor(abs(value) + 0.5))


def conv_factors(x: Tensor, weight_scale: ArrayLike, y: Tensor, channels: int) -> tuple[Int32, Int32]:
    """Multipliers and shifts (K,) of a convolution."""
    scales = np.broadcast_to(np.asarray(weight_scale, np.float32).astype(np.float64), (channels,))
    return quantize_multiplier(scale_of(x) * scales / scale_of(y))


def add_factors(a: Tensor, b: Tensor, y: Tensor) -> tuple[Int32, Int32]:
    """Multipliers and shifts (3,) of a, b and their sum."""
    twice = 2 * max(scale_of(a), scale_of(b))
    return quantize_multiplier([scale_of(a) / twice, scale_of(b) / twice, twice / (2.0**20 * scale_of(y))])


def mul_factor(a: Tensor, b: Tensor, y: Tensor) -> dict[str, int]:
    """The factor of a product, in 32 bits as LiteRT computes it; Micro's 64 bits now and then round to another unit."""
    return _pair(np.float64(np.float32(a.scale) * np.float32(b.scale) / np.float32(y.scale)))


def mean_factor(x: Tensor, y: Tensor, pixels: int) -> dict[str, int]:
    """The factor of a mean over `pixels`, which divides by them too."""
    factor = _pair(scale_of(x) / scale_of(y))
    shift = min(pixels.bit_length() - 1, 32, 31 + factor["shift"])
    return {"multiplier": (factor["multiplier"] << shift) // pixels, "shift": factor["shift"] - shift}


def _pair(real: np.float64) -> dict[str, int]:
    multiplier, shift = quantize_multiplier(real)
    return {"multiplier": int(multiplier), "shift": int(shift)}
