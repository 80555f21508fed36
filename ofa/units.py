"""The units of many architectures as arrays: what the supernet builds, and the layer table spells out.

N architectures, U units (places in the supernet), B elastic blocks.  Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from ofa.arrays import Bool, Int, make_divisible
from ofa.blocks import BLOCKS
from ofa.errors import UserError
from ofa.space import Arch, Genes, Layer, Space, Stage
from ofa.spec import NetSpec, Unit

FIXED = -1  # no elastic block, or no width multiplier


@dataclass(frozen=True)
class UnitTable:
    """Units of N architectures.

    (U,): kind, act, names, stride, expand, shortcut, bn; block: the elastic block it belongs to; width_in, width_out:
    the width multiplier that its input and output follow.  (N, U), 0 where inactive: the rest.  resolution: (N,).
    """

    kind: tuple[str, ...]
    act: tuple[str, ...]
    names: tuple[str, ...]
    bn: Bool
    stride: Int
    expand: Bool
    shortcut: Bool
    block: Int
    width_in: Int
    width_out: Int
    active: Bool
    cin: Int
    cout: Int
    kernel: Int
    mid: Int
    se: Int
    resolution: Int

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
    resolution = space.values(genes, "resolution")[:, 0].astype(np.int64)
    return _stack(list(_Walk(space, genes).columns()), resolution)


def spec_units(spec: NetSpec) -> UnitTable:
    """The units of one network (N = 1)."""
    columns: list[dict[str, object]] = [
        {f.name: getattr(unit, f.name) for f in fields(Unit)}
        | {"name": f"units.{u}", "active": True, "block": FIXED, "width_in": FIXED, "width_out": FIXED}
        for u, unit in enumerate(spec.units)
    ]
    return _stack(columns, np.array([spec.resolution]))


def largest_units(space: Space) -> list[tuple[Unit, tuple[int, ...]]]:
    """The largest form of the unit at each place of the supernet, and the kernels that it can have, ascending."""
    genes = _forms(space, "op", "expand")  # 4 channels times 0.5 are 8, times 1 they are 4
    table = unit_table(space, genes)
    rows = zip(*map(table.row, range(len(genes))), strict=True)
    units = [max((unit for unit in forms if unit is not None), key=lambda unit: unit.mid) for forms in rows]
    stages = [None if block == FIXED else space.stages[space.blocks[block, 0]] for block in table.block]
    elastic = [stage is not None and stage.chooses("kernel") for stage in stages]
    return [
        (unit, tuple(map(int, stage.choices("kernel"))) if stage and chosen else (unit.kernel,))
        for unit, stage, chosen in zip(units, stages, elastic, strict=True)
    ]


def middle_widths(space: Space, part: Space) -> list[tuple[list[int], list[int]]]:
    """Numbers of middle and of squeezed channels that nets of a part of the space have at each place, ascending."""
    archs = part.decode(_forms(part, "op", "width", "expand"))
    table = unit_table(space, space.encode(archs))
    found = [[sorted({*column.tolist()} - {0}) for column in values.T] for values in (table.mid, table.se)]
    return list(zip(*found, strict=True))


def _forms(space: Space, *dimensions: str) -> Genes:
    """The largest architecture with every choice of some dimensions, alike at all places: (N, G)."""
    varied = [space.columns(name) for name in dimensions]
    choices = np.indices([space.counts[columns].max(initial=1) for columns in varied]).reshape(len(varied), -1)
    genes = np.repeat(space.largest(), choices.shape[1], axis=0)
    for columns, choice in zip(varied, choices, strict=True):
        genes[:, columns] = np.minimum(choice[:, None], space.counts[columns] - 1)
    return genes


def arch_units(space: Space, arch: Arch) -> tuple[Unit | None, ...]:
    """The unit at each place of the supernet, None where the architecture skips it."""
    if not isinstance(arch, Arch):
        raise UserError(f"{type(arch).__name__} is no architecture; give Arch(...), or Arch.from_dict(...)")
    return _arch_units(space, arch)


@lru_cache(maxsize=4096)
def _arch_units(space: Space, arch: Arch) -> tuple[Unit | None, ...]:
    return unit_table(space, space.encode([arch])).row(0)


def space_spec(space: Space, arch: Arch) -> NetSpec:
    """The plain network that an architecture of a space stands for."""
    units = tuple(unit for unit in arch_units(space, arch) if unit is not None)
    return NetSpec(units, arch.resolution, space.in_channels, space.classes, space.bn_eps)


class _Walk:
    """Follows N architectures from the image to the classes and gives a column for each unit on the way."""

    def __init__(self, space: Space, genes: Genes) -> None:
        self.space = space
        self.width = space.values(genes, "width")
        self.values = {name: space.block_values(genes, name) for name in ("kernel", "expand", "op")}
        self.used = space.used(genes)
        self.channels: Int = np.full(len(genes), space.in_channels)  # of the map so far
        self.base, self.scaled = space.in_channels, FIXED  # the same before scaling, and the multiplier it follows

    def columns(self) -> Iterator[dict[str, object]]:
        """The columns in order."""
        yield from self._layers("stem", self.space.stem)
        block = 0
        for s, stage in enumerate(self.space.stages):
            yield from self._layers(f"stages.{s}.before", stage.before)
            for b in range(stage.blocks[-1]):
                yield from self._block(f"stages.{s}.{b}", stage, b, block)
                block += 1
        yield from self._layers("head", self.space.head)

    def _layers(self, prefix: str, layers: tuple[Layer, ...]) -> Iterator[dict[str, object]]:
        for i, layer in enumerate(layers):
            out = self._out(layer.channels, layer.width, layer.kind)
            yield self._column(f"{prefix}.{i}", layer, out, expand=layer.expand, kernel=layer.kernel)
            self._move(layer.channels, layer.width, out)

    def _block(self, name: str, stage: Stage, b: int, block: int) -> Iterator[dict[str, object]]:
        """One unit, or one for each operation that changes something and can be chosen."""
        out, used = self._out(stage.channels, stage.width, stage.block), self.used[:, block]
        kernel, expand, op = (self.values[key][:, block] for key in ("kernel", "expand", "op"))
        stride = stage.stride if b == 0 else 1
        if not stage.ops:
            layer = Layer(stage.block, stage.channels, stride=stride, act=stage.act, se=stage.has_se(b))
            expands = 1 if stage.expand == 1 else expand  # the list [1] is what `restrict` leaves of [1, 2]
            yield self._column(name, layer, out, expand=expands, kernel=kernel, active=used, block=block)
        for o, record in enumerate(stage.ops):
            skipped = record.kind == "skip" and self._fits(stage.channels, stage.width, stride)
            if skipped or o not in stage.op:
                continue
            kind = "conv" if record.kind == "skip" else record.kind
            layer = Layer(kind, stage.channels, stride=stride, act=record.act, se=record.se)
            chosen = used & (op == o)
            yield self._column(
                f"{name}.{o}", layer, out, expand=record.expand, kernel=record.kernel, active=chosen, block=block
            )
        self._move(stage.channels, stage.width, out)

    def _column(
        self,
        name: str,
        layer: Layer,
        out: Int,
        *,
        expand: object,
        kernel: object,
        active: object = True,
        block: int = FIXED,
    ) -> dict[str, object]:
        kind, block_of = layer.kind, BLOCKS.get(layer.kind)
        gene = self._gene(layer, block)
        same = self._fits(layer.channels, None if gene == FIXED else gene, layer.stride)
        mid = block_of.middle(self.channels, out, np.asarray(expand, dtype=np.float64)) if block_of else 0
        return {
            "name": name,
            "kind": kind,
            "act": layer.act,
            "bn": block_of is not None and layer.bn,
            "stride": layer.stride,
            "expand": bool(block_of and "expand" in block_of.elastic) and not (np.isscalar(expand) and expand == 1),
            "shortcut": same and block_of is not None and (block != FIXED or kind != "conv"),
            "block": block,
            "width_in": self.scaled,
            "width_out": self.scaled if kind in ("pool", "maxpool") else gene,
            "active": active,
            "cin": self.channels,
            "cout": out,
            "kernel": kernel,
            "mid": mid,
            "se": make_divisible(np.asarray(mid) // 4) if layer.se else 0,
        }

    def _fits(self, base: int, width: int | None, stride: int) -> bool:
        """Whether a unit of this shape gives what it gets."""
        return stride == 1 and (self.base, self.scaled) == (base, FIXED if width is None else width)

    def _gene(self, layer: Layer, block: int) -> int:
        owner: Layer | Stage = layer if block == FIXED else self.space.stages[self.space.blocks[block, 0]]
        return FIXED if owner.width is None or layer.kind == "linear" else owner.width

    def _out(self, base: int, width: int | None, kind: str) -> Int:
        if kind in ("pool", "maxpool"):
            return self.channels
        if kind == "linear":
            return np.full(len(self.channels), self.space.classes)
        return make_divisible(base * self.width[:, width]) if width is not None else np.full(len(self.channels), base)

    def _move(self, base: int, width: int | None, out: Int) -> None:
        if base:
            self.base, self.scaled = base, FIXED if width is None else width
        self.channels = out


def _stack(columns: list[dict[str, object]], resolution: Int) -> UnitTable:
    n = len(resolution)
    active = wide(columns, "active", n).astype(bool)
    table = {name: wide(columns, name, n) * active for name in ("cin", "cout", "kernel", "mid", "se")}
    narrow = ("bn", "stride", "expand", "shortcut", "block", "width_in", "width_out")
    table |= {name: np.array([c[name] for c in columns]) for name in narrow}
    text = {name: tuple(str(c[name]) for c in columns) for name in ("kind", "act")}
    names = tuple(str(c["name"]) for c in columns)
    return UnitTable(**table, **text, names=names, active=active, resolution=resolution)  # type: ignore[arg-type]


def wide(columns: list[dict[str, object]], name: str, n: int) -> Int:
    """One entry of each column, for N architectures: (N, columns)."""
    return np.stack([np.broadcast_to(np.asarray(c[name]), (n,)) for c in columns], axis=1).astype(np.int64)
