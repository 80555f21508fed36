"""The plain network that ships, built from a NetSpec.  N images, C channels, H, W pixels, K classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from ofa.blocks import BLOCKS, plain
from ofa.modules import initialise, set_bn_eps
from ofa.space import Arch, Space
from ofa.spec import NetSpec, Unit
from ofa.units import space_spec


def _unit(unit: Unit) -> nn.Module:
    return plain(unit) if unit.kind in BLOCKS else FIXED_UNITS[unit.kind](unit)


FIXED_UNITS: dict[str, Callable[[Unit], nn.Module]] = {
    "maxpool": lambda unit: nn.MaxPool2d(unit.kernel, unit.stride, unit.kernel // 2),
    "pool": lambda unit: nn.AdaptiveAvgPool2d(1),
    "linear": lambda unit: nn.Linear(unit.cin, unit.cout),
}


class StaticNet(nn.Module):
    """The network of a NetSpec: images (N, C, H, W) to logits (N, K)."""

    def __init__(self, spec: NetSpec):
        super().__init__()
        self.spec = spec
        self.units = nn.ModuleList([_unit(unit) for unit in spec.units])
        set_bn_eps(self, spec.bn_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, K)."""
        for unit in self.units:
            x = unit(x.flatten(1) if isinstance(unit, nn.Linear) else x)
        return x


def build_spec(spec: NetSpec) -> StaticNet:
    """A freshly initialised network of a spec, channels last."""
    from torch import channels_last

    net = StaticNet(spec)
    initialise(net)
    return net.to(memory_format=channels_last)


def with_classes(net: StaticNet, classes: int) -> StaticNet:
    """A network with the weights of `net` but for its classifier, which is fresh and of so many classes."""
    spec, last = net.spec, net.spec.units[-1]
    units = (*spec.units[:-1], replace(last, cout=classes))
    made = build_spec(replace(spec, units=units, classes=classes))
    own = f"units.{len(units) - 1}."
    made.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith(own)}, strict=False)
    return made.train(net.training)


def build(space: Space, arch: Arch) -> StaticNet:
    """A freshly initialised plain network of an architecture; raises UserError where it is not in the space."""
    return build_spec(space_spec(space, arch))
