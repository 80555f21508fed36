"""1x1 - kernel - 1x1, plus the input, pooled and projected where the shape changes (He et al. 2016, 2019: ResNet-D)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ofa.arrays import Float, Int, make_divisible
from ofa.blocks.base import Block, Column, Elements, largest

if TYPE_CHECKING:
    from ofa.units import UnitTable


def _middle(cin: Int, cout: Int, expand: Float) -> Int:
    return make_divisible(np.rint(cout * expand))


def _layers(units: UnitTable, u: int, before: Int, after: Int) -> list[Column]:
    """The input waits for the shortcut, which runs last and finds the block's output waiting."""
    name, act = units.names[u], units.act[u]
    cin, cout, mid = units.cin[:, u], units.cout[:, u], units.mid[:, u]
    held = cin * before**2
    conv = {"op": "conv", "kernel": 1, "stride": 1, "groups": 1, "active": units.active[:, u], "act": act}
    layers = [
        conv | {"name": f"{name}.conv1", "cin": cin, "cout": mid, "size_in": before, "size_out": before},
        conv
        | {"name": f"{name}.conv2", "cin": mid, "cout": mid, "size_in": before, "size_out": after, "held": held}
        | {"kernel": units.kernel[:, u], "stride": units.stride[u]},
        conv | {"name": f"{name}.conv3", "cin": mid, "cout": cout, "size_in": after, "size_out": after, "held": held},
    ]
    if not units.shortcut[u]:
        last = {"act": "none", "size_in": after, "size_out": after, "held": cout * after**2}
        layers.append(conv | last | {"name": f"{name}.downsample", "cin": cin, "cout": cout})
    return layers


def _liveness(e: Elements) -> Int:
    path = [e.x + 2 * e.ma, e.x + e.ma + e.mb, e.x + 2 * e.mb, e.x + e.mb + e.y, e.x + 2 * e.y]
    pool = [e.x + e.y + e.pooled] if e.stride > 1 else []
    shortcut = [] if e.shortcut else [*pool, e.pooled + 2 * e.y]
    return largest(*path, *shortcut, 3 * e.y)


block = Block(
    "bottleneck",
    ("expand",),
    _middle,
    _layers,
    _liveness,
    axes={
        "conv1": ("mid", "inner"),
        "conv2": ("mid", "mid"),
        "conv3": ("outer", "mid"),
        "downsample": ("outer", "inner"),
    },
    inner=lambda unit: True,
)
