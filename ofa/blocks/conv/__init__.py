"""A convolution with batch norm and activation, plus its input where it has a shortcut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ofa.arrays import Float, Int
from ofa.blocks.base import Block, Column, Elements, largest

if TYPE_CHECKING:
    from ofa.units import UnitTable


def _middle(cin: Int, cout: Int, expand: Float) -> Int:
    return np.zeros_like(cin)


def _layers(units: UnitTable, u: int, before: Int, after: Int) -> list[Column]:
    """Its shortcut reads its own input, which nobody else holds."""
    sizes = {"kernel": units.kernel[:, u], "stride": units.stride[u], "size_in": before, "size_out": after}
    channels = {"cin": units.cin[:, u], "cout": units.cout[:, u], "groups": 1}
    about = {"name": units.names[u], "op": "conv", "act": units.act[u], "active": units.active[:, u]}
    return [about | channels | sizes]


def _liveness(e: Elements) -> Int:
    return e.x + e.y if e.plain else largest(e.x + e.y, 2 * e.y + e.h)


block = Block(
    "conv", (), _middle, _layers, _liveness, axes={"conv": ("outer", "inner"), "bn": ("outer",)}, inner=lambda u: False
)
