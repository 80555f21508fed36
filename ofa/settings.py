"""Architectures as once-for-all and MCUNet write them: the settings of `set_active_subnet`.  Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from ofa.arrays import python
from ofa.errors import UserError
from ofa.space import Arch, Space

NAMES = {"r": "resolution", "image_size": "resolution", "w": "width", "wid": "width", "d": "depth"}
NAMES |= {"ks": "kernel", "e": "expand", "op": "op"}


SHORT = ("kernel", "expand")  # lists of which DyNAS-T leaves out ProxylessNAS's last block


def arch_of(
    space: Space, config: Mapping[str, Any], *, resolution: int | None = None, short: bool | None = None
) -> Arch:
    """An architecture from settings: d, ks, e, w or wid, r or image_size, and op where blocks choose an operation.

    d, ks, e, op: one for each stage or block, or one for all; skipped blocks have theirs, which is not used, or none.
    Where ks or e lack the last block (DyNAS-T's do for ProxylessNAS), it keeps its largest choice, as in once-for-all's
    code.  short: whether a list that is one shorter than all blocks is such a one (None: unless so many are active).
    w: the space's width multipliers, or, where there is no float or not all are among them, positions among these.
    `space.encode` takes the result, and checks it.  None is as not given.  Raises UserError.
    """
    if unknown := set(config) - set(NAMES):
        raise UserError(f"setting {sorted(unknown)} is not known; choose from {', '.join(sorted(NAMES))}")
    given = {NAMES[name]: _list(name, value) for name, value in config.items() if value is not None}
    side = resolution or given.get("resolution", [space.resolution[-1]])[0]
    depth = _long(given.get("depth", []), sum(stage.chooses("depth") for stage in space.stages))
    widths = given.get("width", [len(space.width) - 1])
    lists = {
        name: _blocks(space, name, given[name], depth, short) for name in ("kernel", "expand", "op") if name in given
    }
    return Arch(side, tuple(depth), width=_widths(space, widths), **lists)


def _blocks(space: Space, name: str, values: list[Any], depth: list[Any], short: bool | None) -> tuple[Any, ...]:
    """Values of one dimension for every block that chooses it, or for every active one."""
    own = [space.stages[stage] for stage, _ in space.blocks if space.stages[stage].chooses(name)]
    if short is None:
        short = _active(space, name, depth) != len(values)
    if short and name in SHORT and len(values) == len(own) - 1 and not own[-1].chooses("depth"):
        values = [*values, own[-1].choices(name)[-1]]
    return tuple(_long(values, len(own)))


def _active(space: Space, name: str, depth: list[Any]) -> int | None:
    """How many active blocks choose a dimension at these depths; None for depths that are not of the space."""
    depths, blocks = iter(depth), 0
    for stage in space.stages:
        choices = stage.choices("depth")
        value = next(depths, None) if stage.chooses("depth") else choices[0]
        if value not in choices:
            return None
        blocks += stage.blocks[choices.index(value)] * stage.chooses(name)
    return blocks


def _long(values: list[Any], n: int) -> list[Any]:
    return values * n if len(values) == 1 and n else values


def _widths(space: Space, values: list[Any]) -> tuple[float, ...]:
    if any(isinstance(value, float) for value in values) and set(values) <= set(space.width):
        return tuple(map(float, values))
    for value in values:
        if value % 1 or not 0 <= value < len(space.width):
            raise UserError(
                f"width {value} of {values} is no position among {space.width} of {space.name}; give positions alone, "
                "or multipliers alone"
            )
    return tuple(space.width[int(value)] for value in values)


def _list(name: str, value: Any) -> list[Any]:
    """The numbers of a setting, as Python's; raises UserError for anything else."""
    value = python(value)
    values = list(map(python, value)) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values or not all(isinstance(entry, int | float) and isfinite(entry) for entry in values):
        raise UserError(f"setting {name}={value!r} is not understood; give a number or a list of numbers")
    return values
