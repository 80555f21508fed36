"""Inverted residual: [expand 1x1] - depthwise - [squeeze-excite] - project 1x1 [+ input] (Sandler et al. 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ofa.arrays import Float, Int, make_divisible
from ofa.blocks.base import Block, Column, Elements, largest

if TYPE_CHECKING:
    from ofa.units import UnitTable


def _middle(cin: Int, cout: Int, expand: Float) -> Int:
    return np.where(expand == 1, cin, make_divisible(np.rint(cin * expand)))


def _layers(units: UnitTable, u: int, before: Int, after: Int) -> list[Column]:
    name, act, active = units.names[u], units.act[u], units.active[:, u]
    cin, cout, mid, se = units.cin[:, u], units.cout[:, u], units.mid[:, u], units.se[:, u]
    held = cin * before**2 * bool(units.shortcut[u])
    conv = {"op": "conv", "kernel": 1, "stride": 1, "groups": 1, "active": active, "size_in": after, "size_out": after}
    gate = conv | {"active": active & (se > 0), "size_in": 1, "size_out": 1, "bias": True, "bn": False, "held": held}
    depthwise = conv | {"kernel": units.kernel[:, u], "stride": units.stride[u], "groups": mid, "size_in": before}
    layers = [
        depthwise
        | {"name": f"{name}.depthwise", "act": act, "cin": mid, "cout": mid, "held": held * bool(units.expand[u])},
        gate | {"name": f"{name}.se.reduce", "act": "relu", "cin": mid, "cout": se},
        gate | {"name": f"{name}.se.expand", "act": "h_sigmoid", "cin": se, "cout": mid},
        conv | {"name": f"{name}.project", "act": "none", "cin": mid, "cout": cout, "held": held},
    ]
    if units.expand[u]:
        first = {"size_in": before, "size_out": before, "held": 0}
        layers.insert(0, conv | first | {"name": f"{name}.expand", "act": act, "cin": cin, "cout": mid})
    return layers


def _liveness(e: Elements) -> Int:
    expand = [e.x + e.ma, 2 * e.ma + e.h] if e.expand else []
    depthwise = [e.ma + e.mb + e.h * e.expand, 2 * e.mb + e.h]
    gate = np.where(e.r > 0, largest(2 * e.mb + e.m, e.mb + e.m + largest(e.m, e.r)) + e.h, 0)
    return largest(*expand, *depthwise, gate, e.mb + e.y + e.h, 2 * e.y + e.h)


block = Block(
    "MBConv",
    ("kernel", "expand"),
    _middle,
    _layers,
    _liveness,
    axes={
        "expand": ("mid", "inner"),
        "depthwise": ("mid",),
        "se.reduce": ("none", "mid"),
        "se.expand": ("mid",),
        "project": ("outer", "mid"),
    },
    inner=lambda unit: unit.expand,
)
