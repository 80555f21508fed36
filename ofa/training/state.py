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
from ofa.training.lookahead import Lookahead
from ofa.weights import load_weights


def state_tensors(
    net: Supernet, optimizer: torch.optim.Optimizer, average: Average | None, lookahead: Lookahead | None
) -> dict[str, Tensor]:
    """Weights, momentum, averaged and slow weights under names of their own."""
    tensors = {f"weights.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.supernet.state_dict().items()}
    if lookahead is not None:
        tensors |= {f"slow.{name}": tensor for name, tensor in lookahead.slow.items()}
    return tensors


def restore(
    tensors: Mapping[str, Tensor],
    net: Supernet,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    lookahead: Lookahead | None,
    source: str | Path,
) -> None:
    """Copy what `state_tensors` gave into a network, its optimizer, average and lookahead, in place."""
    load_weights(net, _part(tensors, "weights."), source)
    for name, parameter in net.named_parameters():
        optimizer.state[parameter]["momentum_buffer"].copy_(tensors[f"momentum.{name}"])
    averaged, slow = _part(tensors, "average."), _part(tensors, "slow.")
    for name, own, stored in (("an average of weights", average, averaged), ("a lookahead", lookahead, slow)):
        if (own is None) != (not stored):
            raise UserError(f"{source} was written {'without' if own else 'with'} {name}; give the same")
    if average is not None:
        load_weights(average.supernet, averaged, source)
    if lookahead is not None:
        lookahead.restart(slow)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def trim_log(path: Path, epoch: int) -> None:
    """Drop the lines of epochs after `epoch`, which the checkpoint does not hold, so that each is logged once."""
    lines = read_jsonl(path)
    kept = [line for line in lines if line["epoch"] <= epoch]
    if len(kept) < len(lines):
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))
