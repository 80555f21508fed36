"""The optimizer of training: fused SGD with Nesterov momentum."""

from __future__ import annotations

import torch
from torch import nn

from ofa.schedule import Schedule


def make_optimizer(net: nn.Module, schedule: Schedule) -> torch.optim.SGD:
    """Fused SGD; no weight decay on vectors.  Momentum buffers exist from the start, as fused SGD needs them to.

    `set_rate` gives each group of parameters its share of the learning rate; the shares do not touch weight decay.
    """
    groups: dict[float, dict[bool, list[nn.Parameter]]] = {}
    named = list(net.named_parameters())
    for name, parameter in named:
        decayed = parameter.ndim > 1 and "transforms" not in name
        groups.setdefault(_share(name, schedule), {}).setdefault(decayed, []).append(parameter)
    every = [
        {"params": parameters, "share": share, "weight_decay": schedule.weight_decay / share if decayed else 0.0}
        for share, parts in groups.items()
        for decayed, parameters in parts.items()
    ]
    optimizer = torch.optim.SGD(every, lr=0.1, momentum=schedule.momentum, nesterov=True, fused=True)
    for _, parameter in named:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _share(name: str, schedule: Schedule) -> float:
    """Of the learning rate, for a parameter of a supernet."""
    share = schedule.bias_lr if name.endswith("bias") else 1.0
    share *= schedule.norm_lr if name.endswith("bn.weight") else 1.0
    return share * schedule.classifier_lr if ".linear." in name else share


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
