"""Multiplication by a real number in integers: a 31-bit multiplier and a shift (Jacob et al. 2018, sec. 2.2).

A number is rounded twice, as in that paper and in LiteRT's reference kernels: to the high 32 bits of twice its product
with the multiplier, halves up, and by the shift to the right, halves away from 0.  Rounding once can give 1 more or
less.  Numbers that a left shift takes beyond 2^30 are held there, far above any 8-bit result.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ofa.arrays import Int
from ofa.errors import UserError

BITS = 31
LIMIT = 1 << 30  # of sums, so that nothing done to them passes 32 bits
SHIFTS = (-31, 30)  # what LiteRT's kernels take
INT8 = np.iinfo(np.int8)


def quantize_multiplier(real: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Multipliers in [2^30, 2^31) and shifts with multiplier * 2^(shift - 31) nearest to `real`, of any shape.

    0, and what is below 2^-32, become 0.  Raises UserError for a negative, infinite or too large number.
    """
    real = np.asarray(real, dtype=np.float64)
    if not (np.isfinite(real).all() and (real >= 0).all() and (real < 2.0 ** SHIFTS[1]).all()):
        raise UserError(f"factor {real.max()} between two scales is not in 0..2^30; check the ranges of the tensors")
    mantissa, shift = np.frexp(real)
    multiplier = np.floor(mantissa * 2.0**BITS + 0.5).astype(np.int64)
    over = multiplier == 1 << BITS
    multiplier, shift = np.where(over, multiplier >> 1, multiplier), shift + over
    tiny = shift < SHIFTS[0]
    return np.where(tiny, 0, multiplier).astype(np.int32), np.where(tiny, 0, shift).astype(np.int32)


def rescale(acc: ArrayLike, multiplier: ArrayLike, shift: ArrayLike) -> Int:
    """acc * multiplier * 2^(shift - 31), rounded twice; arrays that broadcast, accumulators within 2^30."""
    multiplier, shift = np.asarray(multiplier, dtype=np.int64), np.asarray(shift, dtype=np.int64)
    shifted = np.clip(np.left_shift(np.asarray(acc, dtype=np.int64), np.maximum(shift, 0)), -LIMIT, LIMIT)
    high = np.right_shift(shifted * multiplier + (1 << BITS - 1), BITS)
    return round_shift(high, np.maximum(-shift, 0))


def round_shift(value: Int, by: ArrayLike) -> Int:
    """value / 2^by, halves away from 0."""
    by = np.asarray(by, dtype=np.int64)
    rest = np.left_shift(np.int64(1), by) - 1
    return np.right_shift(value, by) + ((value & rest) > (rest >> 1) + (value < 0))


def clamp(value: Int, low: int = INT8.min, high: int = INT8.max) -> NDArray[np.int8]:
    """The nearest of low..high, as int8."""
    return np.clip(value, low, high).astype(np.int8)
