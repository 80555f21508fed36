"""Int8 .tflite files as integer-only networks.

Padding operators are taken into the convolution behind them, reshapes and transposes that move nothing are left out,
constant factors and activations become tables.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.integer import tables
from ofa.integer.factors import add_factors, conv_factors, limits, mean_factor, mul_factor, scale_of
from ofa.integer.fixed import INT8
from ofa.integer.net import Add, Conv, Depthwise, IntegerNet, Lookup, MaxPool, Mean, Mul, Op, Pool, Tensor

ACTS = ("none", "relu", "relu_n1_to_1", "relu6")  # by the schema's numbers
FREE = {"low": INT8.min, "high": INT8.max}


def read_tflite(path: str | Path) -> IntegerNet:
    """The network of a fully quantized int8 file; float inputs and outputs are left to `run_float`.

    Raises UserError for a file that is damaged, not quantized, or has an operator that is not supported, and where the
    extra that knows the format is absent.
    """
    schema = _schema()
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; export the network first")
    raw = Path(path).read_bytes()
    try:
        if raw[4:8] != b"TFL3":
            raise ValueError("it does not begin as one")
        return _Reader(schema, schema.ModelT.InitFromPackedBuf(raw, 0), raw).net()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # flatbuffers checks nothing: whatever a damaged offset leads to
        raise UserError(
            f"{path} is no usable .tflite file ({type(error).__name__}: {error}); export it again"
        ) from None


def _schema() -> Any:
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError:
        raise UserError('reading .tflite files needs an extra; pip install "ofa-nas[tflite]"') from None
    return schema


class _Reader:
    """Goes through a file's operators and gathers ours."""

    def __init__(self, schema: Any, model: Any, raw: bytes) -> None:
        self.names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
        self.kinds = {number: name for name, number in vars(schema.TensorType).items() if isinstance(number, int)}
        self.model, self.raw = model, raw
        self.graph = model.subgraphs[0]
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.index: dict[int, int] = {}  # of a file's tensor in ours; several where one only renames another
        self.padding: dict[int, tuple[int, int]] = {}  # rows above and columns left of the file's tensor
        self.shapes: dict[int, tuple[int, int, int]] = {}  # of padded tensors

    def net(self) -> IntegerNet:
        """The whole network."""
        if len(self.graph.inputs) != 1 or len(self.graph.outputs) != 1:
            raise UserError(f"it has {len(self.graph.inputs)} inputs; networks of one image and one output are read")
        start = int(self.graph.inputs[0])
        for op in self.graph.operators:
            code = self.model.operatorCodes[op.opcodeIndex]
            name = self.names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "?")
            if name not in OPS:
                known = ", ".join(sorted(OPS))
                raise UserError(f"operator {name} is not supported in integer arithmetic; these are: {known}")
            if not self.index and name not in ("QUANTIZE", "RESHAPE", "TRANSPOSE"):
                self.tensor(start)
            OPS[name](self, op)
        return IntegerNet(tuple(self.tensors), tuple(self.ops), 0, self.index[int(self.graph.outputs[0])])

    def tensor(self, number: int) -> int:
        """Our index of a file's activation."""
        number = int(number)
        if number not in self.index:
            t = self.graph.tensors[number]
            scale, zero = self.quantization(t)
            shape = _map(t.shape)
            self.index[number] = len(self.tensors)
            self.tensors.append(Tensor(t.name.decode(), shape, float(scale[0]), int(zero[0])))
        return self.index[number]

    def of(self, number: int) -> Tensor:
        """The tensor itself."""
        return self.tensors[self.tensor(number)]

    def quantization(self, t: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scales and zero points of an int8 tensor."""
        if self.kinds[t.type] != "INT8" or t.quantization is None or t.quantization.scale is None:
            raise UserError(
                f"tensor {t.name.decode()[-60:]} is {self.kinds[t.type]}; quantize weights and activations to int8"
            )
        scale = np.asarray(t.quantization.scale, np.float32)
        zero = t.quantization.zeroPoint
        return scale, np.zeros(len(scale), np.int64) if zero is None else np.asarray(zero, np.int64)

    def is_constant(self, number: int) -> bool:
        """Whether a tensor is stored in the file."""
        buffer = self.model.buffers[self.graph.tensors[int(number)].buffer]
        return bool(buffer.size) or (buffer.data is not None and len(buffer.data) > 0)

    def constant(self, number: int, dtype: type = np.int8) -> NDArray[Any]:
        """What is stored of a tensor, inside the flatbuffer or behind it."""
        t = self.graph.tensors[int(number)]
        buffer = self.model.buffers[t.buffer]
        data = (
            self.raw[buffer.offset : buffer.offset + buffer.size]
            if buffer.size
            else bytes(np.asarray(buffer.data, np.uint8))
        )
        return np.frombuffer(data, dtype).reshape([] if t.shape is None else [int(n) for n in t.shape])

    def emit(self, kind: type[Op], out: int, act: dict[str, int], **fields: Any) -> None:
        """Add an operator that writes a file's tensor."""
        self.ops.append(kind(y=self.tensor(out), **act, **fields))

    def act(self, op: Any, out: int) -> dict[str, int]:
        """The clamp of an operator's fused activation."""
        number = op.builtinOptions.fusedActivationFunction
        if number >= len(ACTS):
            raise UserError(f"fused activation {number} is not supported; ReLU, ReLU6 and none are")
        return limits(ACTS[number], self.of(out))

    def place(self, op: Any, kernel: tuple[int, int], out: int) -> dict[str, Any]:
        """Stride and padding of a window."""
        o, number = op.builtinOptions, int(op.inputs[0])
        if (getattr(o, "dilationHFactor", 1), getattr(o, "dilationWFactor", 1)) != (1, 1):
            raise UserError("a convolution is dilated; only plain windows are supported")
        stride, pad = (o.strideH, o.strideW), self.padding.get(number, (0, 0))
        if o.padding == 0:  # SAME
            side = self.shapes.get(number, self.of(number).shape)
            pairs = zip(pad, side, _map(self.graph.tensors[out].shape), kernel, stride, strict=False)
            pad = tuple(p + max(0, (n - 1) * s + k - i) // 2 for p, i, n, k, s in pairs)  # type: ignore[assignment]
        return {"stride": stride, "pad": pad}


def _map(shape: Any) -> tuple[int, int, int]:
    """(1, H, W, C) or (1, C) as (H, W, C)."""
    sides = [int(n) for n in shape]
    if len(sides) not in (2, 4) or sides[0] != 1:
        raise UserError(f"a tensor has shape {sides}; images one at a time, (1, H, W, C) or (1, C), are read")
    return (sides[1], sides[2], sides[3]) if len(sides) == 4 else (1, 1, sides[1])


def _convolution(r: _Reader, op: Any) -> None:
    x, weight, out = int(op.inputs[0]), r.constant(op.inputs[1]), int(op.outputs[0])
    if weight.ndim == 2:  # fully connected: a window over the whole map
        weight = weight.reshape(len(weight), *r.of(x).shape)
    scale, zero = r.quantization(r.graph.tensors[int(op.inputs[1])])
    _filters(r, op, Conv, weight, scale, zero)
    del out


def _depthwise(r: _Reader, op: Any) -> None:
    weight = r.constant(op.inputs[1])[0].transpose(2, 0, 1)
    scale, zero = r.quantization(r.graph.tensors[int(op.inputs[1])])
    channels = r.of(op.inputs[0]).shape[2]
    if channels == len(weight):
        return _filters(r, op, Depthwise, weight, scale, zero)
    if channels != 1:
        raise UserError(
            f"a depthwise convolution makes {len(weight)} channels of {channels}; it must keep their number"
        )
    return _filters(r, op, Conv, weight[..., None], scale, zero)


def _filters(r: _Reader, op: Any, kind: type[Conv], weight: Any, scale: Any, zero: Any) -> None:
    x, out, n = r.of(op.inputs[0]), int(op.outputs[0]), len(weight)
    if zero.any():
        raise UserError("weights have a zero point; they must be symmetric")
    bias = r.constant(op.inputs[2], np.int32) if len(op.inputs) > 2 and op.inputs[2] >= 0 else np.zeros(n, np.int32)
    multiplier, shift = conv_factors(x, scale, r.of(out), n)
    place = r.place(op, weight.shape[1:3], out) if hasattr(op.builtinOptions, "strideH") else {}
    fields = {"weight": np.ascontiguousarray(weight), "bias": bias, "multiplier": multiplier, "shift": shift}
    r.emit(kind, out, r.act(op, out), x=r.tensor(op.inputs[0]), **fields, **place)


def _add(r: _Reader, op: Any) -> None:
    (a, b), out = op.inputs, int(op.outputs[0])
    constant = [r.is_constant(n) for n in (a, b)]
    if any(constant):
        return _with_constant(r, op, a if constant[1] else b, b if constant[1] else a, np.add)
    multiplier, shift = add_factors(r.of(a), r.of(b), r.of(out))
    fields = {"a": r.tensor(a), "b": r.tensor(b), "multiplier": multiplier, "shift": shift}
    return r.emit(Add, out, r.act(op, out), **fields)


def _mul(r: _Reader, op: Any) -> None:
    (a, b), out = op.inputs, int(op.outputs[0])
    constant = [r.is_constant(n) for n in (a, b)]
    if any(constant):
        return _with_constant(r, op, a if constant[1] else b, b if constant[1] else a, np.multiply)
    if r.of(a).size < r.of(b).size:
        a, b = b, a
    fields = {"a": r.tensor(a), "b": r.tensor(b), **mul_factor(r.of(a), r.of(b), r.of(out))}
    return r.emit(Mul, out, r.act(op, out), **fields)


def _with_constant(r: _Reader, op: Any, x: int, number: int, function: Callable[..., Any]) -> None:
    """A sum or product with one stored number, as a table."""
    stored, out = r.constant(number).reshape(-1), int(op.outputs[0])
    if stored.size != 1:
        raise UserError(f"an addition or product has {stored.size} stored numbers; one, or a second map, is supported")
    scale, zero = r.quantization(r.graph.tensors[int(number)])
    real = np.float64(scale[0]) * (int(stored[0]) - int(zero[0]))
    _table(r, op, lambda v: function(v, real), x=x, act=r.act(op, out))


def _table(
    r: _Reader, op: Any, function: Callable[..., Any], x: int | None = None, act: dict[str, int] | None = None
) -> None:
    number, out = op.inputs[0] if x is None else x, int(op.outputs[0])
    act = act or FREE
    table = np.clip(tables.tabulate(function, r.of(number), r.of(out)), act["low"], act["high"])
    r.emit(Lookup, out, FREE, x=r.tensor(number), table=table)


def _hard_swish(r: _Reader, op: Any) -> None:
    x, out = op.inputs[0], int(op.outputs[0])
    r.emit(Lookup, out, FREE, x=r.tensor(x), table=tables.lite_hard_swish(r.of(x), r.of(out)))


def _relu(act: str) -> Callable[[_Reader, Any], None]:
    def read(r: _Reader, op: Any) -> None:
        x, out = op.inputs[0], int(op.outputs[0])
        bounds = limits(act, r.of(out))
        table = np.clip(tables.requantize(r.of(x), r.of(out)), bounds["low"], bounds["high"])
        r.emit(Lookup, out, FREE, x=r.tensor(x), table=table)

    return read


def _mean(r: _Reader, op: Any) -> None:
    x, out = op.inputs[0], int(op.outputs[0])
    if sorted(int(n) % 4 for n in r.constant(op.inputs[1], np.int32)) != [1, 2]:
        raise UserError("a mean is not over rows and columns; only global pooling is supported")
    rows, columns, _ = r.of(x).shape
    r.emit(Mean, out, FREE, x=r.tensor(x), **mean_factor(r.of(x), r.of(out), rows * columns))


def _pool(kind: type[Pool]) -> Callable[[_Reader, Any], None]:
    def read(r: _Reader, op: Any) -> None:
        x, out, o = op.inputs[0], int(op.outputs[0]), op.builtinOptions
        if (scale_of(r.of(x)), r.of(x).zero) != (scale_of(r.of(out)), r.of(out).zero):
            raise UserError("a pool changes the quantization; its input and output must share scale and zero point")
        if int(x) in r.padding and kind is Pool:
            raise UserError("an average pool counts padding; it must count pixels alone")
        kernel = (o.filterHeight, o.filterWidth)
        r.emit(kind, out, r.act(op, out), x=r.tensor(x), kernel=kernel, **r.place(op, kernel, out))

    return read


def _pad(r: _Reader, op: Any) -> None:
    """Taken into what reads it."""
    x, out = int(op.inputs[0]), int(op.outputs[0])
    around = r.constant(op.inputs[1], np.int32).reshape(-1, 2)
    r.index[out] = r.tensor(x)
    r.padding[out] = (int(around[1, 0]), int(around[2, 0]))
    r.shapes[out] = _map(r.graph.tensors[out].shape)


def _same(r: _Reader, op: Any) -> None:
    """A new shape, or another order of axes, that leaves every element where it is."""
    x, out = int(op.inputs[0]), int(op.outputs[0])
    before, after = ([int(n) for n in r.graph.tensors[i].shape] for i in (x, out))
    if not r.index:  # the image may come channels first; ours comes as the first operator reads it
        r.tensor(out)
        return
    flat = _map(before)[2] == int(np.prod(before)) or _map(after)[2] == int(np.prod(after))
    if not flat:
        raise UserError(f"a tensor of shape {before} becomes {after}; only flattening is supported")
    if r.of(x).shape != _map(after):
        r.index[out] = r.tensor(x)  # a linear layer reads the map as it is
    else:
        r.index[out] = r.tensor(x)


def _quantize(r: _Reader, op: Any) -> None:
    x, out = int(op.inputs[0]), int(op.outputs[0])
    if r.kinds[r.graph.tensors[x].type] == "FLOAT32":
        r.tensor(out)
    else:
        r.emit(Lookup, out, FREE, x=r.tensor(x), table=tables.requantize(r.of(x), r.of(out)))


def _dequantize(r: _Reader, op: Any) -> None:
    r.index[int(op.outputs[0])] = r.tensor(op.inputs[0])


OPS: dict[str, Callable[[_Reader, Any], None]] = {
    "CONV_2D": _convolution,
    "FULLY_CONNECTED": _convolution,
    "DEPTHWISE_CONV_2D": _depthwise,
    "ADD": _add,
    "MUL": _mul,
    "MEAN": _mean,
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
