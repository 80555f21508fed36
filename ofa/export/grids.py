"""A quantized network's layers as ONNX Runtime's integer kernels take them: whole numbers between Q and DQ nodes (QDQ).

C output channels of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ofa.compress.affine import ActivationGrid, per_channel

if TYPE_CHECKING:
    from ofa.export.graph import Writer

LARGEST = 2**31 - 1  # of a bias
FINE = 2**20  # what a bias that stands alone is as a whole number


class Whole(NamedTuple):
    """Whole numbers (C, ...) that stand for scale x (values - zero); scale and zero: (C,), or () for all channels."""

    values: Tensor
    scale: Tensor
    zero: Tensor


def grid_operands(w: Writer, name: str, m: nn.Conv2d | nn.Linear, x: str) -> list[str]:
    """What a layer reads, its weight and its bias as the whole numbers that they are; float where they are none."""
    read, weight = m._modules.get("input_grid"), whole_numbers(m)
    read = read if isinstance(read, ActivationGrid) else None
    if weight is not None and read is not None and m.bias is not None:
        weight = _finer(weight, m.bias.detach() / read.scale)
    entries = [x if read is None else _on_grid(w, f"{name}.input", read, x)]
    entries.append(w.weight(f"{name}.weight", m.weight) if weight is None else _constant(w, f"{name}.weight", weight))
    if m.bias is None:
        return entries
    if weight is None or read is None:
        return [*entries, w.weight(f"{name}.bias", m.bias)]
    return [*entries, _constant(w, f"{name}.bias", _bias(m.bias.detach(), weight.scale * read.scale))]


def whole_numbers(m: nn.Conv2d | nn.Linear) -> Whole | None:
    """Those that a layer's weight consists of, by the grid beside it; None for a weight that is on no grid."""
    scale, zero, limits = (getattr(m, f"weight_{key}", None) for key in ("scale", "zero", "limits"))
    if scale is None or zero is None or limits is None:
        return None
    weight, steps, middle = m.weight.detach(), per_channel(scale, m.weight), per_channel(zero, m.weight)
    values = (weight / steps).round() + middle
    kept = torch.allclose((values - middle) * steps, weight, rtol=1e-5, atol=0)
    if not kept or values.min() < limits[0] or values.max() > limits[1]:  # another step changed it since
        return None
    kind, shape = (torch.int8 if limits[0] < 0 else torch.uint8), scale.shape if scale.numel() > 1 else ()
    return Whole(values.to(kind), scale.detach().view(shape), zero.expand_as(scale).view(shape).to(kind))


def _finer(weight: Whole, bias: Tensor) -> Whole:
    """The same with a small scale where a channel has no weights, whose scale says nothing but how fine its bias is.

    bias: (C,), over the input's scale.
    """
    if not weight.scale.ndim:
        return weight
    empty = (weight.values == per_channel(weight.zero, weight.values)).flatten(1).all(1)
    return weight._replace(scale=torch.where(empty & (bias != 0), bias.abs() / FINE, weight.scale))


def _bias(bias: Tensor, steps: Tensor) -> Whole:
    """32-bit numbers in the steps, (C,) or (), that sums of products come in."""
    values = (bias.double() / steps).round().clamp(-LARGEST, LARGEST).int()
    return Whole(values, steps, torch.zeros_like(steps, dtype=torch.int32))


def _constant(w: Writer, name: str, whole: Whole) -> str:
    inputs = [w.weight(f"{name}.{key}", value) for key, value in whole._asdict().items()]
    return w.emit("DequantizeLinear", name, *inputs, **({"axis": 0} if whole.scale.ndim else {}))


def _on_grid(w: Writer, name: str, read: ActivationGrid, x: str) -> str:
    """A map rounded to a grid of at most 8 bits."""
    kind = torch.int8 if read.least < 0 else torch.uint8
    scale, zero, limits = read.scale.reshape(()), read.zero.reshape(()), torch.iinfo(kind)
    if (read.least, read.most) != (limits.min, limits.max):  # the grid ends before the type does
        ends = [w.weight(f"{name}.{q}", (q - zero) * scale) for q in (read.least, read.most)]
        x = w.emit("Clip", f"{name}.clip", x, *ends)
    grid = [w.weight(f"{name}.scale", scale), w.weight(f"{name}.zero", zero.to(kind))]
    return w.emit("DequantizeLinear", name, w.emit("QuantizeLinear", f"{name}.q", x, *grid), *grid)
