"""Every layer of many architectures as arrays: the one truth that builder and costs read.

N architectures, U units (places in the supernet), L layers.  Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa.arrays import Bool, Int
from ofa.blocks import BLOCKS
from ofa.blocks.base import Column
from ofa.errors import UserError
from ofa.space import Genes, Space
from ofa.spec import NetSpec
from ofa.units import UnitTable, spec_units, unit_table, wide

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


def layer_inputs(table: LayerTable) -> Int:
    """Elements that each layer reads, (N, L); skipped layers give 0."""
    return table.cin * table.size_in**2


def layer_outputs(table: LayerTable) -> Int:
    """Elements that each layer writes, (N, L); skipped layers give 0."""
    return table.cout * table.size_out**2


def layer_joins(table: LayerTable) -> Bool:
    """Which layers are the last of a block with a shortcut, that is added to what they give, (N, L)."""
    return table.shortcut & np.append(np.diff(table.block) != 0, True)


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
        layers = BLOCKS[kind].layers if kind in BLOCKS else _fixed_layer
        columns += [shared | column for column in layers(units, u, before, size)]
    return _stack(columns, units, np.stack(befores, axis=1), np.stack(afters, axis=1))


def _fixed_layer(units: UnitTable, u: int, before: Int, after: Int) -> list[Column]:
    """A linear layer or a pool."""
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


def _stack(columns: list[Column], units: UnitTable, unit_in: Int, unit_out: Int) -> LayerTable:
    n = len(units.resolution)
    active = wide(columns, "active", n).astype(bool)
    sizes = ("cin", "cout", "kernel", "stride", "groups", "size_in", "size_out", "held")
    table = {name: wide(columns, name, n) * active for name in sizes}
    table |= {name: np.array([c[name] for c in columns]) for name in ("bn", "bias", "block", "shortcut")}
    text = {name: tuple(str(c[name]) for c in columns) for name in ("op", "act")}
    names = tuple(str(c["name"]) for c in columns)
    if (odd := (table["groups"] > 1) & (table["groups"] != table["cin"])).any():
        raise UserError(f"layer {names[odd.any(axis=0).argmax()]} has groups of channels; make it dense or depthwise")
    places = {"units": units, "unit_in": unit_in, "unit_out": unit_out}
    return LayerTable(names=names, active=active, **places, **text, **table)  # type: ignore[arg-type]
