"""One operation as a small ONNX graph that repeats it, for measuring what it costs inside a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ofa.export.graph import INPUT, IR_VERSION, OPSET, OUTPUT
from predictors.shapes import Shape


def repeats(shape: Shape) -> int:
    """How often a graph repeats the operation, so that it outweighs the call of the runtime."""
    work = shape.size**2 / shape.stride**2 * shape.cin * shape.kernel**2
    work *= shape.cout if shape.op in ("conv", "linear") else 1
    return int(np.clip(1e6 // max(work, 1), 3, 12))


def graphs(shape: Shape, batch: int = 1) -> tuple[bytes, bytes, int]:
    """Two ONNX models and a number n: the second does the operation n times more often than the first.

    The operation adds to what it computed before, which ONNX Runtime fuses, so its data keep the layout that they have
    inside a network and the change of layout at the model's ends cancels.
    """
    n = repeats(shape)
    if shape.op == "squeeze_excite":
        return _model(shape, batch, _gates(shape, n, gated=False)), _model(shape, batch, _gates(shape, n)), n
    return _model(shape, batch, _sums(shape, 1)), _model(shape, batch, _sums(shape, n + 1)), n


class _Graph:
    """Nodes and weights gathered so far."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def emit(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def weight(self, *sizes: int) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(onnx.numpy_helper.from_array(_values(sizes), name))
        return name

    def conv(self, x: str, cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> str:
        weights = self.weight(cout, cin // groups, kernel, kernel), self.weight(cout)
        sizes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        return self.emit("Conv", x, *weights, group=groups, **sizes)

    def act(self, x: str, name: str) -> str:
        if name == "relu6":
            values = [np.array(v, dtype=np.float32) for v in (0, 6)]
            limits = [onnx.numpy_helper.from_array(v, f"limit_{v}_{len(self.nodes)}") for v in values]
            self.weights += limits
            return self.emit("Clip", x, *(limit.name for limit in limits))
        if name == "h_sigmoid":
            return self.emit("HardSigmoid", x, alpha=1 / 6, beta=0.5)
        return x if name == "none" else self.emit({"relu": "Relu", "h_swish": "HardSwish"}[name], x)


@lru_cache(maxsize=64)
def _values(sizes: tuple[int, ...]) -> NDArray[np.float32]:
    """Random weights that keep the scale of what they multiply."""
    scale = np.float32(1 / math.sqrt(math.prod(sizes[1:])))
    return np.random.default_rng(0).standard_normal(sizes, dtype=np.float32) * scale


Build = Callable[[_Graph, str], str]


def _sums(shape: Shape, n: int) -> Build:
    """y = act(op(x) + y), n times, on the same x with other weights each time."""

    def build(graph: _Graph, x: str) -> str:
        y = ""
        for _ in range(n):
            if shape.op == "linear":
                z = graph.emit("Gemm", x, graph.weight(shape.cout, shape.cin), graph.weight(shape.cout), transB=1)
            else:
                groups = shape.cin if shape.op == "depthwise" else 1
                z = graph.conv(x, shape.cin, shape.cout, shape.kernel, shape.stride, groups)
            y = graph.act(graph.emit("Add", z, y) if y else z, shape.act)
        return y

    return build


def _gates(shape: Shape, n: int, *, gated: bool = True) -> Build:
    """A depthwise convolution, then squeeze-excite, n times; without the latter where not `gated`."""

    def build(graph: _Graph, x: str) -> str:
        for _ in range(n):
            x = graph.act(graph.conv(x, shape.cin, shape.cin, 3, 1, shape.cin), "relu")
            if gated:
                inner = graph.act(graph.conv(graph.emit("GlobalAveragePool", x), shape.cin, shape.cout), "relu")
                x = graph.emit("Mul", x, graph.act(graph.conv(inner, shape.cout, shape.cin), "h_sigmoid"))
        return x

    return build


def _model(shape: Shape, batch: int, build: Build) -> bytes:
    square = 0 if shape.op == "linear" else 2
    after = (shape.size - 1) // shape.stride + 1
    channels = shape.cin if shape.op == "squeeze_excite" else shape.cout
    graph = _Graph()
    last = build(graph, INPUT)
    graph.nodes.append(helper.make_node("Identity", [last], [OUTPUT]))
    image = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [batch, shape.cin, *[shape.size] * square])
    result = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [batch, channels, *[after] * square])
    body = helper.make_graph(graph.nodes, "shape", [image], [result], graph.weights)
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
