"""How close a compressed network stays to the one it came from.  N images, K classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr(exact: Tensor, changed: Tensor) -> float:
    """Signal to quantization noise of tensors of one shape, in dB: 10 log10 of sum x^2 over sum (x - y)^2."""
    noise = float((exact.double() - changed.double()).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(float(exact.double().square().sum()) / noise)


def agreement(exact: Tensor, changed: Tensor) -> float:
    """Share of images (0 to 1) of which two sets of logits (N, K) name the same class."""
    return float((exact.argmax(1) == changed.argmax(1)).double().mean())


@torch.inference_mode()
def logits(net: torch.nn.Module, batches: list[Tensor]) -> Tensor:
    """What a network in evaluation mode gives on all batches, (N, K)."""
    return torch.cat([net(batch) for batch in batches])
