"""Bits of a network's weights and inputs, and the bit-operations that follow.  C channels, R x R pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ofa.compress.affine import ActivationGrid
from ofa.compress.layers import Layer, layer_macs, weight_layers

MOST = 256  # different values, or steps of a scale, of a weight that is not float


@dataclass(frozen=True, slots=True)
class LayerBits:
    """One layer: its multiply-adds on one image, and the bits of its weights and of what it reads (32: float)."""

    name: str
    macs: int
    weight_bits: int
    input_bits: int

    @property
    def bit_operations(self) -> int:
        """Multiply-adds x bits x bits (Zhou et al. 2016; Uhlich et al. 2020)."""
        return self.macs * self.weight_bits * self.input_bits


def layer_bits(net: nn.Module, image: Tensor) -> list[LayerBits]:
    """Every convolution and linear layer of a network, from the values that its weights have.

    A weight on whole multiples of its `weight_scale` has the bits of their span, one of few different values those of
    their number; a codebook's index is counted like a number.  image: (1, C, R, R).
    """
    macs = layer_macs(net, image)
    return [
        LayerBits(name, macs[name], weight_bits(layer), _input_bits(layer))
        for name, layer in weight_layers(net).items()
    ]


def bit_operations(net: nn.Module, image: Tensor) -> int:
    """Bit-operations of a whole network on one image (1, C, R, R)."""
    return sum(layer.bit_operations for layer in layer_bits(net, image))


@torch.no_grad()
def weight_bits(layer: Layer) -> int:
    """Bits of each of a layer's weights, 1 to 8, or 32."""
    weight, scale = layer.weight.detach(), getattr(layer, "weight_scale", None)
    magnitude = weight.flatten(1).abs()
    if magnitude.shape[1] > 1 and bool((magnitude == magnitude[:, :1]).all()):
        return 1  # signs, with a scale for each channel
    if isinstance(scale, Tensor):
        numbers = weight / scale.view(-1, *[1] * (weight.ndim - 1))
        span = int(numbers.max().round() - numbers.min().round()) + 1
        if span <= MOST and torch.allclose(numbers, numbers.round(), atol=1e-3):
            return max(1, (span - 1).bit_length())
    values, others = len(weight.unique()), weight[weight != 0]
    shared = 4 * len(others.unique()) <= 3 * len(others)  # which those of a sparse float layer are not
    return max(1, (values - 1).bit_length()) if values <= MOST and shared else 32


def _input_bits(layer: Layer) -> int:
    quantizer = layer._modules.get("input_grid")
    return quantizer.bits if isinstance(quantizer, ActivationGrid) else 1 if hasattr(layer, "norm") else 32
