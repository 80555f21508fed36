"""The once-for-all network: one set of weights, any architecture of its space as an argument of forward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ofa.layers import ElasticConv, ElasticDepthwise, ElasticLinear, ElasticSE
from ofa.space import Arch, Space
from ofa.spec import Unit
from ofa.static import MBConv, initialise
from ofa.table import arch_units


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


class Supernet(nn.Module):
    """All networks of a space in one: `supernet(x, arch)`, images (N, C, H, W) to logits (N, classes)."""

    def __init__(self, space: Space):
        super().__init__()
        self.space = space
        largest = arch_units(space, space.decode(space.largest())[0])
        kernels = [(unit.kernel,) for unit in largest if unit is not None]
        for i, (s, _) in enumerate(space.blocks):
            kernels[len(space.stem) + i] = space.stages[s].kernel
        assert len(largest) == len(kernels), "the largest architecture keeps every unit"
        self.units = nn.ModuleList([_elastic(u, k) for u, k in zip(largest, kernels, strict=True) if u is not None])
        initialise(self)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes) of one architecture."""
        for module, unit in zip(self.units, arch_units(self.space, arch), strict=True):
            if unit is not None:
                x = _run(module, x, unit)
        return x


def _elastic(unit: Unit, kernels: tuple[int, ...]) -> nn.Module:
    if unit.kind == "mbconv":
        return ElasticMBConv(unit, kernels)
    if unit.kind == "conv":
        return ElasticConv(unit)
    return nn.AdaptiveAvgPool2d(1) if unit.kind == "pool" else ElasticLinear(unit)


def _run(module: nn.Module, x: Tensor, unit: Unit) -> Tensor:
    if unit.kind == "mbconv":
        return module(x, unit)
    return module(x, unit.cout) if unit.kind == "conv" else module(x)
