"""What a compressed network holds besides its weights: batch norms and biases, in fewer bytes.  C channels."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ofa.compress.chain import Work


@dataclass(frozen=True, slots=True)
class Norms:
    """Take each batch norm's statistics into its scale and shift, and round these and biases to half precision.

    It computes the same, up to the rounding: a channel's mean is then 0 and its variance 1, which packed files hold
    once for all.  Four float32 values a channel become two of half precision; where weights are few bits each, that is
    much of the file.  half: False leaves float32, and the function exact.  The last step before a network ships: with
    the statistics gone, it can be trained or recalibrated no more.
    """

    half: bool = True

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A copy in evaluation mode."""
        net = copy.deepcopy(net).eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                merge_statistics(module)
        if self.half:
            with torch.no_grad():
                for parameter in net.parameters():
                    if parameter.ndim == 1:
                        parameter.copy_(parameter.half())
        return net


@torch.no_grad()
def merge_statistics(norm: nn.BatchNorm2d) -> None:
    """The same affine function of each channel, in place, with mean 0 and variance 1 (that is, 1 with eps added)."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None or not norm.affine:
        return
    scale: Tensor = norm.weight * torch.rsqrt(variance.double() + norm.eps)
    norm.bias.copy_(norm.bias - mean * scale)
    norm.weight.copy_(scale)
    mean.zero_()
    variance.fill_(1 - norm.eps)
