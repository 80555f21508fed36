"""An exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ofa.errors import UserError
from ofa.supernet import Supernet


class Average:
    """A supernet whose weights are the running mean of another's: w <- d w + (1 - d) w', after each step.

    d is `decay`, less in the first steps, (1 + t) / (10 + t) after t of them, so that the start is forgotten.  Its nets
    need batch-norm statistics of their own, as all nets of a supernet do: `specialise` gives them.
    """

    def __init__(self, supernet: Supernet, decay: float) -> None:
        if not 0 < decay < 1:
            raise UserError(f"average {decay} is the share that the mean of the weights keeps; give 0.999, or null")
        self.decay, self.steps = decay, 0
        self.supernet = copy.deepcopy(supernet).requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Take one step's weights in."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        own, new = self.supernet.state_dict(), net.state_dict()
        names = [name for name, tensor in own.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([own[name] for name in names], [new[name] for name in names], 1 - decay)

    def restart(self, net: nn.Module) -> None:
        """Begin again from a network's weights, whose channels have changed their places."""
        self.supernet.load_state_dict(net.state_dict())
        self.steps = 0
