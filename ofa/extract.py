"""From the supernet to a plain network, and its batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ofa.errors import UserError
from ofa.space import Arch
from ofa.static import StaticNet
from ofa.supernet import Supernet
from ofa.units import arch_units, space_spec


@torch.no_grad()
def extract(supernet: Supernet, arch: Arch) -> StaticNet:
    """The plain network of an architecture with a copy of the supernet's weights, in evaluation mode.

    Its batch-norm statistics are the supernet's stored ones; `recalibrate` it before use.
    """
    with torch.device("meta"):
        net = StaticNet(space_spec(supernet.space, arch))
    device = next(supernet.parameters()).device
    net = net.to_empty(device=device).to(memory_format=torch.channels_last)
    kept = [m for m, unit in zip(supernet.units, arch_units(supernet.space, arch), strict=True) if unit is not None]
    for elastic, plain in zip(kept, net.units, strict=True):
        if hasattr(elastic, "copy_to"):
            elastic.copy_to(plain)  # type: ignore[operator]
    return net.eval()


@torch.no_grad()
def recalibrate(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the batch-norm statistics of `net` to their mean over `batches` (N, C, H, W), in place, in one pass.

    Raises UserError where there is no batch.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    training = net.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average instead of an exponential one
    net.train()
    seen = 0
    for batch in batches:
        net(batch)
        seen += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.train(training)
    if not seen:
        raise UserError("recalibration got no images; give at least one batch")
