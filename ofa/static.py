"""The plain network that ships, built from a NetSpec.  N images, C channels, H, W pixels, K classes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ofa.space import Arch, Space
from ofa.spec import NetSpec, Unit
from ofa.units import space_spec


def activation(name: str) -> nn.Module:
    """The module of an activation's name."""
    return {
        "none": nn.Identity,
        "relu": nn.ReLU,
        "relu6": nn.ReLU6,
        "h_swish": nn.Hardswish,
    }[name]()


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, activation."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, *, act: str, groups: int = 1, bn: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout) if bn else nn.Identity()
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) to (N, cout, H / stride, W / stride)."""
        return self.act(self.bn(self.conv(x)))


class ResidualConv(ConvBN):
    """Convolution, batch norm, activation, plus the input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        return x + super().forward(x)


class SqueezeExcite(nn.Module):
    """Channel gate: pool, reduce, ReLU, expand, hard sigmoid (Hu et al. 2018; Howard et al. 2019)."""

    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same, each channel scaled."""
        return x * self.gate(self.expand(self.relu(self.reduce(self.pool(x)))))


class MBConv(nn.Module):
    """Inverted residual: [expand 1x1] - depthwise - [squeeze-excite] - project 1x1 [+ input] (Sandler et al. 2018)."""

    def __init__(self, unit: Unit):
        super().__init__()
        self.expand = ConvBN(unit.cin, unit.mid, 1, 1, act=unit.act) if unit.expand else None
        self.depthwise = ConvBN(unit.mid, unit.mid, unit.kernel, unit.stride, act=unit.act, groups=unit.mid)
        self.se = SqueezeExcite(unit.mid, unit.se) if unit.se else None
        self.project = ConvBN(unit.mid, unit.cout, 1, 1, act="none")
        self.shortcut = unit.shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) to (N, cout, H / stride, W / stride)."""
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        y = y if self.se is None else self.se(y)
        y = self.project(y)
        return x + y if self.shortcut else y


class Bottleneck(nn.Module):
    """1x1 - kernel - 1x1, plus the input, pooled and projected where the shape changes (He et al. 2016, 2019: D)."""

    def __init__(self, unit: Unit):
        super().__init__()
        self.conv1 = ConvBN(unit.cin, unit.mid, 1, 1, act=unit.act)
        self.conv2 = ConvBN(unit.mid, unit.mid, unit.kernel, unit.stride, act=unit.act)
        self.conv3 = ConvBN(unit.mid, unit.cout, 1, 1, act="none")
        self.pool = nn.AvgPool2d(unit.stride, ceil_mode=True) if unit.stride > 1 else None
        self.downsample = None if unit.shortcut else ConvBN(unit.cin, unit.cout, 1, 1, act="none")
        self.act = activation(unit.act)

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) to (N, cout, H / stride, W / stride)."""
        y = self.conv3(self.conv2(self.conv1(x)))
        if self.downsample is not None:
            x = self.downsample(x if self.pool is None else self.pool(x))
        return self.act(y + x)


def _conv(unit: Unit) -> nn.Module:
    kind = ResidualConv if unit.shortcut else ConvBN
    return kind(unit.cin, unit.cout, unit.kernel, unit.stride, act=unit.act, bn=unit.bn)


UNITS: dict[str, Callable[[Unit], nn.Module]] = {
    "conv": _conv,
    "mbconv": MBConv,
    "bottleneck": Bottleneck,
    "maxpool": lambda unit: max_pool(unit),
    "pool": lambda unit: nn.AdaptiveAvgPool2d(1),
    "linear": lambda unit: nn.Linear(unit.cin, unit.cout),
}


def max_pool(unit: Unit) -> nn.MaxPool2d:
    """Max pooling of a unit's kernel and stride."""
    return nn.MaxPool2d(unit.kernel, unit.stride, unit.kernel // 2)


def set_bn_eps(net: nn.Module, eps: float) -> None:
    """Set what every batch norm adds to the variance, in place."""
    for module in net.modules():
        if hasattr(module, "running_var"):
            module.eps = eps  # type: ignore[assignment]


class StaticNet(nn.Module):
    """The network of a NetSpec: images (N, C, H, W) to logits (N, K)."""

    def __init__(self, spec: NetSpec):
        super().__init__()
        self.spec = spec
        self.units = nn.ModuleList([UNITS[unit.kind](unit) for unit in spec.units])
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


def build(space: Space, arch: Arch) -> StaticNet:
    """A freshly initialised plain network of an architecture; raises UserError where it is not in the space."""
    return build_spec(space_spec(space, arch))


def initialise(net: nn.Module) -> None:
    """He initialisation by fan-out for convolutions, unit batch norm, small linear weights, in place."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
