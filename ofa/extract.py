"""From the supernet to a plain network, and its batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from ofa.errors import UserError
from ofa.space import Arch
from ofa.spec import NetSpec, Unit
from ofa.static import StaticNet
from ofa.supernet import Supernet
from ofa.table import arch_units, space_spec


@torch.no_grad()
def extract(supernet: Supernet, arch: Arch) -> StaticNet:
    """The plain network of an architecture with a copy of the supernet's weights, in evaluation mode.

    Its batch-norm statistics are the supernet's stored ones; `recalibrate` it before use.
    """
    net = _blank(space_spec(supernet.space, arch), next(supernet.parameters()).device)
    kept = [m for m, unit in zip(supernet.units, arch_units(supernet.space, arch), strict=True) if unit is not None]
    for elastic, plain in zip(kept, net.units, strict=True):
        if not isinstance(elastic, nn.AdaptiveAvgPool2d):
            elastic.copy_to(plain)  # type: ignore[operator]
    return net


def _blank(spec: NetSpec, device: torch.device) -> StaticNet:
    """The plain net of a spec in evaluation mode, its values not set, channels last.

    Making and initialising modules costs several times the copy of the weights, so each unit is made once.
    """
    net = StaticNet(replace(spec, units=()))
    net.spec = spec
    net.units = nn.ModuleList([_twin(_prototype(unit), device) for unit in spec.units])
    return net.eval()


@lru_cache(maxsize=4096)
def _prototype(unit: Unit) -> nn.Module:
    with torch.device("meta"):
        return StaticNet(NetSpec((unit,), resolution=1, in_channels=unit.cin, classes=unit.cout)).units[0]


def _twin(module: nn.Module, device: torch.device) -> nn.Module:
    """A module like another, with new tensors, whose values are not set."""
    twin = object.__new__(type(module))
    twin.__dict__.update({k: v.copy() if isinstance(v, (dict, set)) else v for k, v in module.__dict__.items()})
    for values in (twin._parameters, twin._buffers):
        for name, old in values.items():
            if old is not None:
                layout = torch.channels_last if old.ndim == 4 else torch.contiguous_format
                new = torch.empty(old.shape, dtype=old.dtype, device=device, memory_format=layout)
                values[name] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new
    for name, child in twin._modules.items():
        twin._modules[name] = None if child is None else _twin(child, device)
    return twin


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
