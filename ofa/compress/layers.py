"""The layers of any network that hold weights, what each costs, and how one takes another's place.

N images, C channels, R x R pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from ofa.compress.chain import Work
from ofa.errors import UserError
from ofa.modules import evaluating
from ofa.static import StaticNet

Layer = nn.Conv2d | nn.Linear
BYTES = 4  # of a float32 value


@dataclass(frozen=True, slots=True)
class Counts:
    """What zeros leave of a network.

    parameters: all of them.  nonzeros: those that are not zero.  macs: multiply-adds of the convolutions and linear
    layers on one image, which is what runs: neither ONNX Runtime nor LiteRT skips a zero weight, so zeros give no
    speed there, only smaller packed files.  sparse_macs: the multiply-adds whose weight is not zero, which only a
    runtime for sparse weights would be left with.
    """

    parameters: int
    nonzeros: int
    macs: int
    sparse_macs: int


def patterns(keep: str | Iterable[str] | None) -> tuple[str, ...]:
    """Patterns of layers' names; one may stand without a list, None for no pattern."""
    return (keep,) if isinstance(keep, str) else tuple(keep or ())


def weight_layers(net: nn.Module, keep: Collection[str] = ()) -> dict[str, Layer]:
    """Convolutions and linear layers by name, in order, but for those that match a pattern of `keep` ("units.0.*").

    Raises UserError where none is left, and for a pattern that matches no layer.
    """
    layers = {name: module for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    if unused := [pattern for pattern in keep if not any(fnmatch(name, pattern) for name in layers)]:
        raise UserError(f"keep has {unused[0]!r}, which matches no layer; the layers are {', '.join(layers)}")
    left = {name: m for name, m in layers.items() if not any(fnmatch(name, pattern) for pattern in keep)}
    if not left:
        kinds = sorted({type(m).__name__ for m in net.modules() if next(m.parameters(False), None) is not None})
        found = ", ".join(kinds) or "none at all"
        raise UserError(f"no convolution or linear layer is left to compress, only {found}; keep fewer layers")
    return left


def image_of(net: nn.Module, work: Work) -> Tensor:
    """A blank image of the work's size on the network's device, (1, C, R, R)."""
    return torch.zeros(1, work.data.channels, work.resolution, work.resolution, device=device_of(net))


def device_of(net: nn.Module) -> torch.device:
    """Where the network's parameters are."""
    return next(net.parameters()).device


@torch.no_grad()
def observe(net: nn.Module, image: Tensor, see: Callable[[str, Tensor, Tensor], None]) -> None:
    """Run one image (1, C, R, R) in evaluation mode; `see` gets each layer's name, input and output as it runs."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: see(name, inputs[0], output)

    handles = [layer.register_forward_hook(watch(name)) for name, layer in weight_layers(net).items()]
    try:
        with evaluating(net):
            net(image)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def outputs(net: nn.Module, names: Collection[str]) -> Iterator[list[tuple[str, Tensor]]]:
    """A list that gets name and output of each of these modules as it runs, for its gradient; the caller clears it."""
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str, y: Tensor) -> Tensor:
        seen.append((name, y))
        return y.clone()  # which an activation may overwrite

    handles = [
        net.get_submodule(name).register_forward_hook(lambda m, x, y, name=name: watch(name, y)) for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def positions(net: nn.Module, image: Tensor) -> dict[str, int]:
    """How often each layer applies each of its weights to one image (1, C, R, R): the pixels of its output."""
    layers = weight_layers(net)
    found = dict.fromkeys(layers, 0)

    def see(name: str, x: Tensor, y: Tensor) -> None:
        found[name] += y.numel() // len(layers[name].weight)

    observe(net, image, see)
    return found


def layer_macs(net: nn.Module, image: Tensor) -> dict[str, int]:
    """Multiply-adds of each layer on one image (1, C, R, R)."""
    layers = weight_layers(net)
    return {name: n * layers[name].weight.numel() for name, n in positions(net, image).items()}


def count(net: nn.Module, image: Tensor) -> Counts:
    """What the zeros of a network's weights leave of it, for one image (1, C, R, R)."""
    layers, times = weight_layers(net), positions(net, image)
    tensors = list(net.parameters())
    return Counts(
        sum(t.numel() for t in tensors),
        sum(int(t.count_nonzero()) for t in tensors),
        sum(times[name] * layer.weight.numel() for name, layer in layers.items()),
        sum(times[name] * int(layer.weight.count_nonzero()) for name, layer in layers.items()),
    )


class Altered(nn.Module):
    """A StaticNet with other layers than its spec says: the same units by the same names, and no spec."""

    def __init__(self, units: nn.ModuleList):
        super().__init__()
        self.units = units

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, R, R) to logits (N, K)."""
        for unit in self.units:
            first = unit[0] if isinstance(unit, nn.Sequential) else unit  # a linear layer may be a chain of them
            x = unit(x.flatten(1) if isinstance(first, nn.Linear) else x)
        return x


def opened(net: nn.Module) -> nn.Module:
    """A copy whose layers may be replaced by others; layers keep their names."""
    twin = copy.deepcopy(net)
    return Altered(twin.units).train(net.training) if isinstance(twin, StaticNet) else twin


def put(net: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the layer of that name, in place, wherever the network has it."""
    old = net.get_submodule(name)
    for parent in list(net.modules()):
        for last in [last for last, child in parent._modules.items() if child is old]:
            setattr(parent, last, module)


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
