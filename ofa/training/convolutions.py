"""Any network's convolutions on what is fast for training on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ofa.depthwise import depthwise
from ofa.layers import convolve


class _Depthwise(nn.Conv2d):
    """A depthwise convolution on the compiled kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H / stride, W / stride)."""
        return depthwise(x, self.weight, self.stride[0])


class _Dense(nn.Conv2d):
    """A convolution of all channels that is a product on small maps."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) to (N, cout, H / stride, W / stride)."""
        return convolve(x, self.weight, self.bias, stride=self.stride[0])


@contextmanager
def fast_convolutions(net: nn.Module) -> Iterator[None]:
    """Let the convolutions of any network run on compiled kernels and products, in place, until the block is left."""
    layers = {module: kind for module in net.modules() if type(module) is nn.Conv2d and (kind := _kind(module))}
    for layer, kind in layers.items():
        layer.__class__ = kind
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Conv2d


def _kind(conv: nn.Conv2d) -> type[nn.Conv2d] | None:
    """What it can run as; None where it is padded, strided or changed in a way that neither knows."""
    (k, k_wide), (stride, stride_wide) = conv.kernel_size, conv.stride
    alike = k == k_wide and stride == stride_wide and conv.padding == (k // 2, k // 2) and conv.dilation == (1, 1)
    if not alike or conv.padding_mode != "zeros" or "forward" in vars(conv):
        return None
    if conv.groups == 1:
        return _Dense
    whole = conv.groups == conv.in_channels == conv.out_channels
    return _Depthwise if whole and conv.bias is None else None
