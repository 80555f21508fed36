"""From the supernet to a plain network, and its batch-norm statistics."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor, nn

from ofa.errors import UserError
from ofa.inference import calibrating
from ofa.modules import evaluating
from ofa.space import Arch
from ofa.spec import NetSpec, Unit
from ofa.static import StaticNet
from ofa.supernet import Supernet
from ofa.units import arch_units, space_spec

COPIED = (dict, OrderedDict, set)  # what a module keeps its children, tensors and hooks in


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector at rest: the thousands of tables of a new net would wake it, a sixth of the time.

    At the end they count as old, or it would go through all of them at the next allocation.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        if collecting:
            gc.enable()


@torch.no_grad()
@_no_collection()
def extract(supernet: Supernet, arch: Arch) -> StaticNet:
    """The plain network of an architecture with a copy of the supernet's weights, in evaluation mode.

    Its batch-norm statistics are the supernet's stored ones; `recalibrate` it before use.
    """
    net = _blank(space_spec(supernet.space, arch))
    kept = [m for m, unit in zip(supernet.units, arch_units(supernet.space, arch), strict=True) if unit is not None]
    for elastic, plain in zip(kept, net.units, strict=True):
        if hasattr(elastic, "copy_to"):
            elastic.copy_to(plain)  # type: ignore[operator]
    return net


def _blank(spec: NetSpec) -> StaticNet:
    """The plain net of a spec in evaluation mode, its tensors without values, to be replaced.

    Making and initialising modules costs several times the copy of the weights, so each unit is made once.
    """
    net = StaticNet(replace(spec, units=()))
    net.spec = spec
    net.units = nn.ModuleList([_maker(unit, spec.bn_eps)() for unit in spec.units])
    net.training = net.units.training = False  # as the units are: going through all of them takes its time
    return net


@lru_cache(maxsize=4096)
def _maker(unit: Unit, bn_eps: float) -> Callable[[], nn.Module]:
    with torch.device("meta"):
        return _copier(StaticNet(NetSpec((unit,), 1, unit.cin, unit.cout, bn_eps)).units[0].eval())


def _copier(module: nn.Module) -> Callable[[], nn.Module]:
    """Makes modules like another and with its tensors, but with their own containers, children and hooks."""
    held = module.__dict__
    fresh = [(name, value.copy if value else type(value)) for name, value in held.items() if type(value) in COPIED]
    children = [(name, None if child is None else _copier(child)) for name, child in module._modules.items()]
    kind, attributes = type(module), dict(held)

    def make() -> nn.Module:
        twin, own = object.__new__(kind), attributes.copy()
        for name, container in fresh:
            own[name] = container()
        for name, child in children:
            own["_modules"][name] = child and child()
        object.__setattr__(twin, "__dict__", own)  # faster than to update the one it has
        return twin

    return make


@torch.no_grad()
def recalibrate(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the batch-norm statistics of `net` to their mean over `batches` (N, C, H, W), in place, in one pass.

    Raises UserError where there is no batch, which leaves them as they were.
    """
    given = iter(batches)
    first = next(given, None)
    if first is None:
        raise UserError("recalibration got no images; give at least one batch")
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average instead of an exponential one
        with evaluating(net, training=True):
            run = calibrating(net) if isinstance(net, StaticNet) else net
            for batch in chain([first], given):
                run(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
