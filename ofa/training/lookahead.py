"""Lookahead: slow weights that follow the trained ones every few steps, and from which these then go on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

KEPT = 0.95  # of the slow weights for each step, at a phase's end


class Lookahead:
    """After every k steps: slow <- d slow + (1 - d) weights, weights <- slow (Zhang et al. 2019, alg. 1).

    d = 0.95^k t^3, t the share of the phase that has run (Jordan 2024, as `Schedule` cites it): the large steps at its
    start are taken as they are, the small ones at its end averaged.  A phase ends with the slow weights, after fewer
    steps where k does not divide its steps.
    """

    def __init__(self, net: nn.Module, every: int) -> None:
        self.every = every
        self.slow = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}

    @torch.no_grad()
    def step(self, net: nn.Module, taken: int, done: float) -> None:
        """To be called after each step; taken, done: steps of the phase so far, and their share of all, above 0."""
        if taken % self.every and done < 1:
            return
        slow: list[Tensor] = list(self.slow.values())
        weights: list[Tensor] = list(net.parameters())
        steps = taken % self.every or self.every
        torch._foreach_lerp_(slow, weights, 1 - KEPT**steps * done**3)
        torch._foreach_copy_(weights, slow)

    @torch.no_grad()
    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Take other slow weights, by their names in the network."""
        for name, slow in self.slow.items():
            slow.copy_(weights[name])
