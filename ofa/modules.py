"""What plain and elastic networks share: activations, convolution with batch norm, squeeze-excite.

N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


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


@contextmanager
def evaluating(*nets: nn.Module, training: bool = False) -> Iterator[None]:
    """Networks in evaluation mode inside the with block, each of their modules in its own mode again after it.

    training: in training mode instead.
    """
    modes = {module: module.training for net in nets for module in net.modules()}
    try:
        for net in nets:
            net.train(training)
        yield
    finally:
        for net in nets:
            net.train(modes[net])  # which does more in some
        for module, mode in modes.items():
            module.training = mode


def set_bn_eps(net: nn.Module, eps: float) -> None:
    """Set what every batch norm adds to the variance, in place."""
    for module in net.modules():
        if hasattr(module, "running_var"):
            module.eps = eps  # type: ignore[assignment]


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
