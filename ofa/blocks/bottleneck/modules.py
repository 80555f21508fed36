"""The bottleneck's modules.  N images, C channels, H x W pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from ofa.drop import joined
from ofa.layers import ElasticConv, copy_parts, importance, permute, permute_norm
from ofa.modules import ConvBN, activation
from ofa.spec import Unit


class Plain(nn.Module):
    """1x1 - kernel - 1x1, plus the input, pooled and projected where the shape changes."""

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


class Elastic(nn.Module):
    """The same with elastic width and expand ratio."""

    def __init__(self, unit: Unit, kernels: tuple[int, ...]):
        super().__init__()
        conv = replace(unit, kind="conv", kernel=1, stride=1, act="none")
        self.conv1 = ElasticConv(replace(conv, cout=unit.mid, act=unit.act))
        self.conv2 = ElasticConv(replace(unit, kind="conv", cin=unit.mid, cout=unit.mid))
        self.conv3 = ElasticConv(replace(conv, cin=unit.mid))
        self.pool = nn.AvgPool2d(unit.stride, ceil_mode=True) if unit.stride > 1 else None
        self.downsample = None if unit.shortcut else ElasticConv(conv)
        self.act = activation(unit.act)

    def forward(self, x: Tensor, unit: Unit, kept: Tensor | None = None) -> Tensor:
        """(N, unit.cin, H, W) to (N, unit.cout, H / stride, W / stride); kept: see `joined`."""
        y = self.conv3(self.conv2(self.conv1(x, unit.mid), unit.mid), unit.cout)
        if self.downsample is not None:
            x = self.downsample(x if self.pool is None else self.pool(x), unit.cout)
        return self.act(joined(x, y, kept))

    def copy_to(self, plain: Plain) -> None:
        """Copy the weights that `plain` needs."""
        copy_parts(self, plain)

    def sort_channels(self, mid: Sequence[int] = (), se: Sequence[int] = ()) -> None:
        """Order both middle channels by the weights that read them, in place."""
        for writer, reader in ((self.conv2, self.conv3), (self.conv1, self.conv2)):
            order = importance(reader.conv.weight, mid)
            permute(writer.conv.weight, order, 0)
            permute_norm(writer.bn, order)
            permute(reader.conv.weight, order, 1)
