"""A plain net rewritten to run fast: where it only has to give logits, and where its batch norms are calibrated.

N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa.depthwise import depthwise
from ofa.layers import FastLinear, convolve, crop_kernel, gate
from ofa.modules import ConvBN, SqueezeExcite
from ofa.norm import usable, with_statistics
from ofa.static import StaticNet

NAMES = {nn.Identity: "none", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "h_swish"}


@torch.no_grad()
def fast(net: nn.Module) -> nn.Module:
    """A net that gives the logits of `net` in evaluation mode, up to rounding, and shares its other tensors.

    It can neither be trained nor exported; what is changed in `net` afterwards may or may not be seen.  Of a network
    that is no StaticNet on a CPU: itself.
    """
    if not isinstance(net, StaticNet) or next(net.parameters()).device.type != "cpu":
        return net
    return _rewritten(net, FoldedConv).eval()


def calibrating(net: StaticNet) -> nn.Module:
    """A net that writes into the batch norms of `net` what its own forward would, and shares all of its tensors.

    Both are to be in training mode, batch norms with a momentum of None, and no gradients are wanted.
    """
    return _rewritten(net, CalibratingConv)


class FoldedConv(nn.Module):
    """Convolution with the batch norm behind it in its weight and bias, activation in place, and any shortcut."""

    def __init__(self, plain: ConvBN):
        super().__init__()
        conv, weight = plain.conv, plain.conv.weight
        self.stride, self.padding, self.groups = conv.stride, conv.padding, conv.groups
        self.depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.stride[0] == 1
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        if isinstance(plain.bn, nn.BatchNorm2d):
            assert plain.bn.running_mean is not None and plain.bn.running_var is not None
            scale = plain.bn.weight * torch.rsqrt(plain.bn.running_var + plain.bn.eps)
            weight = weight * scale.view(-1, 1, 1, 1)
            bias = plain.bn.bias + (bias - plain.bn.running_mean) * scale
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", bias.detach())
        self.weight: Tensor
        self.bias: Tensor
        self.shortcut = getattr(plain, "shortcut", False)
        self.act = type(plain.act)(inplace=True) if hasattr(plain.act, "inplace") else plain.act

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) to (N, cout, H / stride, W / stride)."""
        y = self._convolved(x)
        return x + y if self.shortcut else y

    def _convolved(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return self.act(convolve(x, self.weight, self.bias, stride=self.stride[0]))
        weight, padding = self.weight, self.padding
        if self.depthwise:
            weight = crop_kernel(weight, max(x.shape[-2:]), 1)
            padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
        return self.act(F.conv2d(x, weight, self.bias, self.stride, padding, groups=self.groups))


class CalibratingConv(nn.Module):
    """Convolution, batch norm by the batch, whose statistics are averaged with those of earlier ones, activation."""

    def __init__(self, plain: ConvBN):
        super().__init__()
        self.plain, self.shortcut = plain, getattr(plain, "shortcut", False)
        self.act = NAMES.get(type(plain.act))

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) to (N, cout, H / stride, W / stride)."""
        bn, y = self.plain.bn, self._convolved(x)
        if not isinstance(bn, nn.BatchNorm2d) or self.act is None or not usable(y, bn.weight, bn.bias):
            y = self.plain.act(bn(y))
        else:
            n = y.numel() // y.shape[1]
            y, mean, inverse = with_statistics(y, bn.weight, bn.bias, self.act, bn.eps)
            _average(bn, mean, (inverse.pow(-2) - bn.eps) * (n / (n - 1)))
        return x + y if self.shortcut else y

    def _convolved(self, x: Tensor) -> Tensor:
        conv = self.plain.conv
        if conv.groups == conv.in_channels == conv.out_channels:
            return depthwise(x, crop_kernel(conv.weight, max(x.shape[-2:]), conv.stride[0]), conv.stride[0])
        return convolve(x, conv.weight, conv.bias, stride=conv.stride[0]) if conv.groups == 1 else conv(x)


def _average(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    assert bn.num_batches_tracked is not None and bn.running_mean is not None and bn.running_var is not None
    bn.num_batches_tracked.add_(1)
    share = 1 / int(bn.num_batches_tracked)
    bn.running_mean.lerp_(mean, share)
    bn.running_var.lerp_(var, share)


class FoldedGate(nn.Module):
    """Squeeze-excite by matrix products, in place."""

    def __init__(self, plain: SqueezeExcite):
        super().__init__()
        self.reduce, self.expand = plain.reduce, plain.expand

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same, each channel scaled."""
        first, last = self.reduce, self.expand
        return x.mul_(gate(x, None, first.weight, first.bias, last.weight, last.bias))


def _rewritten(module: nn.Module, conv: Callable[[ConvBN], nn.Module]) -> nn.Module:
    if isinstance(module, ConvBN) and _plain(module.conv):
        return conv(module)
    if isinstance(module, SqueezeExcite) and _plain(module.reduce) and _plain(module.expand):
        return FoldedGate(module)
    twin = object.__new__(FastLinear if type(module) is nn.Linear else type(module))
    twin.__dict__.update({k: v.copy() if isinstance(v, (dict, set)) else v for k, v in module.__dict__.items()})
    for name, child in twin._modules.items():
        twin._modules[name] = None if child is None else _rewritten(child, conv)
    return twin


def _plain(conv: nn.Conv2d) -> bool:
    """Whether its weight alone says what it computes: it is of no other class, and nothing changes what it reads."""
    return type(conv) is nn.Conv2d and not conv._forward_pre_hooks
