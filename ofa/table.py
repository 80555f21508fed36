"""Every layer of many architectures as arrays: the one truth that builder and costs read.

N architectures, U units (places in the supernet), L layers.  Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa.space import Genes, Space
from ofa.spec import NetSpec
from ofa.units import Bool, Int, UnitTable, spec_units, unit_table, wide

Column = dict[str, object]
POOLS = ("pool", "maxpool")


@dataclass(frozen=True)
class LayerTable:
    """Convolutions, linear layers and pools of N architectures; 0 everywhere where a layer is inactive.

    names, op ("conv", "linear", "pool", "maxpool"), act: (L,) strings; bn, bias: (L,) booleans; block: (L,) index of
    its unit.  active, cin, cout, kernel, stride, groups, size_in, size_out (side in pixels): (N, L).  groups == cin:
    depthwise; pools: kernel 0.
    held: (N, L) elements kept besides the layer's own input and output while its block runs, for its shortcut.
    shortcut: (L,) the layer's block adds its input to its output.
    units: what the layers belong to; unit_in, unit_out: (N, U) side in pixels before and after each unit.
    """

    names: tuple[str, ...]
    op: tuple[str, ...]
    act: tuple[str, ...]
    bn: Bool
    bias: Bool
    block: Int
    shortcut: Bool
    active: Bool
    cin: Int
    cout: Int
    kernel: Int
    stride: Int
    groups: Int
    size_in: Int
    size_out: Int
    held: Int
    units: UnitTable
    unit_in: Int
    unit_out: Int


def layer_table(space: Space, genes: Genes) -> LayerTable:
    """Every layer of N architectures: arrays (N, L) for genes (N, G)."""
    return _layers(unit_table(space, genes))


def spec_table(spec: NetSpec) -> LayerTable:
    """Every layer of one network (N = 1)."""
    return _layers(spec_units(spec))


def layer_weights(table: LayerTable) -> NDArray[np.int64]:
    """Entries of each layer's kernel, kernel^2 * cin * cout / groups; skipped layers give 0.  Returns: (N, L)."""
    return table.kernel**2 * table.cin * table.cout // np.maximum(table.groups, 1)


def layer_macs(table: LayerTable) -> NDArray[np.int64]:
    """Multiply-accumulates of each layer, convolutions, linear layers and SE; skipped layers give 0.

    Batch norm, pooling, activations, the SE product and shortcuts count nothing.  Returns: (N, L).
    """
    return table.size_out**2 * layer_weights(table)


def _layers(units: UnitTable) -> LayerTable:
    columns: list[Column] = []
    befores, afters = [], []
    size = units.resolution
    for u, kind in enumerate(units.kind):
        active, stride = units.active[:, u], int(units.stride[u])
        before = size
        after = np.ones_like(size) if kind == "pool" else (size - 1) // stride + 1
        size = np.where(active, after, size)
        befores.append(before * active)
        afters.append(size * active)
        shared = {"block": u, "shortcut": units.shortcut[u], "bias": False, "bn": units.bn[u], "held": 0}
        columns += [shared | column for column in LAYERS[kind](units, u, before, size)]
    return _stack(columns, units, np.stack(befores, axis=1), np.stack(afters, axis=1))


def _plain_layer(units: UnitTable, u: int, before: Int, after: Int) -> list[Column]:
    """A convolution, linear layer or pool by itself; the input of a shortcut is its own, held by nobody else."""
    op = units.kind[u]
    return [
        {
            "name": units.names[u],
            "op": op,
            "act": units.act[u],
            "bias": op == "linear",
            "active": units.active[:, u],
            "cin": units.cin[:, u],
            "cout": units.cout[:, u],
            "kernel": 0 if op in POOLS else units.kernel[:, u],
            "stride": units.stride[u],
            "groups": 1,
            "size_in": before,
            "size_out": after,
        }
    ]


def _mbconv_layers(units: UnitTable, u: int, before: Int, after: Int) -> list[Column]:
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


def _bottleneck_layers(units: UnitTable, u: int, before: Int, after: Int) -> list[Column]:
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


LAYERS: dict[str, Callable[[UnitTable, int, Int, Int], list[Column]]] = {
    "conv": _plain_layer,
    "linear": _plain_layer,
    "pool": _plain_layer,
    "maxpool": _plain_layer,
    "mbconv": _mbconv_layers,
    "bottleneck": _bottleneck_layers,
}


def _stack(columns: list[Column], units: UnitTable, unit_in: Int, unit_out: Int) -> LayerTable:
    n = len(units.resolution)
    active = wide(columns, "active", n).astype(bool)
    sizes = ("cin", "cout", "kernel", "stride", "groups", "size_in", "size_out", "held")
    table = {name: wide(columns, name, n) * active for name in sizes}
    table |= {name: np.array([c[name] for c in columns]) for name in ("bn", "bias", "block", "shortcut")}
    text = {name: tuple(str(c[name]) for c in columns) for name in ("op", "act")}
    names = tuple(str(c["name"]) for c in columns)
    places = {"units": units, "unit_in": unit_in, "unit_out": unit_out}
    return LayerTable(names=names, active=active, **places, **text, **table)  # type: ignore[arg-type]
