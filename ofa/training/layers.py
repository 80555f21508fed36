"""Any network's convolutions and batch norms on what is fast for training on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ofa.depthwise import depthwise
from ofa.inference import NAMES
from ofa.layers import FastLinear, convolve, squeeze_excite
from ofa.modules import ConvBN, SqueezeExcite
from ofa.norm import ACTIVATIONS, batch_norm_act


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


class _Gate(SqueezeExcite):
    """Squeeze-excite with a gradient in fewer passes."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same, each channel scaled."""
        return squeeze_excite(x, self.reduce, self.expand)


class _Norm(nn.BatchNorm2d):
    """Batch norm by the batch alone, and the activation behind it: running statistics stay as they are."""

    act = "none"

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        if self.training:
            return batch_norm_act(x, self.weight, self.bias, self.act, self.eps)
        return ACTIVATIONS[self.act](super().forward(x))


NORMS: dict[str, type[nn.Module]] = {act: type("_Norm", (_Norm,), {"act": act}) for act in ACTIVATIONS}


@contextmanager
def fast_layers(net: nn.Module) -> Iterator[None]:
    """Let the layers of any network run on compiled kernels and products, in place, until the block is left.

    Its batch norms are to be calibrated afterwards.
    """
    layers = {module: (type(module), kind) for module in net.modules() if (kind := _kind(module))}
    for module in net.modules():
        if isinstance(module, ConvBN) and _together(module.bn, module.act) and module.bn in layers:
            layers[module.bn] = nn.BatchNorm2d, NORMS[NAMES[type(module.act)]]
            layers[module.act] = type(module.act), nn.Identity
    for layer, (_, kind) in layers.items():
        layer.__class__ = kind
    try:
        yield
    finally:
        for layer, (own, _) in layers.items():
            layer.__class__ = own


def _together(bn: nn.Module, act: nn.Module) -> bool:
    """Whether an activation can be part of the batch norm in front of it: nobody looks between them."""
    hooks = bn._forward_hooks, bn._backward_hooks, bn._backward_pre_hooks, act._forward_pre_hooks, act._backward_hooks
    return type(act) in NAMES and "forward" not in vars(act) and not any(hooks)


def _as_built(gate: SqueezeExcite) -> bool:
    """Whether nobody has changed a part of a gate, or looks at one."""
    kinds = nn.AdaptiveAvgPool2d, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Hardsigmoid
    return len(kinds) == len(parts := list(gate.children())) and all(
        type(part) is kind
        and "forward" not in vars(part)
        and not (part._forward_pre_hooks or part._forward_hooks or part._backward_pre_hooks or part._backward_hooks)
        for part, kind in zip(parts, kinds, strict=True)
    )


def _kind(layer: nn.Module) -> type[nn.Module] | None:
    """What a layer can run as; None where it is of another kind, or changed in a way that none knows."""
    if "forward" in vars(layer):
        return None
    if type(layer) is nn.BatchNorm2d:
        return _Norm if layer.affine and layer.track_running_stats else None
    if type(layer) is nn.Linear:
        return FastLinear
    if type(layer) is SqueezeExcite:
        return _Gate if _as_built(layer) else None
    if type(layer) is not nn.Conv2d:
        return None
    (k, k_wide), (stride, stride_wide) = layer.kernel_size, layer.stride
    alike = (
        k == k_wide
        and k % 2
        and stride == stride_wide
        and layer.padding == (k // 2, k // 2)
        and layer.dilation == (1, 1)
    )
    if not alike or layer.padding_mode != "zeros":
        return None
    if layer.groups == 1:
        return _Dense
    whole = layer.groups == layer.in_channels == layer.out_channels
    return _Depthwise if whole and layer.bias is None else None
