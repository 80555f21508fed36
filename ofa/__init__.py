"""Once-for-all networks: spaces, elastic layers, training, extraction, compression, export.

Public names load when first used (PEP 562), so that `ofa.space` needs no torch.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# else ONNX Runtime, once imported, keeps an identifier of this machine and reports what it does to its makers
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Arch": "space",
    "Space": "space",
    "load_space": "space",
    "NetSpec": "spec",
    "Unit": "spec",
    "layer_table": "table",
    "spec_table": "table",
    "space_spec": "units",
    "Supernet": "supernet",
    "StaticNet": "static",
    "build": "static",
    "build_spec": "static",
    "extract": "extraction",
    "recalibrate": "extraction",
    "Phase": "schedule",
    "Schedule": "schedule",
    "Trainer": "train",
    "UserError": "errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its home, or a module."""
    if name in _HOMES:
        return getattr(import_module(f"ofa.{_HOMES[name]}"), name)
    if find_spec(f"ofa.{name}") is None:
        raise AttributeError(f"module 'ofa' has no attribute {name!r}")
    return import_module(f"ofa.{name}")
