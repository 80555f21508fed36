"""What a kind of block says about itself.  N architectures.  Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ofa.arrays import Float, Int

if TYPE_CHECKING:
    from ofa.spec import Unit
    from ofa.units import UnitTable

Column = dict[str, object]  # one layer of N architectures, as `ofa.table.LayerTable` has it


class Elements:
    """Elements of the tensors that one unit of N architectures works on, (N,) each; a and b: pixels before and after.

    x: input; y: output; h: x where a shortcut reads it again, else 0; m, r: middle channels and those of
    squeeze-excite; ma, mb: middle maps before and after; pooled: the input at the output's size.
    """

    def __init__(self, units: UnitTable, u: int, side_in: Int, side_out: Int) -> None:
        before, after = side_in**2, side_out**2
        self.x, self.y = units.cin[:, u] * before, units.cout[:, u] * after
        self.h = self.x * bool(units.shortcut[u])
        self.m, self.r = units.mid[:, u], units.se[:, u]
        self.ma, self.mb, self.pooled = self.m * before, self.m * after, units.cin[:, u] * after
        self.expand, self.shortcut = bool(units.expand[u]), bool(units.shortcut[u])
        self.stride = int(units.stride[u])
        self.plain = not units.bn[u] and units.act[u] == "none" and not self.shortcut


@dataclass(frozen=True)
class Block:
    """A kind of block.

    title: its name for people.  elastic: what a stage of it can choose besides depth and width.  middle: middle
    channels (N,) from input and output channels and expand ratio.  layers: its layers, from its unit's column of a
    UnitTable and the side in pixels before and after.  liveness: elements alive at its fullest operation, (N,).
    axes: for each of its layers the groups of channels that it writes and reads, "outer", "mid" or "inner", for
    pruning; those of squeeze-excite are "se.reduce" and "se.expand".  inner: whether a unit has middle channels of its
    own.  Convolutions are dense or depthwise, of no other number of groups.
    """

    title: str
    elastic: tuple[str, ...]
    middle: Callable[[Int, Int, Float], Int]
    layers: Callable[[UnitTable, int, Int, Int], list[Column]]
    liveness: Callable[[Elements], Int]
    axes: Mapping[str, tuple[str, ...]]
    inner: Callable[[Unit], bool]


def largest(*elements: Int) -> Int:
    """The largest of several counts for each architecture, (N,)."""
    return np.max(np.stack(elements), axis=0)
