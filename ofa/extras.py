"""Optional libraries: loaded where they are used, and named with their extra where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ofa.errors import UserError


def extra(module: str, name: str) -> Any:
    """The module; raises UserError that names the extra to install where it is missing."""
    try:
        with quiet():
            return importlib.import_module(module)
    except ModuleNotFoundError:
        require(module, name)
        raise


def require(module: str, name: str) -> None:
    """Raise UserError that names the extra to install where the package of a module is missing."""
    if not installed(module):
        package = module.split(".")[0]
        raise UserError(f'{package} is not installed; install it with: pip install "ofa-nas[{name}]"') from None


def require_packages(part: object) -> None:
    """`require` for all packages that the module of a part, such as a runtime or a step, says it needs."""
    home = sys.modules[type(part).__module__]
    for package in getattr(home, "PACKAGES", ()):
        require(package, home.EXTRA)


def installed(module: str) -> bool:
    """Whether the package of a module can be imported."""
    return importlib.util.find_spec(module.split(".")[0]) is not None


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep back what libraries write to the standard streams; the list holds it after the block."""
    said: list[str] = []
    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = [os.dup(1), os.dup(2)]
        try:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield said
        finally:
            for stream, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
