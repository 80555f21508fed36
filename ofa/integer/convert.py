"""A PyTorch network as an integer-only one: batch norm folded, ranges from calibration images.

Weights are symmetric with a scale for each output channel, activations asymmetric with one for each tensor (Jacob et
al. 2018; Krishnamoorthi 2018).  Images are (N, C, H, W), maps of the result (H, W, C).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ofa.compress.affine import drop_grids
from ofa.compress.equalize import uncapped
from ofa.errors import UserError
from ofa.export.graph import fold_batch_norms, trace
from ofa.integer import tables
from ofa.integer.factors import FREE, add_factors, conv_factors, limits, mean_factor, mul_factor
from ofa.integer.fixed import LIMIT
from ofa.integer.net import Add, Conv, Depthwise, IntegerNet, Lookup, MaxPool, Mean, Mul, Op, Pair, Pool, Shape, Tensor

Ranges = dict[str, tuple[float, float]]
FUSED: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
SAME = (nn.Identity, nn.Dropout, nn.Flatten)
TABLES: dict[type, Callable[..., Any]] = {
    nn.Hardswish: tables.hard_swish,
    nn.Hardsigmoid: tables.hard_sigmoid,
    nn.Sigmoid: tables.logistic,
}
GATES = (nn.Hardsigmoid, nn.Sigmoid)  # give 0..1 whatever they get
POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def from_net(
    net: nn.Module, batches: Iterable[torch.Tensor], *, ranges: Mapping[str, tuple[float, float]] | None = None
) -> IntegerNet:
    """Quantize a network in evaluation mode after calibration on batches of normalised images (N, C, H, W).

    ranges: least and largest value of tensors, by their name in `record_ranges`, instead of those seen.  Grids
    of activations are left out, with a warning.  Raises UserError for an operator that has no integer form, for an
    unknown name and for no images.
    """
    traced = _traced(net)
    seen, shapes = _record(traced, batches)
    if unknown := sorted(set(ranges or {}) - set(seen)):
        raise UserError(f"ranges name {unknown[:3]}, which this network has not; its tensors are {sorted(seen)[:5]}...")
    return _Converter(traced, seen | dict(ranges or {}), shapes).net()


def record_ranges(net: nn.Module, batches: Iterable[torch.Tensor]) -> Ranges:
    """The least and largest value of every tensor of a network in evaluation mode, by its name in the traced graph."""
    return _record(_traced(net), batches)[0]


def _traced(net: nn.Module) -> fx.GraphModule:
    return trace(uncapped(drop_grids(net, "the integer form")))


class _Recorder(fx.Interpreter):
    """Runs a network and notes the range and shape of all that it makes."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.ranges: Ranges = {}
        self.shapes: dict[str, Shape] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            low, high = self.ranges.get(n.name, (float("inf"), float("-inf")))
            self.ranges[n.name] = (min(low, float(value.min())), max(high, float(value.max())))
            shape = value.shape[1:]
            self.shapes[n.name] = (shape[1], shape[2], shape[0]) if len(shape) == 3 else (1, 1, shape[0])
        return value


@torch.no_grad()
def _record(traced: fx.GraphModule, batches: Iterable[torch.Tensor]) -> tuple[Ranges, dict[str, Shape]]:
    recorder = _Recorder(traced)
    for batch in batches:
        recorder.run(batch)
    if not recorder.ranges:
        raise UserError("quantization got no calibration images; give at least one batch")
    if wrong := [name for name, pair in recorder.ranges.items() if not np.isfinite(pair).all()]:
        raise UserError(f"tensor {wrong[0]} is not finite on the calibration images; train or recalibrate the network")
    return recorder.ranges, recorder.shapes


class _Converter:
    """Goes through a traced network and gathers tensors and operators."""

    def __init__(self, traced: fx.GraphModule, ranges: Ranges, shapes: dict[str, Shape]) -> None:
        self.nodes = list(traced.graph.nodes)
        self.modules = fold_batch_norms(traced)
        self.ranges, self.shapes = ranges, shapes
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.index: dict[fx.Node, int] = {}

    def net(self) -> IntegerNet:
        """The whole network."""
        for node in self.nodes:
            if node.op == "output":
                return IntegerNet(tuple(self.tensors), tuple(self.ops), 0, self.index[node.args[0]])
            if node not in self.index:
                self.convert(node)
        raise AssertionError("a traced network has an output")

    def convert(self, node: fx.Node) -> None:
        """Add what a node stands for."""
        if node.op == "placeholder":
            self.index[node] = self.tensor(node)
            return
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        what = type(module).__name__ if module is not None else str(node.target)
        convert = MODULES.get(type(module)) if module is not None else FUNCTIONS.get(node.target)
        if convert is None:
            known = ", ".join(sorted(kind.__name__ for kind in MODULES))
            raise UserError(f"{node.name} is a {what}, which has no integer form; use {known}, add, multiply, flatten")
        convert(self, node, module)

    def tensor(
        self,
        node: fx.Node,
        *,
        like: Tensor | None = None,
        span: tuple[float, float] | None = None,
        shape: Shape | None = None,
    ) -> int:
        """A new tensor of a node's shape, or a given one: of its range, of a given one, or quantized like another."""
        if like is None:
            scale, zero = affine(*(span or self.ranges[node.name]))
        else:
            scale, zero = like.scale, like.zero
        self.tensors.append(Tensor(node.name, shape or self.shapes[node.name], scale, zero))
        return len(self.tensors) - 1

    def of(self, node: Any) -> Tensor:
        """The tensor that a node reads."""
        return self.tensors[self.index[node]]

    def fused(self, node: fx.Node, shape: Shape | None = None) -> tuple[Tensor, dict[str, Any]]:
        """A new tensor for a node, and for the ReLU behind it where only that reads it; with the operator's clamp.

        shape: other than the node's, of a map that PyTorch has flattened and that is left as it lies.
        """
        chain, act = [node], "none"
        while act == "none" and len(chain[-1].users) == 1:
            user = next(iter(chain[-1].users))
            kind = type(self.modules.get(str(user.target))) if user.op == "call_module" else None
            if kind not in FUSED and (kind not in SAME or self.shapes[user.name] != self.shapes[node.name]):
                break
            act = FUSED.get(kind, "none")
            chain.append(user)
        number = self.tensor(chain[-1], shape=shape)
        self.index |= dict.fromkeys(chain, number)
        y = self.tensors[number]
        return y, {"y": number, **limits(act, y)}


def affine(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of int8 numbers over low..high, which is widened to hold 0; 0..1 where that is all it holds.

    What was 0 on every image, as behind a ReLU, would else have a scale that no factor leads to.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    high = 1.0 if low == high else high
    scale = float(np.float32(max(high - low, 1e-12) / 255))
    return scale, int(np.clip(np.rint(-128 - low / scale), -128, 127))


def _filters(
    c: _Converter, node: fx.Node, weight: np.ndarray, bias: torch.Tensor | None, **place: Any
) -> dict[str, Any]:
    """The fields of a convolution of float weights (K, kh, kw, C) or (C, kh, kw)."""
    x, n = c.of(node.args[0]), len(weight)
    b = np.zeros(n) if bias is None else bias.detach().cpu().double().numpy()
    widest = np.abs(weight.reshape(n, -1)).max(1)
    # A filter of next to no weights gets a scale at which its bias takes half of the room that a sum has.
    scale = np.maximum(widest / 127, np.abs(b) / (np.float64(x.scale) * LIMIT / 2)).clip(1e-12).astype(np.float32)
    y, fields = c.fused(node)
    multiplier, shift = conv_factors(x, scale, y, n)
    q = np.rint(weight / scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))).clip(-127, 127).astype(np.int8)
    bias_q = np.rint(b / (np.float64(x.scale) * scale.astype(np.float64))).astype(np.int32)
    fields |= {"x": c.index[node.args[0]], "weight": np.ascontiguousarray(q), "bias": bias_q}  # type: ignore[index]
    return fields | {"multiplier": multiplier, "shift": shift} | place


def _conv(c: _Converter, node: fx.Node, m: nn.Conv2d) -> None:
    if isinstance(m.padding, str) or m.padding_mode != "zeros" or m.dilation != (1, 1):
        raise UserError(f"{node.name} pads by {m.padding!r} or is dilated; only zeros and plain windows have a form")
    if any(pad >= side for pad, side in zip(m.padding, m.kernel_size, strict=True)):
        raise UserError(f"{node.name} pads windows of {m.kernel_size} by {m.padding}; pad by less than the window")
    w = m.weight.detach().cpu().double().numpy()
    place = {"stride": m.stride, "pad": m.padding}
    if m.groups == 1:
        c.ops.append(Conv(**_filters(c, node, w.transpose(0, 2, 3, 1), m.bias, **place)))
    elif m.groups == m.in_channels == m.out_channels:
        c.ops.append(Depthwise(**_filters(c, node, w[:, 0], m.bias, **place)))
    else:
        raise UserError(f"{node.name} has {m.groups} groups of several channels; use 1, or one for each channel")


def _linear(c: _Converter, node: fx.Node, m: nn.Linear) -> None:
    """A window over the whole map, which PyTorch flattens channels first."""
    rows, columns, channels = c.of(node.args[0]).shape
    w = m.weight.detach().cpu().double().numpy().reshape(-1, channels, rows, columns)
    c.ops.append(Conv(**_filters(c, node, w.transpose(0, 2, 3, 1), m.bias)))


def _global_pool(c: _Converter, node: fx.Node, m: nn.AdaptiveAvgPool2d) -> None:
    if m.output_size not in (1, (1, 1)):
        raise UserError(f"{node.name} pools to {m.output_size}; only global pools (1) have an integer form")
    x = c.of(node.args[0])
    y, fields = c.fused(node)
    c.ops.append(Mean(x=c.index[node.args[0]], **fields, **mean_factor(x, y, x.shape[0] * x.shape[1])))  # type: ignore[index]


def _pool(c: _Converter, node: fx.Node, m: nn.MaxPool2d | nn.AvgPool2d) -> None:
    kernel, stride, pad = _two(m.kernel_size), _two(m.stride), _two(m.padding)
    average = isinstance(m, nn.AvgPool2d)
    if (average and pad != (0, 0)) or getattr(m, "divisor_override", None) or _two(getattr(m, "dilation", 1)) != (1, 1):
        raise UserError(f"{node.name} averages over padding, dilates or has its own divisor; use a plain pool")
    x, number = c.of(node.args[0]), c.index[node.args[0]]  # type: ignore[index]
    y = c.index[node] = c.tensor(node, like=x)
    c.ops.append((Pool if average else MaxPool)(y=y, **FREE, x=number, kernel=kernel, stride=stride, pad=pad))


def _two(value: int | tuple[int, ...]) -> Pair:
    return (value[0], value[1]) if isinstance(value, tuple) else (value, value)


def _table(c: _Converter, node: fx.Node, m: nn.Module) -> None:
    x = c.of(node.args[0])
    gate = isinstance(m, GATES)
    number = c.index[node] = c.tensor(node, span=(0.0, 255 / 256) if gate else None, shape=x.shape)
    table = tables.tabulate(TABLES[type(m)], x, c.tensors[number])
    c.ops.append(Lookup(y=number, **FREE, x=c.index[node.args[0]], table=table))  # type: ignore[index]


def _relu(c: _Converter, node: fx.Node, m: nn.Module) -> None:
    """One that could not be fused, since others read its input too."""
    x = c.of(node.args[0])
    number = c.index[node] = c.tensor(node, shape=x.shape)
    high = 6.0 if isinstance(m, nn.ReLU6) else np.inf
    table = tables.tabulate(lambda v: np.clip(v, 0.0, high), x, c.tensors[number])
    c.ops.append(Lookup(y=number, **FREE, x=c.index[node.args[0]], table=table))  # type: ignore[index]


def _same(c: _Converter, node: fx.Node, m: nn.Module | None) -> None:
    c.index[node] = c.index[node.args[0]]  # type: ignore[index]


def _pair_of(c: _Converter, node: fx.Node) -> tuple[int, int]:
    """The two tensors that a sum or product reads."""
    if any(arg not in c.index for arg in node.args):
        raise UserError(f"{node.name} has a number among {node.args}; only two maps have an integer form")
    a, b = (c.index[arg] for arg in node.args)  # type: ignore[index]
    return a, b


def _add(c: _Converter, node: fx.Node, m: None) -> None:
    a, b = _pair_of(c, node)
    y, fields = c.fused(node, c.tensors[a].shape)
    multiplier, shift = add_factors(c.tensors[a], c.tensors[b], y)
    c.ops.append(Add(a=a, b=b, multiplier=multiplier, shift=shift, **fields))


def _mul(c: _Converter, node: fx.Node, m: None) -> None:
    a, b = sorted(_pair_of(c, node), key=lambda i: -c.tensors[i].size)
    y, fields = c.fused(node, c.tensors[a].shape)
    c.ops.append(Mul(a=a, b=b, **fields, **mul_factor(c.tensors[a], c.tensors[b], y)))


MODULES: dict[type, Callable[..., None]] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.AdaptiveAvgPool2d: _global_pool,
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(TABLES, _table),
    **dict.fromkeys(FUSED, _relu),
    **dict.fromkeys(SAME, _same),
}
FUNCTIONS: dict[Any, Callable[..., None]] = {
    operator.add: _add,
    operator.mul: _mul,
    torch.flatten: _same,
    "flatten": _same,
}
