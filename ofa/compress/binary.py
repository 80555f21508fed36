"""Weights of one or two bits, and inputs of one: BinaryConnect, XNOR-Net, ternary weight networks.

C output channels, N images, H x W pixels.  Gradients go straight through the signs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ofa.compress.affine import per_channel, straight
from ofa.compress.chain import Work
from ofa.compress.kmeans import bake
from ofa.compress.layers import Layer, listed, patterns, put, weight_layers
from ofa.compress.sparsity import hold_zeros
from ofa.errors import UserError
from ofa.finetune import Finetuning

THRESHOLD = 0.7  # of ternary weights, times their mean magnitude (Li et al. 2016, eq. 6)


def sign(x: Tensor) -> Tensor:
    """1 where x is at least 0, else -1; the gradient passes where |x| is at most 1 (Hubara et al. 2016, eq. 4)."""
    clipped = x.clamp(-1, 1)
    return clipped + (torch.where(x >= 0, 1.0, -1.0) - clipped).detach()


def binary(weight: Tensor) -> Tensor:
    """Signs times the mean magnitude of the layer: BinaryConnect, whose scale batch norm takes up."""
    return torch.where(weight >= 0, 1.0, -1.0) * weight.abs().mean()


def scaled_binary(weight: Tensor) -> Tensor:
    """Signs times the mean magnitude of each output channel (C, ...) (Rastegari et al. 2016, eq. 6)."""
    return torch.where(weight >= 0, 1.0, -1.0) * per_channel(weight.abs().flatten(1).mean(1), weight)


def ternary(weight: Tensor) -> Tensor:
    """-a, 0 or a: 0 below 0.7 of the mean magnitude, a the mean magnitude of the others (Li et al. 2016, eq. 5, 6)."""
    magnitude = weight.abs()
    used = magnitude > THRESHOLD * magnitude.mean()
    return weight.sign() * used * (magnitude * used).sum() / used.sum().clamp_min(1) + 0.0


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "binary": binary,
    "ternary": ternary,
    "scaled": scaled_binary,
    "xnor": scaled_binary,
}


@dataclass(frozen=True, slots=True)
class Binary:
    """Train with weights of a few levels in every layer that bears it; the others stay float.

    kind: "binary" (BinaryConnect), "ternary" (TWN), "scaled" (binary with a scale for each channel), or "xnor", which
    also makes the layers' inputs binary behind a batch norm of their own (XNOR-Net's order of layers).  The first and
    the last layer, depthwise convolutions, squeeze-excite's layers (their input is one pixel) and `keep` stay float.
    Weights that are 0 stay 0 where there is such a level.
    """

    kind: str = "ternary"
    keep: tuple[str, ...] = ()
    finetuning: Finetuning = field(default_factory=lambda: Finetuning(lr=0.01))

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", patterns(self.keep))
        if self.kind not in KINDS:
            raise UserError(f"kind {self.kind!r} is not known; choose from {', '.join(KINDS)}")

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """The trained network; its weights are plain ones of at most three values for each layer or channel."""
        hold = hold_zeros(net)
        net = copy.deepcopy(net)
        bearers = bearing(net, self.keep)
        for name, layer in bearers.items():
            bearer: nn.Module = _xnor(layer, name) if self.kind == "xnor" else layer
            put(net, name, bearer)
            parametrize.register_parametrization(bearer, "weight", Levels(self.kind))

        def after(one: nn.Module) -> None:
            clip_weights(one)
            hold(one)  # what was pruned stays so, among ternary weights and in layers that stay float

        trained = work.finetune(net, self.finetuning, after)
        layers = weight_layers(bake(trained))
        for name in bearers if self.kind in ("scaled", "xnor") else ():
            layers[name].register_buffer("weight_scale", layers[name].weight.detach().flatten(1).abs().amax(1))
        return trained.eval()


def bearing(net: nn.Module, keep: tuple[str, ...] = ()) -> dict[str, Layer]:
    """The layers that bear weights of a few levels; raises UserError where there is none."""
    every = weight_layers(net)
    ends = (next(iter(every)), next(reversed(every)))
    gates = {f"{name}.{part}" for name, m in net.named_modules() if hasattr(m, "gate") for part in ("reduce", "expand")}
    found = {
        name: layer
        for name, layer in weight_layers(net, keep).items()
        if name not in (*ends, *gates) and not (isinstance(layer, nn.Conv2d) and layer.groups > 1)
    }
    if not found:
        raise UserError(f"no layer bears binary weights: {listed(list(every))} are the first, the last or depthwise")
    return found


class Levels(nn.Module):
    """A trained weight as its levels; gradients go straight through."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, weight: Tensor) -> Tensor:
        """(C, ...) to the same."""
        return straight(weight, KINDS[self.kind](weight.detach()))


@torch.no_grad()
def clip_weights(net: nn.Module) -> None:
    """Clip trained weights to magnitude 1, in place (Courbariaux et al. 2015, sec. 2.4)."""
    for module in net.modules():
        if parametrize.is_parametrized(module, "weight"):
            module.parametrizations["weight"].original.clamp_(-1, 1)  # type: ignore[index, union-attr]


class XnorConv2d(nn.Conv2d):
    """A convolution of signs: batch norm, sign, convolution, times the mean magnitude of what each output pixel reads.

    Rastegari et al. 2016, eq. 10 and 11: I * W is about (sign(I) * sign(W)) K a, where a is in the weight.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            bias=conv.bias is not None,
            device=conv.weight.device,
        )
        self.load_state_dict(conv.state_dict())
        self.norm = nn.BatchNorm2d(conv.in_channels, device=conv.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) to (N, C, H / stride, W / stride)."""
        x = self.norm(x)
        box = x.new_full((1, 1, *self.kernel_size), 1 / (self.kernel_size[0] * self.kernel_size[1]))
        k = F.conv2d(x.detach().abs().mean(1, keepdim=True), box, None, self.stride, self.padding, self.dilation)
        y = F.conv2d(sign(x), self.weight, None, self.stride, self.padding, self.dilation) * k
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


def _xnor(layer: Layer, name: str) -> XnorConv2d:
    if not isinstance(layer, nn.Conv2d) or isinstance(layer.padding, str):
        raise UserError(f"{name} is a {type(layer).__name__}; xnor takes convolutions with padding in pixels: keep it")
    if more := set(layer.state_dict()) - {"weight", "bias"}:
        raise UserError(
            f"an earlier step gave {name} also {min(more)}; put xnor before the steps that quantize, and give it once"
        )
    return XnorConv2d(layer)
