"""The once-for-all network: one set of weights, any architecture of its space as an argument of forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ofa.blocks import BLOCKS, elastic
from ofa.drop import Drop
from ofa.errors import UserError
from ofa.layers import ElasticLinear, strided
from ofa.modules import initialise, set_bn_eps
from ofa.shrink import shrink
from ofa.space import Arch, Space
from ofa.spec import Unit
from ofa.static import FIXED_UNITS
from ofa.units import arch_units, largest_units, middle_widths


class Supernet(nn.Module):
    """All networks of a space in one: `supernet(x, arch)`, images (N, C, H, W) to logits (N, classes)."""

    def __init__(self, space: Space):
        super().__init__()
        self.space = space
        self.units = nn.ModuleList([_elastic(*place) for place in largest_units(space)])
        initialise(self)
        set_bn_eps(self, space.bn_eps)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, arch: Arch, drop: Drop | None = None) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes) of one architecture; drop: what this pass leaves out.

        Raises UserError for images of other channels, and for an architecture that is not of the space.
        """
        if x.shape[1] != self.space.in_channels:  # fewer would run, by a part of the first weights
            raise UserError(
                f"images have shape {tuple(x.shape)}; {self.space.name} takes (N, {self.space.in_channels}, H, W)"
            )
        units = arch_units(self.space, arch)
        weights = self._depthwise(units, max(x.shape[-2:]))
        for i, (module, unit) in enumerate(zip(self.units, units, strict=True)):
            if unit is None:
                continue
            if drop and unit.kind == "linear":
                x = drop.before_classifier(x)
            kept = drop.branch(x, unit, _place(units, i)) if drop else None
            given = (weights[i],) if i in weights else ()
            x = module(x, unit, kept, *given) if unit.kind in BLOCKS else module(x)
        return x

    def _depthwise(self, units: Sequence[Unit | None], side: int) -> dict[int, Tensor]:
        """The depthwise weights of the units that have them, by number, for images of `side` pixels."""
        wanted = {}
        for i, (module, unit) in enumerate(zip(self.units, units, strict=True)):
            if unit is not None:
                if hasattr(module, "smaller"):
                    wanted[i] = module.smaller(unit, side)  # type: ignore[operator]
                side = strided(side, unit.stride)
        return dict(zip(wanted, shrink(*wanted.values()), strict=True))

    def sort_channels(self, trained: Space | None = None) -> None:
        """Order the middle channels of every block by the L1 norm of the weights that read them, in place.

        The largest net computes the same function afterwards (Cai et al. 2020, sec. 3.3, elastic width), and so does
        every net of `trained`, a part of the space: the channels that such a net has stay the first ones, and are
        sorted among themselves, as once-for-all's code does from its second expand phase on.
        """
        widths = middle_widths(self.space, trained or self.space.restrict(width=1, expand=1))
        with torch.no_grad():
            for module, (mid, se) in zip(self.units, widths, strict=True):
                if hasattr(module, "sort_channels"):
                    module.sort_channels(mid, se)  # type: ignore[operator]


def _place(units: Sequence[Unit | None], i: int) -> float:
    """Where unit i stands among those with a shortcut that are kept: 1 for the last of them."""
    shortcuts = [j for j, unit in enumerate(units) if unit is not None and unit.shortcut]
    return sum(j <= i for j in shortcuts) / max(1, len(shortcuts))


def _elastic(unit: Unit, kernels: tuple[int, ...]) -> nn.Module:
    if unit.kind in BLOCKS:
        return elastic(unit, kernels)
    return ElasticLinear(unit) if unit.kind == "linear" else FIXED_UNITS[unit.kind](unit)
