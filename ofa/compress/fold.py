"""Batch norm taken into the convolution in front of it and given back, and who feeds whom in a network."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ofa.compress.layers import put
from ofa.errors import UserError
from ofa.static import StaticNet, build_spec

GRIDS = {"input_grid", "weight_scale"}  # what quantization puts beside a layer's own


def fold_batch_norms(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode that computes the same: each batch norm behind a convolution is an Identity.

    Raises UserError for a network that torch.fx cannot trace.
    """
    net = copy.deepcopy(net).eval()
    for (first, behind), (conv, norm) in normed(trace(net), net).items():
        put(net, first, fuse_conv_bn_eval(conv, norm))
        put(net, behind, nn.Identity())
    return net


@torch.no_grad()
def unfolded(net: nn.Module) -> StaticNet | None:
    """What the spec of `net` builds, in evaluation mode, computing what `net` does without its activation grids.

    A batch norm that a convolution has taken in comes back as its shift.  None for a network that is no StaticNet, or
    has other layers than its spec says.
    """
    if not isinstance(net, StaticNet):
        return None
    made, found = build_spec(net.spec).eval(), dict(net.named_modules())
    taken = {norm: conv for conv, norm in normed(trace(made), made) if type(found.get(norm)) is nn.Identity}
    held = {name: tensor for name, tensor in net.state_dict().items() if GRIDS.isdisjoint(name.split("."))}
    for norm, conv in taken.items():
        batch_norm: nn.BatchNorm2d = made.get_submodule(norm)  # type: ignore[assignment]
        batch_norm.running_var.fill_(1 - batch_norm.eps)  # type: ignore[union-attr]
        if f"{conv}.bias" in held:
            held[f"{norm}.bias"] = held.pop(f"{conv}.bias")
    own = made.state_dict()
    tensors = {name: tensor for name, tensor in own.items() if name.rpartition(".")[0] in taken} | held
    kinds = {name: type(m) for name, m in made.named_modules() if name not in taken}
    others = {name: type(m) for name, m in found.items() if name not in taken and GRIDS.isdisjoint(name.split("."))}
    if kinds != others or {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in own.items()}:
        return None
    made.load_state_dict(tensors)
    return made


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
