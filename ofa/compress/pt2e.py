"""Quantization in PyTorch 2's export (PT2E) through torchao: after training, or while training goes on (QAT).

The graph that comes out computes with quantize and dequantize nodes around every layer; the step, which others may
follow, takes its numbers into plain layers.  Some pairs of torch and torchao insert no such node and say nothing, so
they are counted every time.
N images, C channels, H, W pixels.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from ofa.compress.affine import ActivationGrid, Grid, attach
from ofa.compress.chain import Work
from ofa.compress.fold import fold_batch_norms
from ofa.compress.layers import image_of, weight_layers
from ofa.compress.linear import remember
from ofa.compress.sparsity import hold_zeros
from ofa.errors import UserError
from ofa.export.runtime import inference, laid_out
from ofa.extras import extra
from ofa.finetune import Finetuning
from ofa.processor import saturates

EXTRA, PACKAGES = "quant", ("torchao",)
PT2E = "torchao.quantization.pt2e"
LAYERS = ("conv2d.default", "linear.default")
MODES = ("ptq", "qat")


@dataclass(frozen=True, slots=True)
class Pt2e:
    """A compression step: int8 weights for each output channel, uint8 activations, in ONNX Runtime's QDQ form.

    mode: ptq calibrates on `images` validation images; qat trains with rounding in place first, as `finetuning` says.
    reduce_range: activations of 7 bits, for x86 processors without VNNI, whose sums of two products saturate (None:
    where this machine's processor is one of them).
    """

    mode: str = "ptq"
    images: int = 256
    reduce_range: bool | None = None
    finetuning: Finetuning = field(default_factory=lambda: Finetuning(epochs=2, lr=0.005))

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"mode {self.mode!r} is not known; choose ptq (after training) or qat (while training)")
        if self.images < 1:
            raise UserError(f"images {self.images} must be at least 1; some hundreds calibrate well")

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A copy with batch norm folded, whose layers round weights and inputs as the graph does, in evaluation mode.

        What the graph rounds besides, such as the second input of an addition, is left as it is.  Graphs are made and
        trained on the CPU, wherever `net` is.
        """
        near, teacher = copy.deepcopy(net).cpu(), work.teacher
        batches = work.data.calibration("val", self.images, work.resolution)
        if self.mode == "ptq":
            graph = quantize(near, batches, quantizer(reduce_range=self.reduce_range))
        else:
            example = next(iter(batches))[:2]
            rules = quantizer(qat=True, reduce_range=self.reduce_range)
            hold = hold_zeros(near)
            start = Trainable(prepare(near, example, rules, qat=True))
            work = replace(work, teacher=None if teacher is None else copy.deepcopy(teacher).cpu())
            trained = work.finetune(start, self.finetuning, lambda one: hold(one.graph))
            graph = convert(trained.graph)
        return plain_layers(graph, net, image_of(net, work))


class Trainable(nn.Module):
    """An exported graph that can be switched between training and evaluation like any module."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, K)."""
        return self.graph(x)

    def train(self, mode: bool = True) -> Self:
        """Switch batch norm and dropout of the graph."""
        tools, self.training = extra(PT2E, EXTRA), mode
        switch = tools.move_exported_model_to_train if mode else tools.move_exported_model_to_eval
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            switch(self.graph)
        return self


def quantizer(*, qat: bool = False, reduce_range: bool | None = None) -> Any:
    """The rules that suit x86 and ONNX Runtime: uint8 activations, int8 weights by channel."""
    reduce = saturates() if reduce_range is None else reduce_range
    x86 = extra("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", EXTRA)
    return x86.X86InductorQuantizer().set_global(
        x86.get_default_x86_inductor_quantization_config(is_qat=qat, reduce_range=reduce)
    )


def quantize(net: nn.Module, batches: Iterable[Tensor], rules: Any, *, dynamic: bool = True) -> fx.GraphModule:
    """Post-training quantization under a quantizer's rules, calibrated on batches (N, C, H, W).

    dynamic: whether the graph takes any number of images; otherwise one, which some converters need.
    """
    graph = None
    for batch in batches:
        graph = prepare(net, batch[:2], rules, dynamic=dynamic) if graph is None else graph
        with torch.inference_mode():
            for part in [batch] if dynamic else batch.split(1):
                graph(laid_out(part))
    if graph is None:
        raise UserError("quantization got no calibration images; give at least one batch")
    return convert(graph)


def prepare(net: nn.Module, example: Tensor, rules: Any, *, qat: bool = False, dynamic: bool = True) -> fx.GraphModule:
    """The exported graph with observers, or in QAT with fake quantization; raises RuntimeError where it got none."""
    tools = extra(f"{PT2E}.quantize_pt2e", EXTRA)
    plain = inference(net).train(qat)
    batch = {0: torch.export.Dim("batch", min=1)} if dynamic else None
    example = laid_out(example[:1].repeat(1 + dynamic, 1, 1, 1))  # one image would be taken for a constant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(plain, (example,), dynamic_shapes=(batch,)).module()
        try:
            graph = (tools.prepare_qat_pt2e if qat else tools.prepare_pt2e)(exported, rules)
        except ValueError as error:  # of patterns that it does not take apart
            raise UserError(f"torchao cannot quantize {type(net).__name__} ({error}); take step=int8") from error
    watched = sum("activation_post_process" in str(node.target) for node in graph.graph.nodes)
    if not watched:
        raise RuntimeError("torchao inserted no observer; it needs torch 2.13 or newer")
    return graph


def convert(graph: fx.GraphModule) -> fx.GraphModule:
    """The prepared graph in int8, in evaluation mode; raises RuntimeError where a layer was left in float."""
    tools = extra(f"{PT2E}.quantize_pt2e", EXTRA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = tools.convert_pt2e(copy.deepcopy(graph))
        extra(PT2E, EXTRA).move_exported_model_to_eval(converted)
        extra(PT2E, EXTRA).allow_exported_model_train_eval(converted)
    count_nodes(converted)
    return converted


def count_nodes(graph: fx.GraphModule) -> dict[str, int]:
    """How many quantize, dequantize and layer nodes a graph has.

    Raises RuntimeError unless every convolution and linear layer reads dequantized values and weights.
    """
    kinds = Counter(_kind(node) for node in graph.graph.nodes)
    layers = [node for node in graph.graph.nodes if _kind(node) in LAYERS]
    floats = [node.name for node in layers if not all(_dequantized(arg) for arg in node.args[:2])]
    if floats or not layers:
        raise RuntimeError(f"quantization left {len(floats)} of {len(layers)} layers in float: {floats[:3]}")
    named = {
        "quantize": sum(n for kind, n in kinds.items() if kind.startswith("quantize_per")),
        "dequantize": sum(n for kind, n in kinds.items() if kind.startswith("dequantize_per")),
    }
    return named | {"layers": len(layers)}


@torch.no_grad()
def plain_layers(graph: fx.GraphModule, net: nn.Module, image: Tensor) -> nn.Module:
    """A copy of `net`, batch norm folded, with the weights, biases and input grids of its converted graph.

    image: (1, C, H, W).  Layers are told apart by name, since torchao's rewrite for QAT changes the order they run in.
    """
    plain, read = fold_batch_norms(net), _Arguments(graph)
    layers = weight_layers(plain)
    read.run(laid_out(image.cpu()).expand(2, -1, -1, -1))
    for name, (weight, bias, weight_grid, input_grid) in read.layers.items():
        layer = layers[name]
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(layer.weight))
        remember(layer, weight_grid)
        attach(layer, ActivationGrid.of(input_grid, 8).to(layer.weight.device))
    return plain


class _Arguments(fx.Interpreter):
    """Runs a converted graph and keeps, by name, each layer's weight, bias, and grids of weight and input."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)  # grids are read once their users run
        self.layers: dict[str, tuple[Tensor, Tensor | None, Grid, Grid]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if _kind(n) in LAYERS:
            (_, weight, *more), _ = self.fetch_args_kwargs_from_env(n)
            name = list(n.meta["nn_module_stack"].values())[-1][0]  # of the innermost module
            self.layers[name] = weight, more[0] if more else None, self._grid(n.args[1]), self._grid(n.args[0])
        return super().run_node(n)

    def _grid(self, node: Any) -> Grid:
        """What a dequantize node reads: q, scale, zero, (axis,) least, most, type."""
        arguments: Any = self.map_nodes_to_values(node.args, node)
        _, scale, zero, *_, least, most, _ = arguments
        return Grid(torch.as_tensor(scale).float(), torch.as_tensor(zero).float(), int(least), int(most))


def _kind(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").removeprefix("quantized_decomposed.") if node.op != "output" else ""


def _dequantized(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and _kind(arg).startswith("dequantize_per")
