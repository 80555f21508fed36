"""The inverted residual's modules.  N images, C channels, H x W pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from ofa.drop import joined
from ofa.layers import ElasticConv, ElasticDepthwise, ElasticSE, copy_parts, importance, permute, permute_norm, reach
from ofa.modules import ConvBN, SqueezeExcite
from ofa.shrink import Smaller
from ofa.spec import Unit


class Plain(nn.Module):
    """[expand 1x1] - depthwise - [squeeze-excite] - project 1x1 [+ input]."""

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


class Elastic(nn.Module):
    """The same with elastic width, expand ratio and kernel."""

    def __init__(self, unit: Unit, kernels: tuple[int, ...]):
        super().__init__()
        first = replace(unit, kind="conv", cout=unit.mid, kernel=1, stride=1)
        last = replace(unit, kind="conv", cin=unit.mid, kernel=1, stride=1, act="none")
        self.expand = ElasticConv(first) if unit.expand else None
        self.depthwise = ElasticDepthwise(unit, kernels)
        self.se = ElasticSE(unit) if unit.se else None
        self.project = ElasticConv(last)

    def smaller(self, unit: Unit, side: int) -> Smaller:
        """What `shrink` makes the depthwise weights from, for images of `side` pixels."""
        return self.depthwise.smaller(unit.mid, unit.kernel, reach(unit.kernel, side, unit.stride))

    def forward(self, x: Tensor, unit: Unit, kept: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """(N, unit.cin, H, W) to (N, unit.cout, H / stride, W / stride); kept: see `joined`; weight: of `smaller`."""
        y = x if self.expand is None else self.expand(x, unit.mid)
        y = self.depthwise(y, unit.kernel, weight)
        y = y if self.se is None else self.se(y, unit.se)
        y = self.project(y, unit.cout)
        return joined(x, y, kept) if unit.shortcut else y

    def copy_to(self, plain: Plain) -> None:
        """Copy the weights that `plain` needs."""
        copy_parts(self, plain)

    def sort_channels(self, mid: Sequence[int] = (), se: Sequence[int] = ()) -> None:
        """Order the middle and the squeezed channels by the weights that read them, in place."""
        if self.expand is None:
            return
        order = importance(self.project.conv.weight, mid)
        permute(self.expand.conv.weight, order, 0)
        permute_norm(self.expand.bn, order)
        permute(self.depthwise.weight, order, 0)
        permute_norm(self.depthwise.bn, order)
        permute(self.project.conv.weight, order, 1)
        if self.se is not None:
            assert self.se.expand.bias is not None and self.se.reduce.bias is not None
            permute(self.se.reduce.weight, order, 1)
            permute(self.se.expand.weight, order, 0)
            permute(self.se.expand.bias, order, 0)
            inner = importance(self.se.expand.weight, se)
            permute(self.se.reduce.weight, inner, 0)
            permute(self.se.reduce.bias, inner, 0)
            permute(self.se.expand.weight, inner, 1)
