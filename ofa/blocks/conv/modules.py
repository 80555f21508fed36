"""The convolution's modules.  N images, C channels, H x W pixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ofa.drop import joined
from ofa.layers import ElasticConv
from ofa.modules import ConvBN
from ofa.spec import Unit


class Plain(ConvBN):
    """Convolution, batch norm, activation, plus the input where there is a shortcut."""

    def __init__(self, unit: Unit):
        super().__init__(unit.cin, unit.cout, unit.kernel, unit.stride, act=unit.act, bn=unit.bn)
        self.shortcut = unit.shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) to (N, cout, H / stride, W / stride)."""
        y = super().forward(x)
        return x + y if self.shortcut else y


class Elastic(ElasticConv):
    """The same over the first channels in and out."""

    def __init__(self, unit: Unit, kernels: tuple[int, ...]):
        super().__init__(unit)

    def forward(self, x: Tensor, unit: Unit, kept: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(N, unit.cin, H, W) to (N, unit.cout, H / stride, W / stride); kept: see `joined`."""
        y = super().forward(x, unit.cout)
        return joined(x, y, kept) if unit.shortcut else y

    def sort_channels(self, mid: Sequence[int] = (), se: Sequence[int] = ()) -> None:
        """It has no middle channels to sort."""
