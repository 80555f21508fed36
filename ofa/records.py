"""The records that a space is made of: fixed layers and elastic stages, as a YAML file gives them.  Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ofa.arrays import python
from ofa.blocks import BLOCKS
from ofa.errors import UserError
from ofa.kinds import check_fields
from ofa.spec import ACTIVATIONS, KINDS

OF_BLOCKS = ("kernel", "expand", "op")


@dataclass(frozen=True, slots=True)
class Layer:
    """A fixed unit, or one of the operations that a block can choose from.

    channels: before the width multiplier (0: the classes, or those of the stage).  width: the multiplier that scales
    them, by its position in `Arch.width`; None: never scaled.  kind "skip" does nothing, or changes the shape by a 1x1
    convolution with batch norm where it must.
    """

    kind: str
    channels: int = 0
    kernel: int = 1
    stride: int = 1
    expand: float = 1
    act: str = "none"
    se: bool = False
    bn: bool = True
    width: int | None = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind not in (*KINDS, "skip") or self.act not in ACTIVATIONS:
            raise UserError(
                f"layer {self.kind!r} with activation {self.act!r} is not known; "
                f"kinds: {', '.join(KINDS)}; activations: {', '.join(ACTIVATIONS)}"
            )
        check_least(self, {"channels": 0, "width": 0, "kernel": 1, "stride": 1}, above_0=("expand",))
        if self.kernel % 2 == 0:
            raise UserError(f"kernel {self.kernel} must be odd, so that padding by half keeps the size")
        if not self.bn and self.kind in BLOCKS and self.kind != "conv":
            raise UserError(f"layer {self.kind} always has batch norm; leave bn out, or give kind: conv")
        if self.se and not has_gate(self.kind):
            raise UserError(f"layer {self.kind} has no squeeze-excite; leave se out, or give kind: mbconv")
        check_unused(self, f"layer {self.kind}", unused(self.kind))


@dataclass(frozen=True, slots=True)
class Stage:
    """Elastic blocks of one width, the first of which has the stride.

    depth, kernel, expand: a list is a choice (one gene for the stage, or for each block), a number is fixed; a block of
    expand 1 has no expansion, one that chooses it has, for 1 too.
    blocks: how many blocks each depth keeps, where that is not the depth itself.  block: kind of its units, or `op`
    chooses among `ops` for each block, by position.  se: of all blocks, or of each.  before: fixed layers in front.
    """

    channels: int
    stride: int = 1
    depth: int | tuple[int, ...] = 1
    kernel: int | tuple[int, ...] = 3
    expand: float | tuple[float, ...] = 1
    act: str = "relu"
    se: bool | tuple[bool, ...] = False
    block: str = "mbconv"
    blocks: tuple[int, ...] = ()
    width: int | None = 0
    before: tuple[Layer, ...] = ()
    op: tuple[int, ...] = ()
    ops: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("depth", *OF_BLOCKS):
            value = getattr(self, name)
            if isinstance(value, (Sequence, np.ndarray)):
                object.__setattr__(self, name, choices_of(name, value) if len(value) or name != "op" else ())
            elif name == "op":
                object.__setattr__(self, name, (value,))
        for name in ("before", "ops"):
            object.__setattr__(self, name, records(Layer, name, getattr(self, name)))
        object.__setattr__(self, "blocks", choices_of("blocks", self.blocks or self.choices("depth")))
        if isinstance(self.se, Sequence):
            object.__setattr__(self, "se", tuple(self.se))
        self._check()

    def _check(self) -> None:
        least = {"depth": 0, "blocks": 0, "width": 0, "channels": 1, "stride": 1, "kernel": 1}
        check_least(self, least, above_0=("expand",))
        if len(self.blocks) != len(self.choices("depth")):
            raise UserError(f"blocks {self.blocks} must say for each depth of {self.depth} how many blocks it keeps")
        if self.blocks[0] < 1 and self.stride != 1:
            raise UserError(
                f"depth {self.choices('depth')[0]} leaves a stage without a block that strides by {self.stride}; "
                "let depth begin at 1, or give stride 1"
            )
        if isinstance(self.se, tuple) and len(self.se) != self.blocks[-1]:
            raise UserError(f"se {self.se} has {len(self.se)} entries; give one for each of {self.blocks[-1]} blocks")
        if any(kernel % 2 == 0 for kernel in self.choices("kernel")):
            raise UserError(f"kernels {self.kernel} must all be odd")
        if self.block not in tuple(BLOCKS):  # a list cannot be looked up in a dict
            raise UserError(f"block {self.block!r} is not known; choose from {', '.join(BLOCKS)}")
        if self.act not in ACTIVATIONS:
            raise UserError(f"activation {self.act!r} of a stage is not known; choose from {', '.join(ACTIVATIONS)}")
        for name in ("kernel", "expand"):
            if self.chooses(name) and (self.ops or name not in BLOCKS[self.block].elastic):
                raise UserError(f"{name} {self.choices(name)} cannot be chosen in a stage of {self.op or self.block}")
        if set(self.op) - set(range(len(self.ops))) or bool(self.ops) != bool(self.op):
            raise UserError(f"op {self.op} must be positions in ops, 0 to {len(self.ops) - 1}")
        if np.any(self.se) and (self.ops or not has_gate(self.block)):
            raise UserError(f"a stage of {'ops' if self.ops else self.block} has no squeeze-excite; leave its se out")
        for op in self.ops:
            if op.kind not in (*BLOCKS, "skip") or (op.channels, op.stride, op.width, op.bn) != (0, 1, 0, True):
                raise UserError(f"{op} cannot be chosen; an operation is a block or skip, with kernel, expand, act, se")
        if self.ops:
            check_unused(self, "a stage of ops, each of which has its own,", ("block", "kernel", "expand", "act"))
        else:
            check_unused(self, f"a stage of {self.block}", unused(self.block))

    def chooses(self, dimension: str) -> bool:
        """Whether the stage has genes of this dimension."""
        value = getattr(self, dimension)
        return isinstance(value, tuple) and bool(value)

    def nearest_depth(self, value: float) -> float:
        """The smaller of two depths that `value` is between, where the larger keeps one block more; else `value`."""
        pairs = pairwise(zip(self.choices("depth"), self.blocks, strict=True))
        within = (least for (least, n), (most, more) in pairs if least < value < most and more == n + 1)
        return next(within, value) if isinstance(value, int | float) else value

    def choices(self, dimension: str) -> tuple[float, ...]:
        """What a dimension can be: its choices, or its fixed value alone; nothing for `op` where there are none."""
        value = getattr(self, dimension)
        return value if isinstance(value, tuple) else (value,)

    def has_se(self, block: int) -> bool:
        """Whether a block has squeeze-excite."""
        return self.se[block] if isinstance(self.se, tuple) else self.se


def has_gate(kind: str) -> bool:
    """Whether a kind of block can have squeeze-excite."""
    return kind in BLOCKS and "se.reduce" in BLOCKS[kind].axes


def unused(kind: str) -> tuple[str, ...]:
    """Fields that mean nothing for a kind of layer, besides `se` and `bn`."""
    if kind in BLOCKS:
        return () if "expand" in BLOCKS[kind].elastic else ("expand",)
    return ("channels", "expand", "act", "width", *(() if kind == "maxpool" else ("kernel", "stride")))


def check_unused(part: Any, owner: str, names: Sequence[str]) -> None:
    """Raise UserError where one of the fields that mean nothing there is given."""
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name in names and value not in (field.default, None):
            raise UserError(f"{owner} takes no {field.name}; leave {field.name}={value} out")


def record(kind: type, values: Any) -> Any:
    """A dataclass from a mapping, such as a record of a YAML file; raises UserError where its fields do not fit."""
    if not isinstance(values, Mapping):
        raise UserError(f"{kind.__name__.lower()} {values} is no record; give its fields as {{name: value, ...}}")
    name, known = kind.__name__.lower(), [field.name for field in fields(kind)]
    if unknown := set(values) - set(known):
        raise UserError(f"{name} field {sorted(unknown)} is not known; choose from {known}")
    needed = [field.name for field in fields(kind) if field.default is field.default_factory is MISSING]
    if missing := [field for field in needed if field not in values]:
        raise UserError(f"a {name} record lacks {', '.join(missing)}; give {missing[0]}: ...")
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"a {name} record has a value of another type than its field: {error}") from None


def records(kind: type, name: str, values: Any) -> tuple[Any, ...]:
    """Dataclasses from a list of mappings, or of what they are already.

    Raises UserError for what is no list, and says which record of it is wrong.
    """
    if not isinstance(values, list | tuple):
        raise UserError(f"{name}={values} must be a list of records; give [{{name: value, ...}}, ...]")
    found = []
    for i, value in enumerate(values):
        try:
            found.append(value if isinstance(value, kind) else record(kind, value))
        except UserError as error:
            raise UserError(f"{name}[{i}]: {error}") from None
    return tuple(found)


def check_least(part: Any, least: Mapping[str, int], *, above_0: Sequence[str]) -> None:
    """Raise UserError where a field, or one of its choices, is below its `least`, or is one of `above_0` and is not."""
    for name in (*least, *above_0):
        value = getattr(part, name)
        for number in value if isinstance(value, tuple) else (value,):
            if name in least and number is not None and number < least[name]:
                raise UserError(f"{type(part).__name__} has {name}={value}; give {least[name]} or more")
            if name in above_0 and not 0 < number < math.inf:
                raise UserError(f"{type(part).__name__} has {name}={value}; give a number above 0")


def choices_of(name: str, values: Any) -> tuple[Any, ...]:
    """Different values in ascending order, at most as many as a gene can count; raises UserError for others."""
    values = tuple(map(python, values)) if isinstance(values, (Sequence, np.ndarray)) else (python(values),)
    if not values or list(values) != sorted(set(values)) or len(values) > 127:
        raise UserError(f"{name} {values} must be 1 to 127 different values in ascending order")
    return values


def kept_choices(name: str, values: tuple[float, ...], wanted: int | Sequence[float] | None) -> tuple[float, ...]:
    """The n largest (an int) or the listed ones of some choices; all where None."""
    if wanted is None:
        return values
    if isinstance(wanted, int | np.integer):
        if wanted < 1:
            raise UserError(f"{name}={wanted} keeps no choice; keep at least 1")
        return values[-wanted:]
    if not np.iterable(wanted):
        raise UserError(f"{name}={wanted!r} must be how many choices to keep, or a list of these; {name}=[{wanted}]")
    kept = tuple(value for value in values if value in set(wanted))
    if not kept:
        raise UserError(f"{name} {list(wanted)} leaves none of the choices {values}")
    return kept


def kept_stage(stage: Stage, choices: Mapping[str, int | Sequence[float]]) -> Stage:
    """A stage with some of its choices, as `Space.restrict` takes them."""
    kept: dict[str, Any] = {
        name: kept_choices(name, getattr(stage, name), choices.get(name))
        for name in ("depth", *OF_BLOCKS)
        if stage.chooses(name)
    }
    count = dict(zip(stage.choices("depth"), stage.blocks, strict=True))
    kept["blocks"] = tuple(count[depth] for depth in kept.get("depth", stage.choices("depth")))
    if isinstance(stage.se, tuple):
        kept["se"] = stage.se[: kept["blocks"][-1]]
    return replace(stage, **kept)
