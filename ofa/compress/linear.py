"""Linear quantization: weights and what layers read on evenly spaced numbers, simulated in floating point.

What the layers compute is what an integer runtime computes, up to the rounding of its accumulator's rescaling: biases
are multiples of the products' steps.  C output channels of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ofa.compress.adaround import adaptive_rounding
from ofa.compress.affine import ActivationGrid, Grid, attach, grid, on_grid, per_channel, step
from ofa.compress.calibrate import Inputs, observe
from ofa.compress.chain import Work
from ofa.compress.fold import fold_batch_norms
from ofa.compress.kmeans import FLOAT, bake, bits_for, check_bits, check_layers
from ofa.compress.layers import Layer, device_of, weight_layers
from ofa.compress.ranges import METHODS, WEIGHT_METHODS, check_method, limits, weight_limits
from ofa.compress.sparsity import hold_zeros
from ofa.errors import UserError
from ofa.finetune import Finetuning

ROUNDINGS = ("nearest", "adaptive")
BATCH = 64


@dataclass(frozen=True, slots=True)
class Linear:
    """Fold batch norm, then quantize weights, and the inputs of the layers, in float.

    weight_bits, activation_bits: 2 to 8, or 32 for float.  layers, inputs: other bits of the weights and of the inputs
    of layers that match a pattern, such as {"units.0.*": 8}; the first that matches counts.
    per_channel: a weight scale for each output channel.  symmetric, symmetric_activations: zero in the middle.
    weight_range, calibration: how ranges are found (see `ranges`), the latter on `images` calibration images of the
    validation part; percentile: percent of the values inside, for that method.
    rounding: "nearest", or "adaptive" (see `adaround`).  bias_correction: biases take up the mean change of what the
    layers compute (Nagel et al. 2019, sec. 4.2, with inputs' means measured).
    finetuning: quantization-aware training with straight-through gradients after all that (None: none);
    learned_steps: it also trains the scales (Esser et al. 2020).
    """

    weight_bits: int = 8
    activation_bits: int = 8
    layers: Mapping[str, int] | None = None
    inputs: Mapping[str, int] | None = None
    per_channel: bool = True
    symmetric: bool = True
    symmetric_activations: bool = False
    weight_range: str = "minmax"
    calibration: str = "minmax"
    percentile: float = 99.99
    images: int = 256
    rounding: str = "nearest"
    bias_correction: bool = False
    finetuning: Finetuning | None = None
    learned_steps: bool = False

    def __post_init__(self) -> None:
        for bits in (self.weight_bits, self.activation_bits):
            check_bits(bits, 2, 8)
        check_layers("layers", self.layers, 2, 8)
        check_layers("inputs", self.inputs, 2, 8)
        check_method("calibration", self.calibration, METHODS)
        check_method("weight_range", self.weight_range, WEIGHT_METHODS)
        check_method("rounding", self.rounding, ROUNDINGS)
        if self.images < 1:
            raise UserError(f"images {self.images} must be at least 1; some hundreds calibrate well")
        if not 50 < self.percentile <= 100:
            raise UserError(f"percentile {self.percentile} must be above 50 and at most 100; 99.99 is usual")

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """The network with its weights on their grids, and the grids of its layers' inputs in front of them."""
        batches = work.data.calibration("val", self.images, work.resolution, batch_size=BATCH)
        device = device_of(net)
        quantized = quantize_linear(net, self, (x.to(device) for x in batches), seed=work.seed)
        if self.finetuning is None:
            return quantized
        trained = work.finetune(_trainable(quantized, self), self.finetuning, hold_zeros(net))
        return _untrainable(trained)


def quantize_linear(net: nn.Module, settings: Linear, batches: Iterable[Tensor], *, seed: int = 0) -> nn.Module:
    """The same without training, calibrated on batches of normalised images (N, C, H, W)."""
    net = fold_batch_norms(net)
    layers = weight_layers(net)
    bits = {name: bits_for(name, settings.weight_bits, settings.layers, net) for name in layers}
    input_bits = {name: bits_for(name, settings.activation_bits, settings.inputs, net) for name in layers}
    adaptive = settings.rounding == "adaptive"
    ranged = settings.calibration != "minmax" and any(b != FLOAT for b in input_bits.values())
    calibrated = adaptive or settings.bias_correction or any(b != FLOAT for b in input_bits.values())
    rounded = {n: layer for n, layer in layers.items() if min(bits[n], input_bits[n]) != FLOAT}
    seen = observe(net, rounded, batches, histograms=ranged, moments=adaptive, seed=seed) if calibrated else {}
    for name, layer in layers.items():
        if bits[name] != FLOAT:
            quantize_weight(layer, bits[name], settings, seen.get(name))
        if input_bits[name] != FLOAT:
            attach(layer, input_grid(seen[name], input_bits[name], settings).to(layer.weight.device))
        round_bias(layer)
    return net


@torch.no_grad()
def quantize_weight(layer: Layer, bits: int, settings: Linear, seen: Inputs | None) -> None:
    """Move a layer's weight to its grid, in place; its scale, (C,) or (1,), becomes the buffer `weight_scale`."""
    exact = layer.weight.detach().contiguous()
    g = _weight_grid(exact, bits, settings)
    moments = None if seen is None else seen.moments
    weight = on_grid(exact, g) if moments is None else adaptive_rounding(exact, g, moments)
    if settings.bias_correction and seen is not None and seen.means is not None:
        correct_bias(layer, weight - exact, seen.means)
    layer.weight.copy_(weight)
    remember(layer, g)


def correct_bias(layer: Layer, change: Tensor, means: Tensor) -> None:
    """Take from the bias what a change of the weight adds to the outputs on average, in place (eq. 15 to 17).

    change: of the weight, (C, ...).  means: of the layer's input channels.
    """
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    taps = change.flatten(2).sum(2) if change.ndim > 2 else change  # (C, channels of the group)
    shift = (taps.view(groups, -1, taps.shape[1]) * means.view(groups, 1, -1)).sum(2).flatten()
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(shift))
    layer.bias.data -= shift


@torch.no_grad()
def round_bias(layer: Layer) -> None:
    """Move a layer's bias, in place, to the whole numbers that are added to sums of products.

    These are multiples of the weight's scale times the input's, where both are on grids.  A channel without weights,
    whose scale says nothing, keeps its bias.
    """
    read = layer._modules.get("input_grid")
    if layer.bias is None or not isinstance(read, ActivationGrid) or not hasattr(layer, "weight_scale"):
        return
    scale: Tensor = layer.weight_scale  # type: ignore[assignment]
    steps = scale * read.scale
    rounded = (layer.bias / steps).round() * steps
    empty = (layer.weight == 0).flatten(1).all(1) & (scale.numel() > 1)
    layer.bias.copy_(torch.where(empty, layer.bias, rounded))


def _weight_grid(weight: Tensor, bits: int, settings: Linear) -> Grid:
    low, high = weight_limits(
        weight,
        bits,
        settings.weight_range,
        symmetric=settings.symmetric,
        channels=settings.per_channel,
        percentile=settings.percentile,
    )
    return grid(per_channel(low, weight), per_channel(high, weight), bits, symmetric=settings.symmetric)


def input_grid(seen: Inputs, bits: int, settings: Linear) -> ActivationGrid:
    """The grid of what a layer reads, from what it read during calibration."""
    symmetric = settings.symmetric_activations
    low, high = limits(seen.histogram, settings.calibration, bits, symmetric=symmetric, percentile=settings.percentile)
    return ActivationGrid(low, high, bits, symmetric=symmetric)


def remember(layer: Layer, g: Grid) -> None:
    """Keep the grid of a layer's weight beside it, for the packed file and for training."""
    place = layer.weight.device
    layer.register_buffer("weight_scale", g.scale.detach().flatten().clone().to(place))
    layer.register_buffer("weight_zero", g.zero.detach().flatten().to(place), persistent=False)
    layer.weight_limits = (g.least, g.most)  # type: ignore[assignment]


class OnGrid(nn.Module):
    """A trained weight moved to its grid at every use, with straight-through gradients."""

    def __init__(self, g: Grid, *, learned: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(g.scale.clone(), requires_grad=learned)
        self.zero, self.least, self.most = g.zero, g.least, g.most

    def grid(self, weight: Tensor) -> Grid:
        """The grid, its scale with the gradient that it learns by."""
        scale: Tensor = self.scale
        if scale.requires_grad:
            scale = step(scale, weight.numel() // scale.numel(), self.most)
        return Grid(scale, self.zero, self.least, self.most)

    def forward(self, weight: Tensor) -> Tensor:
        """(C, ...) to the same."""
        return on_grid(weight, self.grid(weight))


def _trainable(net: nn.Module, settings: Linear) -> nn.Module:
    """The network, in place, with weights that are trained through their grids."""
    for layer in weight_layers(net).values():
        if hasattr(layer, "weight_limits"):
            scale, zero = (per_channel(v, layer.weight) for v in (layer.weight_scale, layer.weight_zero))  # type: ignore[arg-type]
            g = Grid(scale, zero, *layer.weight_limits)  # type: ignore[misc]
            parametrize.register_parametrization(
                layer, "weight", OnGrid(g, learned=settings.learned_steps), unsafe=True
            )
        quantizer = layer._modules.get("input_grid")
        if settings.learned_steps and isinstance(quantizer, ActivationGrid):
            start = quantizer.scale
            del quantizer.scale
            quantizer.scale = nn.Parameter(start)
    return net


def _untrainable(net: nn.Module) -> nn.Module:
    """The network, in place, with plain weights and fixed scales."""
    for layer in weight_layers(net).values():
        if parametrize.is_parametrized(layer):
            held = layer.parametrizations["weight"][0]  # type: ignore[index]
            assert isinstance(held, OnGrid)
            g = held.grid(layer.weight)
            bake(layer)
            remember(layer, g)
        quantizer = layer._modules.get("input_grid")
        if isinstance(quantizer, ActivationGrid) and quantizer.scale.requires_grad:
            learned = quantizer.scale.detach().abs().clamp_min(1e-9)
            del quantizer.scale
            quantizer.register_buffer("scale", learned)
        round_bias(layer)
    return net.eval()
