"""What stages are made of, a folder for each kind of block: its arrays here, its torch modules in `modules.py`.

A new block is one folder and one line in `BLOCKS`: `block` says what it costs and what may vary; `modules.Plain(unit)`
is its network, `modules.Elastic(unit, kernels)` its elastic one, with `forward(x, unit, kept)`, `copy_to(plain)` and
`sort_channels(mid, se)`; one with depthwise weights can have all of a network's made in one call (`smaller` of mbconv).
N architectures.  Needs no torch, except for `plain` and `elastic`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ofa.blocks.base import Block, Elements
from ofa.blocks.bottleneck import block as bottleneck
from ofa.blocks.conv import block as conv
from ofa.blocks.mbconv import block as mbconv

if TYPE_CHECKING:
    from torch import nn

    from ofa.spec import Unit

__all__ = ["BLOCKS", "Block", "Elements", "elastic", "plain"]
BLOCKS: dict[str, Block] = {"conv": conv, "mbconv": mbconv, "bottleneck": bottleneck}


def plain(unit: Unit) -> nn.Module:
    """The plain module of a unit that is a block."""
    module: nn.Module = import_module(f"ofa.blocks.{unit.kind}.modules").Plain(unit)
    return module


def elastic(unit: Unit, kernels: tuple[int, ...]) -> nn.Module:
    """The elastic module whose largest form is `unit`, with a kernel of any of `kernels`."""
    module: nn.Module = import_module(f"ofa.blocks.{unit.kind}.modules").Elastic(unit, kernels)
    return module
