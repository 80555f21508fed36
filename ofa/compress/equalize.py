"""Cross-layer equalization: channels of two layers scaled against each other until both use their ranges alike.

Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", sec. 4.1.  C channels
between two layers.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ofa.compress.affine import without_grids
from ofa.compress.chain import Work
from ofa.compress.fold import fold_batch_norms, trace
from ofa.compress.layers import Layer, listed, put, weight_layers
from ofa.errors import UserError

POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
PASSED = (nn.Identity, nn.Dropout, nn.ReLU, *POOLS)  # f(s x) = s f(x) for s > 0
RELU6 = ("cap", "relu")
CLOSE = 1e-3  # a factor this near 1 changes nothing any more
logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """Two layers of which the second alone reads the first, and the ReLU6 and caps between them, by name."""

    first: str
    second: str
    relu6: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Equalization:
    """Fold batch norm, then equalize every pair of layers joined by ReLU, ReLU6, pools or nothing.

    What is joined by another function (h-swish), a sum or a gate is left as it is, and named in the log.  rounds: over
    all pairs, at most.  relu6: "cap" clips each channel at its own scaled 6, which computes the same, but int8 runtimes
    clamp whole tensors, so that there the pair is as before (`uncapped`); "relu" clips at nothing, as in the paper's
    sec. 5.1, which changes the network a little, but every runtime has it.
    """

    rounds: int = 50
    relu6: str = "cap"

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.relu6 not in RELU6:
            raise UserError(
                f"rounds {self.rounds}, relu6 {self.relu6!r}: give at least 1 round, and one of {', '.join(RELU6)}"
            )

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A network that computes the same with weights that are easier to quantize, batch norm folded."""
        return equalize(net, self)


def equalize(net: nn.Module, settings: Equalization) -> nn.Module:
    """The same without data; raises UserError where there is no pair to equalize."""
    net = fold_batch_norms(net)
    pairs, skipped = find_pairs(net)
    if not pairs:
        raise UserError(f"no two layers can be equalized: {listed(skipped)}; leave this step out")
    if skipped:
        logger.info("%d pairs are equalized, %d are not: %s", len(pairs), len(skipped), listed(skipped))
    layers, factors = weight_layers(net), dict[Pair, Tensor]()
    for _ in range(settings.rounds):
        done = [_equalize(layers[pair.first], layers[pair.second]) for pair in pairs]
        factors = {pair: factors.get(pair, 1) * s for pair, s in zip(pairs, done, strict=True)}
        if all(bool(((s - 1).abs() < CLOSE).all()) for s in done):
            break
    for pair, factor in factors.items():
        factor = factor.view(-1, *[1] * (layers[pair.first].weight.ndim - 2))
        for name in pair.relu6:
            caps = getattr(net.get_submodule(name), "caps", 6) / factor
            put(net, name, ChannelCap(caps) if settings.relu6 == "cap" else nn.ReLU())
    return net.eval()


def uncapped(net: nn.Module) -> nn.Module:
    """A network that computes the same with ReLU6 for each `ChannelCap`, since integer runtimes clamp whole tensors.

    The layers around a cap take its factors back.  Returns: a copy without activation grids, which suit the channels
    as they were; the network itself where it has no caps.
    """
    if not any(isinstance(module, ChannelCap) for module in net.modules()):
        return net
    net = without_grids(net)
    layers = weight_layers(net)
    for pair in find_pairs(net)[0]:
        caps = [module.caps for name in pair.relu6 if isinstance(module := net.get_submodule(name), ChannelCap)]
        if caps:  # several in a row have the same
            _rescale(layers[pair.first], layers[pair.second], caps[0].flatten() / 6)
            for name in pair.relu6:
                put(net, name, nn.ReLU6())
    if left := [name for name, module in net.named_modules() if isinstance(module, ChannelCap)]:
        raise UserError(
            f"{left[0]} clips each channel at a cap of its own, which no int8 runtime does, and no two layers around "
            "it can take the caps back; set step.equalize.relu6=relu"
        )
    return net


def find_pairs(net: nn.Module) -> tuple[list[Pair], list[str]]:
    """The pairs that can be equalized, in order, and why each other layer cannot be paired with what reads it."""
    modules, pairs, skipped, nodes = dict(net.named_modules()), [], [], list(trace(net).nodes)
    runs = Counter(modules[str(node.target)] for node in nodes if node.op == "call_module")
    for node in nodes:
        layer = _layer(node, modules)
        if layer is None:
            continue
        relu6: list[str] = []
        after, reason = _follow(node, len(layer.weight), modules, relu6)
        changed = [] if after is None else [modules[str(name)] for name in (node.target, after.target, *relu6)]
        if after is None or any(runs[module] > 1 for module in changed):
            skipped.append(f"{node.target} ({reason or 'it, its reader or the ReLU6 between runs more than once'})")
        else:
            pairs.append(Pair(str(node.target), str(after.target), tuple(relu6)))
    return pairs, skipped


def _follow(
    node: fx.Node, channels: int, modules: dict[str, nn.Module], relu6: list[str]
) -> tuple[fx.Node | None, str]:
    """The layer that alone reads what `node` makes, of so many channels, or why there is none."""
    flat = False
    while True:
        if len(node.users) != 1:
            return None, f"read {len(node.users)} times"
        node = next(iter(node.users))
        layer = _layer(node, modules)
        if layer is not None:
            grouped = isinstance(layer, nn.Conv2d) and layer.groups not in (1, len(layer.weight))
            wide = channels != (layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features)
            return (None, "groups or shape") if grouped or wide else (node, "")
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        flattens = isinstance(module, nn.Flatten) or node.target in ("flatten", torch.flatten)
        flat = flat or flattens
        if isinstance(module, (nn.ReLU6, ChannelCap)) and not flat:
            relu6.append(str(node.target))
        elif not (isinstance(module, PASSED) or flattens):
            return None, "the last layer" if node.op == "output" else (type(module).__name__ if module else node.name)


def _layer(node: fx.Node, modules: dict[str, nn.Module]) -> Layer | None:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, (nn.Conv2d, nn.Linear)) else None


@torch.no_grad()
def _equalize(first: Layer, second: Layer) -> Tensor:
    """Scale two layers in place (eq. 11); returns what the first one's channels were divided by, (C,).

    A channel that one of both does not use stays as it is.
    """
    axis = 0 if isinstance(second, nn.Conv2d) and second.groups > 1 else 1
    r1 = first.weight.flatten(1).abs().amax(1)
    r2 = second.weight.transpose(0, axis).flatten(1).abs().amax(1)
    s = torch.where((r1 > 0) & (r2 > 0), (r1 / r2.clamp_min(1e-30)).sqrt(), torch.ones_like(r1))
    _rescale(first, second, s)
    return s


@torch.no_grad()
def _rescale(first: Layer, second: Layer, s: Tensor) -> None:
    """Divide the channels between two layers by s (C,), in place: what the second makes of them stays the same."""
    axis = 0 if isinstance(second, nn.Conv2d) and second.groups > 1 else 1
    first.weight.div_(s.view(-1, *[1] * (first.weight.ndim - 1)))
    if first.bias is not None:
        first.bias.div_(s)
    second.weight.mul_(s.view([-1 if i == axis else 1 for i in range(second.weight.ndim)]))


class ChannelCap(nn.Module):
    """ReLU6 of scaled channels: each is clipped at a cap of its own, (C, 1, 1) behind a convolution, else (C,)."""

    def __init__(self, caps: Tensor) -> None:
        super().__init__()
        self.register_buffer("caps", caps)
        self.caps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same, from 0 to the caps."""
        return torch.minimum(torch.relu(x), self.caps)
