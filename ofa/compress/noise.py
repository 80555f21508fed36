"""What quantizing one layer alone does to a network's outputs.  L layers, B choices of bits, K classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa.compress.affine import ActivationGrid
from ofa.compress.calibrate import observe
from ofa.compress.fidelity import logits
from ofa.compress.fold import fold_batch_norms
from ofa.compress.layers import weight_layers
from ofa.compress.linear import Linear, input_grid, quantize_weight


def layer_noise(
    net: nn.Module,
    settings: Linear,
    weight_choices: Sequence[int],
    input_choices: Sequence[int],
    batches: Sequence[Tensor],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Noise over signal of the logits with one layer's weights, or its inputs, quantized: (L, B) of each.

    Such noise is small and almost independent between layers, so that it adds up: a network's noise is about the sum
    over its layers (Zhou et al. 2018, "Adaptive quantization for deep neural network").  batches: of images
    (N, C, H, W), for calibration and for the logits.
    """
    net = fold_batch_norms(net)
    layers, exact = weight_layers(net), logits(net, list(batches))
    seen = observe(net, layers, batches, histograms=True, moments=settings.rounding == "adaptive")
    signal = exact.double().square().sum()

    def noise() -> float:
        return float((logits(net, list(batches)).double() - exact).square().sum() / signal)

    weights = np.zeros((len(layers), len(weight_choices)))
    inputs = np.zeros((len(layers), len(input_choices)))
    for i, (name, layer) in enumerate(layers.items()):
        kept, bias = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()
        for j, bits in enumerate(weight_choices):
            quantize_weight(layer, bits, settings, seen[name])
            weights[i, j] = noise()
            with torch.no_grad():
                layer.weight.copy_(kept)
                if layer.bias is not None:
                    layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)
        for j, bits in enumerate(input_choices):
            quantizer = input_grid(seen[name], bits, settings).to(kept.device)
            inputs[i, j] = _with_inputs(layer, quantizer, noise)
    return weights, inputs


def _with_inputs(layer: nn.Module, quantizer: ActivationGrid, measure: Callable[[], float]) -> float:
    handle = layer.register_forward_pre_hook(lambda module, inputs: (quantizer(inputs[0]),))
    try:
        return measure()
    finally:
        handle.remove()
