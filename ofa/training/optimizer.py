"""The optimizer of training: fused SGD with Nesterov momentum, and Muon for convolutions where a schedule says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ofa.parallel import World
from ofa.schedule import Schedule
from ofa.training.muon import Muon, turnable


def make_optimizer(net: nn.Module, schedule: Schedule, world: World | None = None) -> torch.optim.SGD:
    """Fused SGD; no weight decay on vectors.  Momentum buffers exist from the start, as fused SGD needs them to.

    With `muon`, dense convolutions that a batch norm follows, but the first, take its steps instead; the processes of
    `world` share the work.
    `set_rate` gives each group of parameters its share of the learning rate.
    """
    turned = turnable(net) if schedule.muon else []
    passed = {id(weight) for weight in turned}
    named = {name: weight for name, weight in net.named_parameters() if id(weight) not in passed}
    biases = [p for name, p in named.items() if name.endswith("bias")]
    decayed = [p for name, p in named.items() if p.ndim > 1 and "transforms" not in name]
    rest = [p for name, p in named.items() if not name.endswith("bias") and (p.ndim <= 1 or "transforms" in name)]
    groups = [
        {"params": decayed, "weight_decay": schedule.weight_decay, "share": 1.0},
        {"params": rest, "weight_decay": 0.0, "share": 1.0},
        {"params": biases, "weight_decay": 0.0, "share": schedule.bias_lr},
    ]
    if turned:
        groups.append({"params": turned, "weight_decay": 0.0, "share": 1.0, "turn": schedule.muon})
    options: dict[str, Any] = {"lr": 0.1, "momentum": schedule.momentum, "nesterov": schedule.momentum > 0}
    optimizer = Muon(groups, world, fused=True, **options) if turned else torch.optim.SGD(groups, fused=True, **options)
    for parameter in net.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter, in place."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]


def reset_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Forget the momentum of every parameter, in place."""
    for state in optimizer.state.values():
        state["momentum_buffer"].zero_()


def clip(net: nn.Module, schedule: Schedule) -> None:
    """Limit the gradient as the schedule says, in place: its norm, or each of its entries."""
    if schedule.clip_norm is not None:
        nn.utils.clip_grad_norm_(net.parameters(), schedule.clip_norm)
    if schedule.clip_value is not None:
        nn.utils.clip_grad_value_(net.parameters(), schedule.clip_value)
