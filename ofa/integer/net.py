"""An integer-only network as data: 8-bit tensors with scale and zero point, and operators with fixed-point factors.

A number q of a tensor means scale * (q - zero).  H, W: rows and columns; C: channels in; K: channels out; maps are
(H, W, C), one image each.  Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.integer.fixed import INT8, LIMIT

Shape = tuple[int, int, int]
Pair = tuple[int, int]
Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]
FURTHEST = INT8.max - INT8.min  # of a number from its zero point


@dataclass(frozen=True, slots=True)
class Tensor:
    """An int8 map (H, W, C); vectors are (1, 1, C)."""

    name: str
    shape: Shape
    scale: float
    zero: int

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise UserError(f"tensor {self.name} has shape {self.shape}; it must be (rows, columns, channels)")
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise UserError(f"tensor {self.name} has scale {self.scale}; it must be finite and above 0")
        if not INT8.min <= self.zero <= INT8.max:
            raise UserError(f"tensor {self.name} has zero point {self.zero}; it must be in -128..127")

    @property
    def size(self) -> int:
        """Elements, which are also bytes."""
        return prod(self.shape)


@dataclass(frozen=True, eq=False)
class Op:
    """An operator that writes tensor `y`; low, high: what its result is clamped to (a fused ReLU)."""

    y: int
    low: int
    high: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tensors it reads."""
        return tuple(getattr(self, name) for name in ("x", "a", "b") if hasattr(self, name))


@dataclass(frozen=True, eq=False)
class Conv(Op):
    """Convolution: weight (K, kh, kw, C), bias, multiplier and shift (K,); a linear layer is one of kernel (H, W).

    stride: rows, columns.  pad: rows above, columns to the left; below and to the right follow from the output's shape.
    Padding is the input's zero point.
    """

    x: int
    weight: Int8
    bias: Int32
    multiplier: Int32
    shift: Int32
    stride: Pair = (1, 1)
    pad: Pair = (0, 0)

    def __post_init__(self) -> None:
        w = np.abs(self.weight.astype(np.int64)).reshape(len(self.weight), -1).sum(1)
        if (256 * w + np.abs(self.bias.astype(np.int64)) >= LIMIT).any():
            raise UserError(f"a sum of {self.weight[0].size} products may pass 2^30; use smaller or fewer weights")
        if not len(self.weight) == len(self.bias) == len(self.multiplier) == len(self.shift):
            raise UserError(f"{len(self.weight)} filters have {len(self.bias)} biases; there must be as many")


@dataclass(frozen=True, eq=False)
class Depthwise(Conv):
    """A kernel for each channel: weight (C, kh, kw), the rest as of `Conv`."""


@dataclass(frozen=True, eq=False)
class Add(Op):
    """Sum of two maps of one shape; multiplier, shift (3,): of a, b and the sum, numbers shifted left by 20 between."""

    a: int
    b: int
    multiplier: Int32
    shift: Int32


@dataclass(frozen=True, eq=False)
class Mul(Op):
    """Product of a map (H, W, C) with another, or with a channel's gate (1, 1, C); one multiplier and shift."""

    a: int
    b: int
    multiplier: int
    shift: int


@dataclass(frozen=True, eq=False)
class Mean(Op):
    """Mean of each channel, (H, W, C) to (1, 1, C); one multiplier, which divides too, and shift."""

    x: int
    multiplier: int
    shift: int


@dataclass(frozen=True, eq=False)
class Pool(Op):
    """Mean of the pixels in a window that lie in the image, rounded half away from 0; quantization as the input's."""

    x: int
    kernel: Pair
    stride: Pair
    pad: Pair = (0, 0)


@dataclass(frozen=True, eq=False)
class MaxPool(Pool):
    """The largest of the same pixels."""


@dataclass(frozen=True, eq=False)
class Lookup(Op):
    """A function of each number: table (256,), of q at q + 128."""

    x: int
    table: Int8


@dataclass(frozen=True, eq=False)
class IntegerNet:
    """Tensors and the operators on them, in order; input and output are indices of tensors."""

    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]
    input: int
    output: int

    def __post_init__(self) -> None:
        known = {self.input}
        for op in self.ops:
            if missing := [i for i in op.inputs if i not in known]:
                raise UserError(f"operators are out of order: {self.tensors[missing[0]].name} is read before written")
            if op.y in known:
                raise UserError(f"tensor {self.tensors[op.y].name} is written twice; each is written once")
            known.add(op.y)
            check_shapes(op, [self.tensors[i].shape for i in op.inputs], self.tensors[op.y])
        if self.output not in known or not self.ops:
            raise UserError("the output is written by no operator; a network has at least one")

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants as they lie in flash: weights, biases, multipliers and shifts, tables."""
        return sum(
            op.weight.size + 9 * len(op.bias) if isinstance(op, Conv) else 256 * isinstance(op, Lookup)
            for op in self.ops
        )


def check_shapes(op: Op, shapes: list[Shape], y: Tensor) -> None:
    """Raise UserError unless an operator makes of its inputs' shapes that of its output."""
    x = shapes[0]
    fits = y.shape == x
    if isinstance(op, Depthwise):
        fits = y.shape[2] == x[2] == len(op.weight) and _windows_fit(x, y.shape, op.weight.shape[1:3], op)
    elif isinstance(op, Conv):
        fits = op.weight.shape[0] == y.shape[2] and op.weight.shape[3] == x[2]
        fits = fits and _windows_fit(x, y.shape, op.weight.shape[1:3], op)
    elif isinstance(op, Pool):
        fits = y.shape[2] == x[2] and _windows_fit(x, y.shape, op.kernel, op)
    elif isinstance(op, Mean):
        fits = y.shape == (1, 1, x[2])
    elif isinstance(op, Mul):
        fits = y.shape == x and shapes[1] in (x, (1, 1, x[2]))
    elif isinstance(op, Add):
        fits = y.shape == x == shapes[1]
    if not fits:
        raise UserError(f"{type(op).__name__} cannot make {y.name} of shape {y.shape} from {shapes}; check the file")


def _windows_fit(x: Shape, y: Shape, kernel: tuple[int, ...], op: Conv | Pool) -> bool:
    """Whether every window holds a pixel of the image, and the image is wholly under them or its end left over."""
    return all(
        stride >= 1 and 0 <= pad < size and (out - 1) * stride - pad < side and out >= 1
        for side, out, size, stride, pad in zip(x, y, kernel, op.stride, op.pad, strict=False)
    )
