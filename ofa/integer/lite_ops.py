"""What each operator of an int8 .tflite file becomes.

Padding is taken into the window behind it, reshapes that move nothing are left out, constant factors and activations
become tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ofa.errors import UserError
from ofa.integer import tables
from ofa.integer.factors import FREE, add_factors, conv_factors, limits, mean_factor, mul_factor, scale_of
from ofa.integer.fixed import INT8
from ofa.integer.net import Add, Conv, Depthwise, Lookup, MaxPool, Mean, Mul, Pool, Shape

if TYPE_CHECKING:
    from ofa.integer.tflite import Reader


@dataclass(frozen=True, slots=True)
class Padding:
    """A file's tensor that is another, `source`, with rows above and columns left of it; shape: with them."""

    source: int
    pad: tuple[int, int]
    shape: Shape
    fill: int | None


def as_map(shape: Any) -> Shape:
    """(1, H, W, C) or (1, C) as (H, W, C)."""
    sides = [int(n) for n in shape]
    if len(sides) not in (2, 4) or sides[0] != 1:
        raise UserError(f"a tensor has shape {sides}; images one at a time, (1, H, W, C) or (1, C), are read")
    return (sides[1], sides[2], sides[3]) if len(sides) == 4 else (1, 1, sides[1])


def _convolution(r: Reader, op: Any) -> None:
    x, weight = int(op.inputs[0]), r.constant(op.inputs[1])
    if weight.ndim == 2:  # fully connected: a window over the whole map
        weight = weight.reshape(len(weight), *r.of(x).shape)
    scale, zero = r.quantization(r.graph.tensors[int(op.inputs[1])])
    _filters(r, op, Conv, weight, scale, zero)


def _depthwise(r: Reader, op: Any) -> None:
    weight = r.constant(op.inputs[1])[0].transpose(2, 0, 1)
    scale, zero = r.quantization(r.graph.tensors[int(op.inputs[1])])
    channels = int(r.graph.tensors[int(op.inputs[0])].shape[-1])
    if channels == len(weight):
        return _filters(r, op, Depthwise, weight, scale, zero)
    if channels != 1:
        raise UserError(
            f"a depthwise convolution makes {len(weight)} channels of {channels}; it must keep their number"
        )
    return _filters(r, op, Conv, weight[..., None], scale, zero)


def _filters(r: Reader, op: Any, kind: type[Conv], weight: Any, scale: Any, zero: Any) -> None:
    out, n = int(op.outputs[0]), len(weight)
    if zero.any():
        raise UserError("weights have a zero point; they must be symmetric")
    windowed = hasattr(op.builtinOptions, "strideH")
    place = r.window(op, weight.shape[1:3], r.zero(op.inputs[0])) if windowed else {"x": r.tensor(op.inputs[0])}
    bias = r.constant(op.inputs[2], np.int32) if len(op.inputs) > 2 and op.inputs[2] >= 0 else np.zeros(n, np.int32)
    multiplier, shift = conv_factors(r.tensors[place["x"]], scale, r.of(out), n)
    fields = {"weight": np.ascontiguousarray(weight), "bias": bias, "multiplier": multiplier, "shift": shift}
    r.emit(kind, out, r.act(op, out), **fields, **place)


def _add(r: Reader, op: Any) -> None:
    (a, b), out = op.inputs, int(op.outputs[0])
    constant = [r.is_constant(n) for n in (a, b)]
    if any(constant):
        return _with_constant(r, op, a if constant[1] else b, b if constant[1] else a, np.add)
    multiplier, shift = add_factors(r.of(a), r.of(b), r.of(out))
    fields = {"a": r.tensor(a), "b": r.tensor(b), "multiplier": multiplier, "shift": shift}
    return r.emit(Add, out, r.act(op, out), **fields)


def _mul(r: Reader, op: Any) -> None:
    (a, b), out = op.inputs, int(op.outputs[0])
    constant = [r.is_constant(n) for n in (a, b)]
    if any(constant):
        return _with_constant(r, op, a if constant[1] else b, b if constant[1] else a, np.multiply)
    if r.of(a).size < r.of(b).size:
        a, b = b, a
    fields = {"a": r.tensor(a), "b": r.tensor(b), **mul_factor(r.of(a), r.of(b), r.of(out))}
    return r.emit(Mul, out, r.act(op, out), **fields)


def _with_constant(r: Reader, op: Any, x: int, number: int, function: Callable[..., Any]) -> None:
    """A sum or product with one stored number, as a table."""
    stored, out = r.constant(number).reshape(-1), int(op.outputs[0])
    if stored.size != 1:
        raise UserError(f"an addition or product has {stored.size} stored numbers; one, or a second map, is supported")
    scale, zero = r.quantization(r.graph.tensors[int(number)])
    real = np.float64(scale[0]) * (int(stored[0]) - int(zero[0]))
    _table(r, op, lambda v: function(v, real), x=x, act=r.act(op, out))


def _table(
    r: Reader, op: Any, function: Callable[..., Any], x: int | None = None, act: dict[str, int] | None = None
) -> None:
    number, out = op.inputs[0] if x is None else x, int(op.outputs[0])
    act = act or FREE
    table = np.clip(tables.tabulate(function, r.of(number), r.of(out)), act["low"], act["high"])
    r.emit(Lookup, out, FREE, x=r.tensor(number), table=table)


def _hard_swish(r: Reader, op: Any) -> None:
    x, out = op.inputs[0], int(op.outputs[0])
    r.emit(Lookup, out, FREE, x=r.tensor(x), table=tables.lite_hard_swish(r.of(x), r.of(out)))


def _relu(act: str) -> Callable[[Reader, Any], None]:
    def read(r: Reader, op: Any) -> None:
        x, out = op.inputs[0], int(op.outputs[0])
        bounds = limits(act, r.of(out))
        table = np.clip(tables.requantize(r.of(x), r.of(out)), bounds["low"], bounds["high"])
        r.emit(Lookup, out, FREE, x=r.tensor(x), table=table)

    return read


def _mean(r: Reader, op: Any) -> None:
    x, out = op.inputs[0], int(op.outputs[0])
    if sorted(int(n) % 4 for n in r.constant(op.inputs[1], np.int32)) != [1, 2]:
        raise UserError("a mean is not over rows and columns; only global pooling is supported")
    rows, columns, _ = r.of(x).shape
    r.emit(Mean, out, FREE, x=r.tensor(x), **mean_factor(r.of(x), r.of(out), rows * columns))


def _sum(r: Reader, op: Any) -> None:
    """What the converter makes of a global pool over one pixel, which leaves it as it is."""
    numbers = op.inputs[0], op.outputs[0]
    before, after = map(r.shape, numbers)
    scales = [(float(scale[0]), zero[0]) for scale, zero in (r.quantization(r.graph.tensors[int(n)]) for n in numbers)]
    if before != after or scales[0] != scales[1]:
        raise UserError(f"a sum makes {after} of a map {before}; only sums over one pixel are supported, take a mean")
    _same(r, op)


def _pool(kind: type[Pool]) -> Callable[[Reader, Any], None]:
    """The smallest number is no pixel to the largest of them."""

    def read(r: Reader, op: Any) -> None:
        out, o = int(op.outputs[0]), op.builtinOptions
        kernel = (o.filterHeight, o.filterWidth)
        place = r.window(op, kernel, INT8.min if kind is MaxPool else None)
        x, y = r.tensors[place["x"]], r.of(out)
        if (scale_of(x), x.zero) != (scale_of(y), y.zero):
            raise UserError("a pool changes the quantization; its input and output must share scale and zero point")
        r.emit(kind, out, r.act(op, out), kernel=kernel, **place)

    return read


def _pad(r: Reader, op: Any) -> None:
    """Taken into what reads it."""
    x, out = int(op.inputs[0]), int(op.outputs[0])
    around = r.constant(op.inputs[1], np.int32).reshape(-1, 2)
    if around.shape != (4, 2) or around[[0, 3]].any():
        raise UserError("padding is of images or channels; only rows and columns are supported")
    fill = int(r.constant(op.inputs[2]).reshape(-1)[0]) if len(op.inputs) > 2 else r.of(x).zero
    pad, shape = (int(around[1, 0]), int(around[2, 0])), r.shape(out)
    r.padded[out] = Padding(x, pad, shape, fill)


def _same(r: Reader, op: Any) -> None:
    """A new shape, or another order of axes, that leaves every element where it is."""
    x, out = int(op.inputs[0]), int(op.outputs[0])
    before, after = ([int(n) for n in r.graph.tensors[i].shape] for i in (x, out))
    if not r.index and len(after) == 4:  # the image comes channels first; ours as the first operator reads it
        r.tensor(out)
        return
    flat = as_map(before)[2] == int(np.prod(before)) or as_map(after)[2] == int(np.prod(after))
    if not flat:
        raise UserError(f"a tensor of shape {before} becomes {after}; only flattening is supported")
    r.index[out] = r.tensor(x)  # a linear layer reads a map as it is


def _quantize(r: Reader, op: Any) -> None:
    x, out = int(op.inputs[0]), int(op.outputs[0])
    if r.kinds[r.graph.tensors[x].type] == "FLOAT32":
        r.tensor(out)
    else:
        r.emit(Lookup, out, FREE, x=r.tensor(x), table=tables.requantize(r.of(x), r.of(out)))


def _dequantize(r: Reader, op: Any) -> None:
    r.index[int(op.outputs[0])] = r.tensor(op.inputs[0])


OPS: dict[str, Callable[[Reader, Any], None]] = {
    "CONV_2D": _convolution,
    "FULLY_CONNECTED": _convolution,
    "DEPTHWISE_CONV_2D": _depthwise,
    "ADD": _add,
    "MUL": _mul,
    "MEAN": _mean,
    "SUM": _sum,
    "AVERAGE_POOL_2D": _pool(Pool),
    "MAX_POOL_2D": _pool(MaxPool),
    "HARD_SWISH": _hard_swish,
    "LOGISTIC": lambda r, op: _table(r, op, tables.logistic),
    "RELU": _relu("relu"),
    "RELU6": _relu("relu6"),
    "PAD": _pad,
    "PADV2": _pad,
    "RESHAPE": _same,
    "TRANSPOSE": _same,
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
}
