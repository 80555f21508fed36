"""Numbers on a grid of 2^bits steps: scale x (q - zero), q a whole number (Jacob et al. 2018, sec. 2.1).

C channels.  Gradients pass rounding as if it were not there (Bengio et al. 2013) and stop where values are clipped;
the gradient of the scale is then that of learned step size quantization (Esser et al. 2020, eq. 3).
"""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class Grid(NamedTuple):
    """A grid: scale and zero are tensors that broadcast against the values, least and most bound q."""

    scale: Tensor
    zero: Tensor
    least: int
    most: int


def grid(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """The grid that covers values from `low` to `high` (any shape, elementwise), 0 among them exactly.

    Symmetric: q from -(2^(bits-1) - 1) to 2^(bits-1) - 1, zero 0; else q from 0 to 2^bits - 1.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    if symmetric:
        most = 2 ** (bits - 1) - 1
        scale = torch.maximum(-low, high) / most
        return Grid(_positive(scale), torch.zeros_like(scale), -most, most)
    most = 2**bits - 1
    scale = _positive((high - low) / most)
    return Grid(scale, (-low / scale).round(), 0, most)


def on_grid(x: Tensor, g: Grid) -> Tensor:
    """Values of any shape moved to the nearest of the grid."""
    return ((round_through(x / g.scale) + g.zero).clamp(g.least, g.most) - g.zero) * g.scale + 0.0


def round_through(x: Tensor) -> Tensor:
    """The nearest whole number, of which the gradient is 1; exact, since x and its rounding differ without rounding."""
    return x + (x.round() - x).detach()


def straight(x: Tensor, levels: Tensor) -> Tensor:
    """The levels, exactly, with the gradient of `x`; both of one shape."""
    found: Tensor = _Straight.apply(x, levels)
    return found


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor) -> Tensor:
        return levels.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def per_channel(values: Tensor, weight: Tensor) -> Tensor:
    """Values (C,) or (1,) shaped to broadcast against a weight (C, ...)."""
    return values.view(-1, *[1] * (weight.ndim - 1))


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))


class ActivationGrid(nn.Module):
    """Moves a tensor to the grid of its range; `attach` puts it in front of a layer."""

    def __init__(self, low: float, high: float, bits: int, *, symmetric: bool) -> None:
        super().__init__()
        self._set(grid(torch.tensor(low), torch.tensor(high), bits, symmetric=symmetric), bits)

    @classmethod
    def of(cls, g: Grid, bits: int) -> Self:
        """The module of a grid that is known already; its scale and zero are single numbers."""
        made = cls(0.0, 1.0, bits, symmetric=False)
        made._set(g, bits)
        return made

    def _set(self, g: Grid, bits: int) -> None:
        self.bits, self.least, self.most = bits, g.least, g.most
        self.register_buffer("scale", g.scale)
        self.register_buffer("zero", g.zero)
        self.scale: Tensor
        self.zero: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """A tensor of any shape to the same on the grid."""
        scale = step(self.scale, x.numel() // len(x), self.most) if self.scale.requires_grad else self.scale
        return on_grid(x, Grid(scale, self.zero, self.least, self.most))


def step(scale: Tensor, count: int, most: int) -> Tensor:
    """A learned scale, positive, whose gradient is divided by sqrt(count x most) (Esser et al. 2020, sec. 2.2)."""
    scale = scale.abs().clamp_min(1e-9)
    share = (count * most) ** -0.5
    return (scale - scale * share).detach() + scale * share


def attach(layer: nn.Module, quantizer: ActivationGrid) -> None:
    """Quantize what a layer reads, in place; deepcopy and state_dict know of it."""
    layer.add_module("input_grid", quantizer)
    layer.register_forward_pre_hook(_quantize_input)


def without_grids(net: nn.Module) -> nn.Module:
    """A copy whose layers read their inputs as they are."""
    plain = copy.deepcopy(net)
    for layer in plain.modules():
        if "input_grid" in layer._modules:
            layer.add_module("input_grid", nn.Identity())
    return plain


def drop_grids(net: nn.Module, made: str) -> nn.Module:
    """A copy without activation grids, warning that what is `made` leaves them out; the network where it has none."""
    grids = sum(isinstance(module, ActivationGrid) for module in net.modules())
    if not grids:
        return net
    logger.warning(
        "%s leaves out the grids of what %d layers read: int8 runtimes calibrate their own; AOTInductor, float "
        "ExecuTorch and float LiteRT keep these",
        made,
        grids,
    )
    return without_grids(net)


def _quantize_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (layer.get_submodule("input_grid")(inputs[0]), *inputs[1:])
