"""Weights on disk: safetensors files, written atomically, checked whole before a single tensor is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ofa.errors import UserError
from ofa.files import atomic_write


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors, and JSON metadata, to `path` at once."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    atomic_write(path, save(content, header))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file; raises UserError, naming it, where it is absent or corrupt."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give another file, or run the stage that writes it")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is corrupt ({error}); give another, or delete it and run its stage again") from None
    return tensors, metadata


def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path, called: Callable[[str], str] = str
) -> None:
    """Copy tensors into a module, all or none; raises UserError where names or shapes differ.

    called: the name that an error gives a tensor, where the file has other names than the module.
    """
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    shapes = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if missing or extra or shapes:
        sizes = [f"{called(n)} {tuple(tensors[n].shape)} for {tuple(own[n].shape)}" for n in shapes[:3]]
        raise UserError(
            f"{source} does not fit this network: missing {_few(missing, called)}, unknown {_few(extra, called)}, "
            f"other shape {', '.join(sizes) or 'none'}; use the file of the same network or space, for the same classes"
        )
    for name, tensor in tensors.items():
        if own[name].is_floating_point() and not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
            raise UserError(
                f"{source} has values in {name} that are no finite floats; give weights that were trained well"
            )
    module.load_state_dict(dict(tensors))


def _few(names: Sequence[str], called: Callable[[str], str]) -> str:
    return ", ".join(map(called, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
