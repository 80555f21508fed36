"""Functions of one 8-bit number as tables of 256.  x, y: the tensors before and after."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ofa.arrays import Float, Int
from ofa.errors import UserError
from ofa.integer.fixed import clamp, quantize_multiplier, rescale, round_shift
from ofa.integer.net import Int8, Tensor

ALL = np.arange(-128, 128, dtype=np.int64)
INT16 = np.iinfo(np.int16)


def tabulate(function: Callable[[Float], Float], x: Tensor, y: Tensor) -> Int8:
    """The nearest 8-bit result of a real function, (256,), halves away from 0."""
    real = function((ALL - x.zero) * np.float64(np.float32(x.scale))) / np.float64(np.float32(y.scale))
    return clamp((np.sign(real) * np.floor(np.abs(real) + 0.5)).astype(np.int64) + y.zero)


def requantize(x: Tensor, y: Tensor) -> Int8:
    """The same number under another scale and zero point, (256,), in fixed point as LiteRT's."""
    factor = quantize_multiplier(np.float64(np.float32(x.scale)) / np.float64(np.float32(y.scale)))
    return clamp(rescale(ALL - x.zero, *factor) + y.zero)


def hard_swish(x: Float) -> Float:
    """x * relu6(x + 3) / 6 (Howard et al. 2019)."""
    return x * hard_sigmoid(x)


def hard_sigmoid(x: Float) -> Float:
    """relu6(x + 3) / 6."""
    return np.clip(x + 3, 0, 6) / 6


def logistic(x: Float) -> Float:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def lite_hard_swish(x: Tensor, y: Tensor) -> Int8:
    """Hard-swish as LiteRT's integer kernel computes it, in 16 bits, (256,): up to 1 away from the nearest.

    x is taken times 128; its product with the gate, which has 3 at 32768, is doubled and its high half kept.
    """
    hires = np.float32(x.scale) / np.float32(128)
    out, out_shift = _short(np.float64(hires / np.float32(y.scale)))
    gate, gate_shift = _short(np.float64(hires / np.float32(3.0 / 32768.0)))
    if out_shift > 0:
        raise UserError(f"hard-swish of {x.name} has an output scale below 1/128 of its input's; LiteRT refuses it")
    value = (ALL - x.zero) * 128
    ramp = value
    if gate_shift > 0:
        ramp = _saturate(ramp << (gate_shift - 1))
    ramp = _high(ramp * gate)
    ramp = _saturate(ramp << 1) if gate_shift > 0 else ramp
    ramp = round_shift(ramp, -gate_shift) if gate_shift < 0 else ramp
    ramp = (ramp + 32768) >> 1
    product = ramp * _high(value * out)
    truncated = np.sign(product) * (np.abs(product) >> 15)
    return clamp(round_shift(truncated, -out_shift) + y.zero)


def _short(real: float) -> tuple[int, int]:
    """A multiplier of 15 bits and its shift."""
    multiplier, shift = quantize_multiplier(real)
    return min((int(multiplier) + (1 << 15)) >> 16, INT16.max), int(shift)


def _saturate(value: Int) -> Int:
    return np.clip(value, INT16.min, INT16.max)


def _high(product: Int) -> Int:
    """The rounded high half of a doubled 32-bit product; halves away from 0, as gemmlowp's."""
    nudge = np.where(product >= 0, 1 << 14, 1 - (1 << 14))
    total = product + nudge
    return np.sign(total) * (np.abs(total) >> 15)
