"""A network whose backward pass keeps exactly what `ofa.ondevice.memory` counts.  N images, C channels, H x W pixels.

PyTorch's own layers keep more: convolutions their input whether or not their weight moves, ReLU a float for each bit.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from ofa.modules import ConvBN, SqueezeExcite
from ofa.ondevice.memory import Plan, Update
from ofa.static import StaticNet

BITS = (1, 2, 4, 8, 16, 32, 64, 128)


class Updating(nn.Module):
    """A copy of a plain network in which only what a plan names requires gradients; batch norm is fixed."""

    def __init__(self, net: StaticNet, plan: Plan) -> None:
        super().__init__()
        self.net, self.plan = copy.deepcopy(net), plan
        for name, module in list(self.net.named_modules()):
            update = plan.get(name, Update(bias=False))
            if isinstance(module, ConvBN):
                _replace(module, update)
            elif isinstance(module, nn.Linear):
                self.net.set_submodule(name, Weighted(module, update))
            elif isinstance(module, SqueezeExcite):
                module.pool, module.relu, module.gate = Mean(), Masked("relu"), Masked("h_sigmoid")  # type: ignore[assignment]
                for side in ("reduce", "expand"):
                    setattr(module, side, Weighted(getattr(module, side), Update(bias=False)))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        for unit in self.net.units:
            linear = isinstance(unit, Weighted) and unit.weight.ndim == 2
            x = x.mean((2, 3), keepdim=True) if isinstance(unit, nn.AdaptiveAvgPool2d) else unit(_flat(x, linear))
        return x

    @torch.no_grad()
    def write_to(self, net: StaticNet) -> StaticNet:
        """A copy of the plain network with the weights and biases that moved, in evaluation mode."""
        made = copy.deepcopy(net)
        for name, module in list(made.named_modules()):
            if name not in self.plan:
                continue
            own: Any = self.net.get_submodule(name)
            if isinstance(module, ConvBN):
                module.conv.weight.copy_(own.conv.full())
                if self.plan[name].bias:
                    bn: Any = module.bn
                    bn.bias.copy_(own.bn.shift.flatten() + bn.running_mean * own.bn.scale.flatten())
            elif isinstance(module, nn.Linear):
                module.weight.copy_(own.full())
                module.bias.copy_(own.bias)
        return made.eval()


def _flat(x: Tensor, linear: bool) -> Tensor:
    return x.flatten(1) if linear else x


def _replace(module: ConvBN, update: Update) -> None:
    act = type(module.act).__name__
    module.conv = Weighted(module.conv, update)  # type: ignore[assignment]
    if isinstance(module.bn, nn.BatchNorm2d):
        module.bn = Shifted(module.bn, trained=update.bias)  # type: ignore[assignment]
    module.act = {"ReLU": Masked("relu"), "ReLU6": Masked("relu6"), "Hardswish": HardSwish()}.get(act, nn.Identity())


class Weighted(nn.Module):
    """A convolution or the classifier, of whose weight only a part (`channels` of its input) is a parameter."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, update: Update) -> None:
        super().__init__()
        self.stride: Any = layer.stride if isinstance(layer, nn.Conv2d) else None
        self.padding: Any = layer.padding if isinstance(layer, nn.Conv2d) else None
        self.groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        self.dimension = 0 if self.groups > 1 else 1
        self.register_buffer("weight", layer.weight.detach().clone())
        channels = torch.tensor(update.channels, dtype=torch.long, device=layer.weight.device)
        self.register_buffer("channels", channels)
        self.weight: Tensor
        self.channels: Tensor
        part = self.weight.index_select(self.dimension, self.channels)
        self.part = nn.Parameter(part) if update.channels else None
        bias = None if layer.bias is None else layer.bias.detach().clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=update.bias)

    def full(self) -> Tensor:
        """The whole weight with its part as it is now."""
        part = self.part
        return self.weight if part is None else self.weight.index_copy(self.dimension, self.channels, part.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (N, C) to what the layer makes of it."""
        y = _Weigh.apply(x, self.part, self)
        if self.bias is None:
            return y
        return y + (self.bias if y.ndim == 2 else self.bias.view(1, -1, 1, 1))

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer without its bias."""
        if self.stride is None:
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, self.stride, self.padding, groups=self.groups)


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Tensor | None, layer: Weighted) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        kept = x if len(layer.channels) == x.shape[1] else x.index_select(1, layer.channels)
        ctx.save_for_backward(*([kept] if ctx.needs_input_grad[1] else []))
        return layer.compute(x, layer.full())

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        layer, gx, part = ctx.layer, None, None
        weight = layer.full()
        if layer.stride is None:
            gx = gy @ weight if ctx.needs_input_grad[0] else None
            part = gy.t() @ ctx.saved_tensors[0] if ctx.needs_input_grad[1] else None
            if part is not None and len(layer.channels) == weight.shape[1]:
                part = part.index_select(1, layer.channels)
            return gx, part, None
        geometry = (layer.stride, layer.padding)
        if ctx.needs_input_grad[0]:
            gx = conv2d_input(ctx.shape, weight, gy, *geometry, groups=layer.groups)
        if ctx.needs_input_grad[1]:
            (kept,) = ctx.saved_tensors
            whole = kept.shape[1] == ctx.shape[1]
            chosen = kept.index_select(1, layer.channels) if whole else kept
            if layer.groups > 1:
                gy = gy.index_select(1, layer.channels)
            groups = chosen.shape[1] if layer.groups > 1 else 1
            part = conv2d_weight(chosen, layer.part.shape, gy, *geometry, groups=groups)
        return gx, part, None


class Shifted(nn.Module):
    """Batch norm with its statistics and scale fixed: x * scale + shift."""

    def __init__(self, bn: nn.BatchNorm2d, *, trained: bool) -> None:
        super().__init__()
        assert bn.running_mean is not None and bn.running_var is not None
        with torch.no_grad():
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            shift = bn.bias - bn.running_mean * scale
        self.register_buffer("scale", scale.view(1, -1, 1, 1).clone())
        self.scale: Tensor
        self.shift = nn.Parameter(shift.view(1, -1, 1, 1).clone(), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        return x * self.scale + self.shift


class Mean(nn.Module):
    """The mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, 1, 1)."""
        return x.mean((2, 3), keepdim=True)


class Masked(nn.Module):
    """relu, relu6 or h_sigmoid, which keep one bit for each element: whether it lies where the slope is not 0."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return _Mask.apply(x, self.name)


class HardSwish(nn.Module):
    """Hard swish, which keeps its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return F.hardswish(x)


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        function, low, high = {
            "relu": (F.relu, 0.0, float("inf")),
            "relu6": (F.relu6, 0.0, 6.0),
            "h_sigmoid": (F.hardsigmoid, -3.0, 3.0),
        }[name]
        ctx.slope = 1 / 6 if name == "h_sigmoid" else 1.0
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_pack((x > low) & (x < high)))
        return function(x)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None]:
        return gy * _unpack(ctx.saved_tensors[0], gy) * ctx.slope, None


def _pack(mask: Tensor) -> Tensor:
    """Eight elements in a byte."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat * torch.tensor(BITS, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    bits = packed[:, None] & torch.tensor(BITS, dtype=torch.uint8, device=packed.device)
    return (bits != 0).flatten()[: like.numel()].view(like.shape)
