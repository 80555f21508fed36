"""A plain network as data: the units it is built from, in order, with every width written out.

A NetSpec is what a card stores and what `ofa.static.build_spec` turns into a module; a subnet, a pruned subnet and a
network from a published block list are all one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

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
        """From `to_dict`; raises UserError for unknown or missing fields."""
        known = {field.name for field in fields(Unit)}
        try:
            for unit in values["units"]:
                if unknown := set(unit) - known:
                    raise UserError(f"unit field {sorted(unknown)} is not known; a unit has {sorted(known)}")
            units = tuple(Unit(**unit) for unit in values["units"])
            others = {key: value for key, value in values.items() if key != "units"}
            return NetSpec(units, **others)
        except (KeyError, TypeError) as error:
            raise UserError(f"not a network spec ({error}); it needs units, resolution, in_channels, classes") from None
