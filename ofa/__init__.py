"""Once-for-all networks: spaces, elastic layers, training, extraction, compression, export.

Public names load when first used (PEP 562), so that `ofa.space` needs no torch.
"""

import os
from importlib import import_module
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
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ofa' has no attribute {name!r}")
    return getattr(import_module(f"ofa.{_HOMES[name]}"), name)
