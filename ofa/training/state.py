"""The state of a run as tensors and JSON values, and the log beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ofa.errors import UserError
from ofa.files import atomic_write, read_jsonl
from ofa.supernet import Supernet
from ofa.training.average import Average
from ofa.weights import load_weights


def state_tensors(net: Supernet, optimizer: torch.optim.Optimizer, average: Average | None) -> dict[str, Tensor]:
    """Weights, momentum and averaged weights under names of their own."""
    tensors = {f"weights.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.supernet.state_dict().items()}
    return tensors


def restore(
    tensors: Mapping[str, Tensor],
    net: Supernet,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    source: str | Path,
) -> None:
    """Copy what `state_tensors` gave into a network, its optimizer and average, in place."""
    load_weights(net, _part(tensors, "weights."), source)
    for name, parameter in net.named_parameters():
        optimizer.state[parameter]["momentum_buffer"].copy_(tensors[f"momentum.{name}"])
    averaged = _part(tensors, "average.")
    if (average is None) != (not averaged):
        raise UserError(f"{source} was written {'without' if average else 'with'} an average of weights; give the same")
    if average is not None:
        load_weights(average.supernet, averaged, source)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def trim_log(path: Path, epoch: int) -> None:
    """Drop the lines of epochs after `epoch`, which the checkpoint does not hold, so that each is logged once."""
    lines = read_jsonl(path)
    kept = [line for line in lines if line["epoch"] <= epoch]
    if len(kept) < len(lines):
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))
