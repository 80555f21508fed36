"""Optional libraries: loaded where they are used, and named with their extra where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ofa.errors import UserError


def extra(module: str, name: str) -> Any:
    """The module; raises UserError that names the extra to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        if installed(module):
            raise
        package = module.split(".")[0]
        raise UserError(f'{package} is not installed; install it with: pip install "ofa-nas[{name}]"') from None


def installed(module: str) -> bool:
    """Whether the package of a module can be imported."""
    return importlib.util.find_spec(module.split(".")[0]) is not None
