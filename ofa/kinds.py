"""Whether options are of the kinds that a signature names: whole numbers, numbers, switches, lists of these."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import NoneType
from typing import Any

from ofa.arrays import python
from ofa.errors import UserError

KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "None": ((NoneType,), "null"),
}
PART = re.compile(r"(?!Any$|typing\.)(\w+\.)*[A-Z]\w*")  # an annotation that is one class
TEXTS = ("str", "str | Path")


def check_kinds(target: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise UserError for an option of another kind than its annotation, such as 2.5 for `int` or `int | None`.

    One value alone will do for `tuple[int, ...]`, and NumPy's numbers for Python's.  None is refused for one class, as
    for `Finetuning`, and for a text.  Other annotations are left to the target, as is all of one that has no signature.
    """
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # of a function in C
        return
    for name, parameter in parameters.items():
        annotation = inspect.formatannotation(parameter.annotation).strip("'")
        kinds, lists = re.subn(r"tuple\[(\w+), \.\.\.\]", r"\1", annotation)
        wanted = list(dict.fromkeys(kinds.split(" | ")))
        if name in options and options[name] is None and PART.fullmatch(annotation):
            raise UserError(f"{target.__name__} has {name}=None; leave that out, or give its options")
        if name in options and options[name] is None and annotation in TEXTS:
            raise UserError(f"{target.__name__} has {name}=None; give a text")
        if name not in options or not KINDS.keys() >= set(wanted):
            continue
        given = python(options[name])
        values = given if lists and isinstance(given, list | tuple) else [given]
        if not all(any(_is(python(value), kind) for kind in wanted) for value in values):
            rule = " or ".join(KINDS[kind][1] for kind in wanted) + " or a list of them" * bool(lists)
            raise UserError(f"{target.__name__} has {name}={options[name]}; give {rule}")


def check_fields(part: Any) -> None:
    """`check_kinds` of the fields of a dataclass."""
    check_kinds(type(part), {field.name: getattr(part, field.name) for field in fields(part)})


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, KINDS[kind][0]) and isinstance(value, bool) == (kind == "bool")
