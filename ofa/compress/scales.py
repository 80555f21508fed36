"""Channels of like scale: what one channel's weights are larger by goes into the batch norm behind them.

A codebook that all channels of a layer share then fits each of them, at no byte more.  C channels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from ofa.compress.affine import per_channel
from ofa.compress.chain import Work
from ofa.compress.fold import normed, trace
from ofa.errors import UserError


@dataclass(frozen=True, slots=True)
class Scales:
    """Give the channels of every convolution in front of a batch norm one root mean square; the same function.

    The step before `KMeans` of few bits, or ternary weights.  The mean square is that of weights that are not 0, the
    layer keeps the geometric mean of its channels'.  Raises UserError for a network that torch.fx cannot trace, and
    where no batch norm follows a convolution.
    """

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A copy in evaluation mode."""
        net = copy.deepcopy(net).eval()
        pairs = normed(trace(net), net)
        if not pairs:
            raise UserError("no convolution has a batch norm behind it that can take its scales; leave this step out")
        for conv, norm in pairs.values():
            level(conv, norm)
        return net


@torch.no_grad()
def level(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Divide the channels of a convolution by their scales, and its batch norm's statistics with them, in place.

    A channel shrinks by no more than eps allows: the variance behind it must not fall below 0 for the same function.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None, "as `normed` finds them"
    weight = conv.weight.double()
    square = weight.square().flatten(1).sum(1) / weight.flatten(1).count_nonzero(1).clamp_min(1)
    used = square > 0
    scale = torch.where(used, square / square[used].log().mean().exp(), 1.0).sqrt()
    spread = variance.double() + norm.eps
    if norm.eps > 0:
        scale = torch.minimum(scale, (spread / norm.eps).sqrt())
    conv.weight.copy_(weight / per_channel(scale, weight))
    if conv.bias is not None:
        conv.bias.copy_(conv.bias / scale)
    mean.copy_(mean / scale)
    variance.copy_((spread / scale.square() - norm.eps).clamp_min(0))
