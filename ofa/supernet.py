"""The once-for-all network: one set of weights, any architecture of its space as an argument of forward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ofa.layers import ElasticConv, ElasticDepthwise, ElasticLinear, ElasticSE
from ofa.space import Arch, Space
from ofa.spec import BLOCKS, Unit
from ofa.static import Bottleneck, MBConv, activation, initialise, max_pool, set_bn_eps
from ofa.units import arch_units, largest_units


class ElasticMBConv(nn.Module):
    """Inverted residual with elastic width, expand ratio and kernel."""

    def __init__(self, unit: Unit, kernels: tuple[int, ...]):
        super().__init__()
        first = replace(unit, kind="conv", cout=unit.mid, kernel=1, stride=1)
        last = replace(unit, kind="conv", cin=unit.mid, kernel=1, stride=1, act="none")
        self.expand = ElasticConv(first) if unit.expand else None
        self.depthwise = ElasticDepthwise(unit, kernels)
        self.se = ElasticSE(unit) if unit.se else None
        self.project = ElasticConv(last)

    def forward(self, x: Tensor, unit: Unit) -> Tensor:
        """(N, unit.cin, H, W) to (N, unit.cout, H / stride, W / stride)."""
        y = x if self.expand is None else self.expand(x, unit.mid)
        y = self.depthwise(y, unit.kernel)
        y = y if self.se is None else self.se(y, unit.se)
        y = self.project(y, unit.cout)
        return x + y if unit.shortcut else y

    def copy_to(self, plain: MBConv) -> None:
        """Copy the weights that `plain` needs."""
        for name in ("expand", "depthwise", "se", "project"):
            if getattr(self, name) is not None:
                getattr(self, name).copy_to(getattr(plain, name))


class ElasticBottleneck(nn.Module):
    """Bottleneck of elastic width and expand ratio."""

    def __init__(self, unit: Unit):
        super().__init__()
        conv = replace(unit, kind="conv", kernel=1, stride=1, act="none")
        self.conv1 = ElasticConv(replace(conv, cout=unit.mid, act=unit.act))
        self.conv2 = ElasticConv(replace(unit, kind="conv", cin=unit.mid, cout=unit.mid))
        self.conv3 = ElasticConv(replace(conv, cin=unit.mid))
        self.pool = nn.AvgPool2d(unit.stride, ceil_mode=True) if unit.stride > 1 else None
        self.downsample = None if unit.shortcut else ElasticConv(conv)
        self.act = activation(unit.act)

    def forward(self, x: Tensor, unit: Unit) -> Tensor:
        """(N, unit.cin, H, W) to (N, unit.cout, H / stride, W / stride)."""
        y = self.conv3(self.conv2(self.conv1(x, unit.mid), unit.mid), unit.cout)
        if self.downsample is not None:
            x = self.downsample(x if self.pool is None else self.pool(x), unit.cout)
        return self.act(y + x)

    def copy_to(self, plain: Bottleneck) -> None:
        """Copy the weights that `plain` needs."""
        for name in ("conv1", "conv2", "conv3", "downsample"):
            if getattr(self, name) is not None:
                getattr(self, name).copy_to(getattr(plain, name))


class Supernet(nn.Module):
    """All networks of a space in one: `supernet(x, arch)`, images (N, C, H, W) to logits (N, classes)."""

    def __init__(self, space: Space):
        super().__init__()
        self.space = space
        self.units = nn.ModuleList([_elastic(*place) for place in largest_units(space)])
        initialise(self)
        set_bn_eps(self, space.bn_eps)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes) of one architecture."""
        for module, unit in zip(self.units, arch_units(self.space, arch), strict=True):
            if unit is not None:
                x = _run(module, x, unit)
        return x


def _elastic(unit: Unit, kernels: tuple[int, ...]) -> nn.Module:
    """The module of a place whose largest unit is given, and whose kernel may be any of `kernels`."""
    return {
        "conv": lambda: ElasticConv(unit),
        "mbconv": lambda: ElasticMBConv(unit, kernels),
        "bottleneck": lambda: ElasticBottleneck(unit),
        "maxpool": lambda: max_pool(unit),
        "pool": lambda: nn.AdaptiveAvgPool2d(1),
        "linear": lambda: ElasticLinear(unit),
    }[unit.kind]()


def _run(module: nn.Module, x: Tensor, unit: Unit) -> Tensor:
    if unit.kind == "conv":
        y = module(x, unit.cout)
        return x + y if unit.shortcut else y
    return module(x, unit) if unit.kind in BLOCKS else module(x)
