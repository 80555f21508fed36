"""Every unit and every layer of many architectures as arrays: the one truth that builder and costs read.

N architectures, U units (places in the supernet), L layers.  Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.space import Arch, Genes, Layer, Space, Stage
from ofa.spec import NetSpec, Unit

Int = NDArray[np.int64]
Bool = NDArray[np.bool_]


def make_divisible(channels: NDArray[Any] | float, divisor: int = 8) -> Int:
    """Nearest multiple of `divisor`, never below 90 % of `channels` (Howard et al. 2017, TF slim)."""
    channels = np.asarray(channels, dtype=np.float64)
    rounded = np.maximum(divisor, (channels + divisor / 2) // divisor * divisor)
    return np.where(rounded < 0.9 * channels, rounded + divisor, rounded).astype(np.int64)


@dataclass(frozen=True)
class UnitTable:
    """Units of N architectures.  (U,): kind, act, stride, expand, shortcut, bn; (N, U): the rest, 0 where inactive."""

    kind: tuple[str, ...]
    act: tuple[str, ...]
    bn: Bool
    stride: Int
    expand: Bool
    shortcut: Bool
    active: Bool
    cin: Int
    cout: Int
    kernel: Int
    mid: Int
    se: Int
    resolution: Int
    names: tuple[str, ...]

    def row(self, n: int) -> tuple[Unit | None, ...]:
        """The units of architecture n, None where it skips one."""
        return tuple(self._unit(n, u) if self.active[n, u] else None for u in range(len(self.kind)))

    def _unit(self, n: int, u: int) -> Unit:
        return Unit(
            self.kind[u],
            int(self.cin[n, u]),
            int(self.cout[n, u]),
            int(self.kernel[n, u]),
            int(self.stride[u]),
            int(self.mid[n, u]),
            int(self.se[n, u]),
            self.act[u],
            bool(self.expand[u]),
            bool(self.shortcut[u]),
            bool(self.bn[u]),
        )


def unit_table(space: Space, genes: Genes) -> UnitTable:
    """Units of N architectures of a space; raises UserError for genes that are not of it."""
    space.validate(genes)
    n = len(genes)
    width = space.values(genes, "width")[:, 0]
    kernels, expands = space.values(genes, "kernel"), space.values(genes, "expand")
    used = space.active(genes)[:, space.columns("kernel")]
    columns: list[dict[str, object]] = []
    channels: Int = np.full(n, space.in_channels)
    base = space.in_channels

    def add(name: str, record: Layer | Stage, kind: str, stride: int, **given: object) -> None:
        nonlocal channels, base
        plain = kind == "pool"
        cout = channels if plain else _out_channels(record.channels, width, space.classes, kind)
        mbconv = kind == "mbconv"
        ratio = np.asarray(given["expand"], dtype=np.float64)
        expands = kind == "mbconv" and record.expand not in (1, (1,))
        mid = make_divisible(np.rint(channels * ratio)) if expands else channels
        columns.append(
            {
                "name": name,
                "kind": kind,
                "act": record.act,
                "bn": kind == "mbconv" or (kind == "conv" and getattr(record, "bn", True)),
                "stride": stride,
                "expand": expands,
                "shortcut": mbconv and stride == 1 and base == record.channels,
                "active": given["active"],
                "cin": channels,
                "cout": cout,
                "kernel": given["kernel"],
                "mid": mid if mbconv else 0,
                "se": make_divisible(mid // 4) if mbconv and record.se else 0,
            }
        )
        channels, base = cout, record.channels or base

    for i, layer in enumerate(space.stem):
        add(f"stem.{i}", layer, layer.kind, layer.stride, active=True, kernel=layer.kernel, expand=layer.expand)
    for i, (s, b) in enumerate(space.blocks):
        stage = space.stages[s]
        choice = {"active": used[:, i], "kernel": kernels[:, i], "expand": expands[:, i]}
        add(f"stages.{s}.{b}", stage, "mbconv", stage.stride if b == 0 else 1, **choice)
    for i, layer in enumerate(space.head):
        add(f"head.{i}", layer, layer.kind, layer.stride, active=True, kernel=layer.kernel, expand=layer.expand)

    resolution = space.values(genes, "resolution")[:, 0].astype(np.int64)
    return _unit_table(columns, resolution)


def spec_units(spec: NetSpec) -> UnitTable:
    """The units of one network (N = 1)."""
    columns = [{f.name: getattr(unit, f.name) for f in fields(Unit)} for unit in spec.units]
    for u, column in enumerate(columns):
        column |= {"name": f"units.{u}", "active": True}
    return _unit_table(columns, np.array([spec.resolution]))


@lru_cache(maxsize=4096)
def arch_units(space: Space, arch: Arch) -> tuple[Unit | None, ...]:
    """The unit at each place of the supernet, None where the architecture skips it."""
    return unit_table(space, space.encode([arch])).row(0)


def space_spec(space: Space, arch: Arch) -> NetSpec:
    """The plain network that an architecture of a space stands for."""
    units = tuple(unit for unit in arch_units(space, arch) if unit is not None)
    return NetSpec(units, arch.resolution, space.in_channels, space.classes)


@dataclass(frozen=True)
class LayerTable:
    """Convolutions and linear layers of N architectures; 0 everywhere where a layer is inactive.

    names, op ("conv" or "linear"), act: (L,) strings; bn, bias: (L,) booleans; block: (L,) index of its unit.
    active, cin, cout, kernel, stride, groups, size_in, size_out (side in pixels): (N, L).  groups == cin: depthwise.
    held: (N, L) elements of the block input kept for a shortcut besides the layer's own input.
    shortcut: (L,) the layer's block adds its input to its output.
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
    columns: list[dict[str, object]] = []
    size = units.resolution
    for u, kind in enumerate(units.kind):
        active, stride = units.active[:, u], int(units.stride[u])
        before = size
        size = np.where(active, (size - 1) // stride + 1, size)
        if kind == "pool":
            size = np.ones_like(size)
            continue
        expand = _mbconv_layers if kind == "mbconv" else _plain_layer
        for column in expand(units, u, before, size):
            columns.append({"block": u, "shortcut": units.shortcut[u], "bias": False, "bn": units.bn[u]} | column)
    return _layer_table(columns)


def _plain_layer(units: UnitTable, u: int, before: Int, after: Int) -> list[dict[str, object]]:
    linear = units.kind[u] == "linear"
    return [
        {
            "name": units.names[u],
            "op": units.kind[u],
            "act": units.act[u],
            "bias": linear,
            "active": units.active[:, u],
            "cin": units.cin[:, u],
            "cout": units.cout[:, u],
            "kernel": units.kernel[:, u],
            "stride": units.stride[u],
            "groups": 1,
            "size_in": before,
            "size_out": after,
            "held": 0,
        }
    ]


def _mbconv_layers(units: UnitTable, u: int, before: Int, after: Int) -> list[dict[str, object]]:
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


def _out_channels(base: int, width: NDArray[np.float64], classes: int, kind: str) -> Int:
    return np.full(len(width), classes) if kind == "linear" else make_divisible(base * width)


def _unit_table(columns: list[dict[str, object]], resolution: Int) -> UnitTable:
    n, active = len(resolution), _wide(columns, "active", len(resolution)).astype(bool)
    wide = {name: _wide(columns, name, n) * active for name in ("cin", "cout", "kernel", "mid", "se")}
    narrow = {name: np.array([c[name] for c in columns]) for name in ("bn", "stride", "expand", "shortcut")}
    text = {name: tuple(str(c[name]) for c in columns) for name in ("kind", "act")}
    names = tuple(str(c["name"]) for c in columns)
    return UnitTable(**wide, **narrow, **text, names=names, active=active, resolution=resolution)  # type: ignore[arg-type]


def _layer_table(columns: list[dict[str, object]]) -> LayerTable:
    n = len(np.asarray(columns[0]["active"]))
    active = _wide(columns, "active", n).astype(bool)
    names = ("cin", "cout", "kernel", "stride", "groups", "size_in", "size_out", "held")
    wide = {name: _wide(columns, name, n) * active for name in names}
    narrow = {name: np.array([c[name] for c in columns]) for name in ("bn", "bias", "block", "shortcut")}
    text = {name: tuple(str(c[name]) for c in columns) for name in ("op", "act")}
    return LayerTable(names=tuple(str(c["name"]) for c in columns), active=active, **text, **narrow, **wide)  # type: ignore[arg-type]


def _wide(columns: list[dict[str, object]], name: str, n: int) -> Int:
    return np.stack([np.broadcast_to(np.asarray(c[name]), (n,)) for c in columns], axis=1).astype(np.int64)
