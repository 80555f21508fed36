"""The state of a run on disk: weights, momentum and counters in one file, the log beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ofa.files import atomic_write, read_jsonl
from ofa.weights import load_tensors, load_weights, save_tensors


def save_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Write weights, momentum and the JSON values of `state` to `path` at once."""
    tensors = {f"weights.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    save_tensors(path, tensors, state)


def load_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read what `save_state` wrote into a network and its optimizer, in place; returns the JSON values."""
    tensors, state = load_tensors(path)
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    load_weights(net, weights, path)
    for name, parameter in net.named_parameters():
        optimizer.state[parameter]["momentum_buffer"].copy_(tensors[f"momentum.{name}"])
    return state


def trim_log(path: Path, epoch: int) -> None:
    """Drop the lines of epochs after `epoch`, which the checkpoint does not hold, so that each is logged once."""
    lines = read_jsonl(path)
    kept = [line for line in lines if line["epoch"] <= epoch]
    if len(kept) < len(lines):
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))
