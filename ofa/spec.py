"""A plain network as data: the units it is built from, in order, with every width written out.

A NetSpec is what a card stores and what `ofa.static.build_spec` turns into a module; a subnet, a pruned subnet and a
network from a published block list are all one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, SupportsIndex

from ofa.blocks import BLOCKS
from ofa.errors import UserError

KINDS = (*BLOCKS, "maxpool", "pool", "linear")
ACTIVATIONS = ("none", "relu", "relu6", "h_swish")


@dataclass(frozen=True, slots=True)
class Unit:
    """One step of a network.

    conv: convolution (batch norm, activation), plus its input where it has a shortcut;
    mbconv: [1x1 expand] - depthwise - [squeeze-excite] - 1x1 project, plus its input where it has a shortcut;
    bottleneck: 1x1 - kernel - 1x1, plus its input or, without `shortcut`, average pool - 1x1 of it, then activation;
    maxpool: of kernel and stride; pool: global average pool; linear: the classifier, with bias.
    `bn`: whether its convolutions have batch norm; pools and the classifier never do.
    `mid`: channels in the middle of a block; `se`: channels that squeeze-excite reduces to, 0 without it.
    """

    kind: str
    cin: int
    cout: int
    kernel: int = 1
    stride: int = 1
    mid: int = 0
    se: int = 0
    act: str = "none"
    expand: bool = False
    shortcut: bool = False
    bn: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unit kind {self.kind!r} is not known; choose from {', '.join(KINDS)}")
        if self.act not in ACTIVATIONS:
            raise UserError(f"activation {self.act!r} is not known; choose from {', '.join(ACTIVATIONS)}")
        if self.kind not in BLOCKS:
            object.__setattr__(self, "bn", False)
        if self.kernel % 2 == 0:
            raise UserError(f"kernel {self.kernel} is even; kernels are odd, so that padding by half keeps the size")


@dataclass(frozen=True, slots=True)
class NetSpec:
    """A whole network: its units, the image side in pixels it is meant for, its input channels and classes.

    bn_eps: what batch norm adds to the variance.
    """

    units: tuple[Unit, ...]
    resolution: int
    in_channels: int
    classes: int
    bn_eps: float = 1e-5

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> NetSpec:
        """From `to_dict`; raises UserError for unknown or missing fields, and for what is no network."""
        known = {field.name for field in fields(Unit)}
        try:
            for unit in values["units"]:
                if unknown := set(unit) - known:
                    raise UserError(f"unit field {sorted(unknown)} is not known; a unit has {sorted(known)}")
            units = tuple(Unit(**unit) for unit in values["units"])
            others = {key: value for key, value in values.items() if key != "units"}
            spec = NetSpec(units, **others)
        except (KeyError, TypeError) as error:
            raise UserError(f"not a network spec ({error}); it needs units, resolution, in_channels, classes") from None
        _check_ends(spec)
        check_chain((f"unit {i}", unit) for i, unit in enumerate(units))
        return spec


def check_chain(named: Iterable[tuple[str | None, Unit]]) -> None:
    """Raise UserError, by its name, for a unit that no network has, or one that cannot follow the unit before it."""
    given = None
    for name, unit in named:
        mid = unit.mid if unit.kind in BLOCKS and unit.kind != "conv" else 1
        if not all(map(_is_size, (unit.cin, unit.cout, unit.kernel, unit.stride, mid, unit.se or 1))):
            raise UserError(
                f"{name} has {unit.cout} channels of {unit.cin}, {unit.mid} in the middle, {unit.se} of "
                f"squeeze-excite, kernel {unit.kernel}, stride {unit.stride}; give whole numbers of 1 or more"
            )
        if given not in (None, unit.cin):
            raise UserError(f"{name} reads {unit.cin} channels, but gets {given}; make them equal")
        if unit.kind == "mbconv" and not unit.expand and unit.mid != unit.cin:
            raise UserError(f"{name} has {unit.mid} middle channels, but no expansion; give {unit.cin}, its input's")
        if not unit.bn and unit.kind in BLOCKS and unit.kind != "conv":
            raise UserError(f"{name}, a block of {unit.kind}, always has batch norm; leave its bn out")
        if unit.kind == "linear" and (unit.kernel, unit.stride, unit.act) != (1, 1, "none"):
            raise UserError(f"{name} is linear; leave its kernel, stride and act out")
        if unit.shortcut and (unit.stride != 1 or unit.cin != unit.cout):
            raise UserError(f"{name} adds its input to another shape; leave its shortcut out")
        given = unit.cout


def _check_ends(spec: NetSpec) -> None:
    """Raise UserError where a spec has no unit, or what it says of the whole is not what its units are."""
    if not spec.units:
        raise UserError("the network has no units; give at least one")
    if not _is_size(spec.resolution):
        raise UserError(f"resolution {spec.resolution!r} is no side of an image; give pixels, a whole number above 0")
    ends = spec.units[0].cin, spec.units[-1].cout
    if (spec.in_channels, spec.classes) != ends:
        raise UserError(
            f"the network has {spec.in_channels} input channels and {spec.classes} classes, but its units read "
            f"{ends[0]} and give {ends[1]}; correct either"
        )
    if not isinstance(spec.bn_eps, float | int) or not spec.bn_eps > 0:
        raise UserError(f"bn_eps {spec.bn_eps!r} must be a number above 0, such as 1e-5")


def _is_size(value: Any) -> bool:
    return isinstance(value, SupportsIndex) and int(value) > 0
