"""The state of a run on disk: weights, momentum and counters in one file, the log beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ofa.files import atomic_write, read_jsonl
from ofa.training.checkpoint import read_checkpoint, write_checkpoint
from ofa.training.gradients import Gradients
from ofa.weights import load_weights


def save_state(
    folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, gradients: Gradients, state: Mapping[str, Any]
) -> None:
    """Write weights, momentum and the JSON values of `state` to the checkpoint of `folder`; every process calls it."""
    tensors = {f"weights.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    held, values = gradients.memory()
    write_checkpoint(folder, tensors | held, {**state, **values}, gradients.scale.world)


def load_state(
    folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, gradients: Gradients
) -> dict[str, Any] | None:
    """Read what `save_state` wrote, in place; returns the JSON values, None where there is no checkpoint."""
    found = read_checkpoint(folder)
    if found is None:
        return None
    tensors, state = found
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    load_weights(net, weights, folder)
    for name, parameter in net.named_parameters():
        optimizer.state[parameter]["momentum_buffer"].copy_(tensors[f"momentum.{name}"])
    gradients.recall(tensors, state, int(state["step"]))
    return state


def trim_log(path: Path, epoch: int) -> None:
    """Drop the lines of epochs after `epoch`, which the checkpoint does not hold, so that each is logged once."""
    lines = read_jsonl(path)
    kept = [line for line in lines if line["epoch"] <= epoch]
    if len(kept) < len(lines):
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))
