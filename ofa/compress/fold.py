"""Batch norm taken into the convolution in front of it, and who feeds whom in a network."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ofa.compress.layers import put
from ofa.errors import UserError

SAME = (nn.Identity, nn.Dropout)


def fold_batch_norms(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode that computes the same: each batch norm behind a convolution is an Identity.

    Raises UserError for a network that torch.fx cannot trace.
    """
    net = copy.deepcopy(net).eval()
    for (first, behind), (conv, norm) in normed(trace(net), net).items():
        put(net, first, fuse_conv_bn_eval(conv, norm))
        put(net, behind, nn.Identity())
    return net


def normed(graph: fx.Graph, net: nn.Module) -> dict[tuple[str, str], tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions that a batch norm alone reads, and that norm, by their names; each runs once in the network."""
    modules, found = dict(net.named_modules()), {}
    called = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_var is None:
            continue
        before = node.args[0]
        assert isinstance(before, fx.Node)
        names = str(before.target), str(node.target)
        conv = modules.get(names[0])
        if isinstance(conv, nn.Conv2d) and len(before.users) == called[names[0]] == called[names[1]] == 1:
            found[names] = conv, norm
    return found


def trace(net: nn.Module) -> fx.Graph:
    """What a network computes, as a graph; raises UserError where its forward cannot be followed."""
    try:
        return _Tracer().trace(net)
    except (TypeError, RuntimeError, torch.fx.proxy.TraceError) as error:
        raise UserError(
            f"{type(net).__name__} cannot be traced ({str(error).splitlines()[0]}): forward may not branch on values"
        ) from None


class _Tracer(fx.Tracer):
    """Takes every module without children as one step."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or not m._modules
