"""Whether options are of the kinds that a signature names: whole numbers, numbers, switches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

from ofa.errors import UserError

KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "None": ((NoneType,), "null"),
}


def check_kinds(target: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise UserError for an option of another kind than its annotation, such as 2.5 for `int` or `int | None`.

    Annotations with other types in them are left to the target, as is all of one that has no signature.
    """
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # of a function in C
        return
    for name, parameter in parameters.items():
        wanted = inspect.formatannotation(parameter.annotation).strip("'").split(" | ")
        if name in options and KINDS.keys() >= set(wanted) and not any(_is(options[name], kind) for kind in wanted):
            rule = " or ".join(KINDS[kind][1] for kind in wanted)
            raise UserError(f"{target.__name__} has {name}={options[name]}; give {rule}")


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, KINDS[kind][0]) and isinstance(value, bool) == (kind == "bool")
