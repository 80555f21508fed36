"""The checkpoint of a training run: tensors and JSON values, written whole or not at all, by one process or by many.

One process writes checkpoint.safetensors.  Many write checkpoint/step-<n> with torch.distributed.checkpoint, each a
part, and then the name of that folder into checkpoint/latest.json; the folder of the run must be one that all machines
share.  Any number of processes goes on from either.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from ofa.errors import UserError
from ofa.files import read_json, write_json
from ofa.parallel import World
from ofa.weights import load_tensors, save_tensors

SINGLE, MANY, LATEST = "checkpoint.safetensors", "checkpoint", "latest.json"


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], world: World) -> None:
    """Replace the checkpoint of `folder`; every process calls it.

    tensors: the same in all processes, or of this one alone, under a name of its own.  values: JSON, with the key step.
    """
    single, many = folder / SINGLE, folder / MANY
    if world.size == 1:
        save_tensors(single, tensors, values)
        shutil.rmtree(many, ignore_errors=True)
        return
    name = world.told(_free_name(many, values["step"]))
    try:
        dcp.save({key: tensor.detach() for key, tensor in tensors.items()}, checkpoint_id=many / name)
    except CheckpointException as error:
        raise UserError(
            f"{many / name} cannot be written ({_cause(error)}); see to it and run the stage again, which goes on from "
            "the checkpoint before"
        ) from None
    if world.first:
        write_json(many / LATEST, {"folder": name, "values": dict(values)})
        single.unlink(missing_ok=True)
        for old in many.glob("step-*"):
            if old.name != name:
                shutil.rmtree(old)
    world.wait()


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors, in CPU memory, and values of the newest checkpoint of a folder; None where there is none.

    Raises UserError, naming the file, where it is corrupt.
    """
    single, latest = folder / SINGLE, folder / MANY / LATEST
    found = load_tensors(single) if single.exists() else None
    pointer = read_json(latest) if latest.exists() else None
    if pointer is None or (found is not None and found[1]["step"] >= pointer["values"]["step"]):
        return found
    return _read(latest.with_name(pointer["folder"])), pointer["values"]


def _free_name(many: Path, step: int) -> str:
    """A folder that is not the newest checkpoint's, which stays whole until the new one is: after a rollback to it."""
    newest = read_json(many / LATEST)["folder"] if (many / LATEST).exists() else None
    return f"step-{step}" if newest != f"step-{step}" else f"step-{step}-again"


def _cause(error: BaseException) -> str:
    """The first line of an error, or of the first of those that the processes had."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _read(path: Path) -> dict[str, Tensor]:
    try:
        about = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in about.items()}  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)", UserWarning)
            dcp.load(tensors, checkpoint_id=path, no_dist=True)
    except (Exception, CheckpointException) as error:  # of any type, as the reader's are
        raise UserError(f"{path} is corrupt ({_cause(error)}); delete {path.parent} and run the stage again") from None
    return tensors
