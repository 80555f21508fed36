"""A plain network as an ONNX graph: traced by torch.fx, batch norm folded, one small function per operator.

Written directly, since that takes 0.05 s where torch.onnx.export takes 3 s and more for each net, and keeps the global
pools whole, for which ONNX Runtime has int8 kernels.  C, H, W: channels and sides of the input.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ofa.compress.affine import drop_grids
from ofa.compress.fold import normed
from ofa.errors import UserError, said
from ofa.export.grids import grid_operands

OPSET = 17
IR_VERSION = 8
INPUT, OUTPUT = "input", "output"


class Writer:
    """Nodes and weights gathered so far; every `emit` and `weight` returns the name of the tensor it made.

    grids: whether weights and what layers read are written as the 8-bit numbers that they are on the grids of, in
    ONNX Runtime's QDQ form.
    """

    def __init__(self, *, grids: bool = False) -> None:
        self.grids = grids
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def emit(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Add one node, whose only output carries its name."""
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def weight(self, name: str, value: torch.Tensor) -> str:
        """Add one constant."""
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value.detach().cpu().numpy()), name))
        return name


def _operands(w: Writer, name: str, m: nn.Conv2d | nn.Linear, x: str) -> list[str]:
    """What a layer reads, its weight and its bias; by name, for a layer that was parametrized has them in any order."""
    if w.grids:
        return grid_operands(w, name, m, x)
    held = {"weight": m.weight, "bias": m.bias}
    return [x, *(w.weight(f"{name}.{key}", value) for key, value in held.items() if value is not None)]


def _conv(w: Writer, name: str, m: nn.Conv2d, x: str) -> str:
    if isinstance(m.padding, str) or m.padding_mode != "zeros":
        raise UserError(f"{name} pads by {m.padding!r} ({m.padding_mode}); ONNX export needs zeros and numbers")
    sizes = {"kernel_shape": m.kernel_size, "strides": m.stride, "dilations": m.dilation, "pads": m.padding * 2}
    return w.emit("Conv", name, *_operands(w, name, m, x), group=m.groups, **sizes)


def _linear(w: Writer, name: str, m: nn.Linear, x: str) -> str:
    return w.emit("Gemm", name, *_operands(w, name, m, x), transB=1)


def _pool(w: Writer, name: str, m: nn.AdaptiveAvgPool2d, x: str) -> str:
    if m.output_size not in (1, (1, 1)):
        raise UserError(f"{name} pools to {m.output_size}; only global pools (1) can be exported")
    return w.emit("GlobalAveragePool", name, x)


def _max_pool(w: Writer, name: str, m: nn.MaxPool2d, x: str) -> str:
    if (m.ceil_mode, _two(m.dilation), m.return_indices) != (False, [1, 1], False):
        raise UserError(f"{name} rounds up, dilates or returns indices; only plain max pooling can be exported")
    sizes = {"kernel_shape": _two(m.kernel_size), "strides": _two(m.stride), "pads": _two(m.padding) * 2}
    return w.emit("MaxPool", name, x, **sizes)


def _avg_pool(w: Writer, name: str, m: nn.AvgPool2d, x: str) -> str:
    if _two(m.padding) != [0, 0] or m.divisor_override is not None:
        raise UserError(f"{name} pads or has a divisor of its own; only plain average pooling can be exported")
    sizes = {"kernel_shape": _two(m.kernel_size), "strides": _two(m.stride)}
    return w.emit("AveragePool", name, x, ceil_mode=int(m.ceil_mode), **sizes)


def _two(value: int | tuple[int, ...]) -> list[int]:
    return list(value) if isinstance(value, tuple) else [value, value]


def _relu6(w: Writer, name: str, m: nn.ReLU6, x: str) -> str:
    limits = [w.weight(f"{name}.{key}", torch.tensor(value)) for key, value in (("low", 0.0), ("high", 6.0))]
    return w.emit("Clip", name, x, *limits)


def _flatten(w: Writer, name: str, x: str, start_dim: int = 0, end_dim: int = -1) -> str:
    if (start_dim, end_dim) != (1, -1):
        raise UserError(f"{name} flattens dimensions {start_dim} to {end_dim}; only 1 to -1 can be exported")
    return w.emit("Flatten", name, x)


MODULES: dict[type, Callable[..., str]] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.AdaptiveAvgPool2d: _pool,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.ReLU: lambda w, name, m, x: w.emit("Relu", name, x),
    nn.ReLU6: _relu6,
    nn.Hardswish: lambda w, name, m, x: w.emit("HardSwish", name, x),
    nn.Hardsigmoid: lambda w, name, m, x: w.emit("HardSigmoid", name, x, alpha=1 / 6, beta=0.5),
    nn.Flatten: lambda w, name, m, x: _flatten(w, name, x, m.start_dim, m.end_dim),
    nn.Identity: lambda w, name, m, x: x,
    nn.Dropout: lambda w, name, m, x: x,
}
FUNCTIONS: dict[Any, Callable[..., str]] = {
    operator.add: lambda w, name, a, b: w.emit("Add", name, a, b),
    operator.mul: lambda w, name, a, b: w.emit("Mul", name, a, b),
    torch.minimum: lambda w, name, a, b: w.emit("Min", name, a, b),
    torch.relu: lambda w, name, x: w.emit("Relu", name, x),
    torch.flatten: _flatten,
    "flatten": _flatten,
}


def onnx_model(net: nn.Module, shape: tuple[int, int, int], *, grids: bool = False) -> onnx.ModelProto:
    """The network in evaluation mode as ONNX: input "input" (batch, *shape), output "output" (batch, classes), float32.

    net: modules of `MODULES` joined by `FUNCTIONS`; batch norm must follow a convolution, which takes it in.
    grids: write a quantized network's whole numbers and grids, as QDQ; else those of activations are left out, with a
    warning.  Raises UserError, naming it, for any other operator.
    """
    traced = trace(copy.deepcopy(net if grids else drop_grids(net, "ONNX")).eval())
    traced.graph.eliminate_dead_code()
    modules = fold_batch_norms(traced)
    writer, names = Writer(grids=grids), {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            names[node] = INPUT
        elif node.op == "get_attr":
            names[node] = writer.weight(node.name, operator.attrgetter(str(node.target))(traced))
        elif node.op == "output":
            if not writer.nodes or names.get(_only(node)) != writer.nodes[-1].name:
                raise UserError(f"the network gives {node.args[0]}; ONNX export needs one output: the logits")
            writer.nodes[-1].output[0] = OUTPUT
        else:
            args = [names[a] if isinstance(a, fx.Node) else a for a in node.args]
            names[node] = _emit(writer, node, modules, args)
    return _model(writer, shape, classes=_width(writer))


def trace(net: nn.Module) -> fx.GraphModule:
    """The network's graph, in which all maps are positional arguments, as in torch.flatten(input=x)."""
    traced = fx.symbolic_trace(net)
    for node in traced.graph.nodes:
        maps = {key: node.kwargs[key] for key in ("input", "other") if key in node.kwargs}
        node.args = (*node.args, *maps.values())
        node.kwargs = {key: value for key, value in node.kwargs.items() if key not in maps}
    return traced


def _only(node: fx.Node) -> fx.Node | None:
    """The node that an output returns, None where it returns anything else."""
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _emit(writer: Writer, node: fx.Node, modules: dict[str, nn.Module], args: list[Any]) -> str:
    if node.op == "call_module":
        module = modules[str(node.target)]
        emit, what = MODULES.get(type(module)), type(module).__name__
        args = [module, *args]
    else:
        emit, what = FUNCTIONS.get(node.target), str(node.target)
    if any(isinstance(arg, int | float) for arg in args) and node.target in (operator.add, operator.mul):
        raise UserError(f"{node.name} has a number among {node.args}; only sums and products of two maps are exported")
    if emit is None:
        known = ", ".join(sorted(kind.__name__ for kind in MODULES))
        raise UserError(f"{node.name} is a {what}, which cannot be exported; use {known}, add, multiply, flatten")
    return emit(writer, node.name, *args, **node.kwargs)


def fold_batch_norms(traced: fx.GraphModule) -> dict[str, nn.Module]:
    """Modules by name, in which each convolution has taken in the batch norm behind it, now an Identity."""
    modules = dict(traced.named_modules())
    for (first, behind), (conv, norm) in normed(traced.graph, traced).items():
        modules |= {first: fuse_conv_bn_eval(conv, norm), behind: nn.Identity()}
    return modules


def _width(writer: Writer) -> int:
    """Channels that the last layer with weights gives."""
    last = next(node for node in reversed(writer.nodes) if node.op_type in ("Conv", "Gemm"))
    weight = (last.input[1], f"{last.input[1]}.values")
    return next(int(tensor.dims[0]) for tensor in writer.weights if tensor.name in weight)


def _model(writer: Writer, shape: tuple[int, int, int], classes: int) -> onnx.ModelProto:
    image = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *shape])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", classes])
    graph = helper.make_graph(writer.nodes, "network", [image], [logits], writer.weights)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="ofa-nas")
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.shape_inference.InferenceError as error:
        raise UserError(f"the network does not give logits (N, {classes}): {said(error)}; let it end flat") from None
    return model
