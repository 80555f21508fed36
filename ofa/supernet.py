"""The once-for-all network: one set of weights, any architecture of its space as an argument of forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ofa.blocks import BLOCKS, elastic
from ofa.layers import ElasticLinear
from ofa.modules import initialise, set_bn_eps
from ofa.space import Arch, Space
from ofa.spec import Unit
from ofa.static import FIXED_UNITS
from ofa.units import arch_units, largest_units


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
                x = module(x, unit) if unit.kind in BLOCKS else module(x)
        return x

    def sort_channels(self) -> None:
        """Order the middle channels of every block by the L1 norm of the weights that read them, in place.

        The largest net computes the same function afterwards (Cai et al. 2020, sec. 3.3, elastic width).
        """
        with torch.no_grad():
            for module in self.units:
                if hasattr(module, "sort_channels"):
                    module.sort_channels()  # type: ignore[operator]


def _elastic(unit: Unit, kernels: tuple[int, ...]) -> nn.Module:
    if unit.kind in BLOCKS:
        return elastic(unit, kernels)
    return ElasticLinear(unit) if unit.kind == "linear" else FIXED_UNITS[unit.kind](unit)
