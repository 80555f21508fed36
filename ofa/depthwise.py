"""Depthwise convolution on a compiled kernel, where one can be had and does the work; else PyTorch's own.

N images, C channels, H x W pixels, K kernel size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa.kernels import is_half, library, plain, threads


class What(IntEnum):
    """What the kernel computes: the output, or the gradient of the input or of the weight."""

    Y, GX, GW = range(3)


@cache
def _kernel() -> Any:
    found = library("depthwise")
    if found is None:
        return None
    pointers, sizes = [ctypes.c_void_p] * 4, [ctypes.c_long] * 6
    found.depthwise.argtypes = [ctypes.c_int, ctypes.c_int, *pointers, *sizes, ctypes.c_int]
    return found.depthwise


def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """(N, C, H, W) convolved with (C, 1, K, K), padded by K // 2: (N, C, H / stride, W / stride)."""
    return _Depthwise.apply(x, weight, stride) if _usable(x, weight) else _stock(x, weight, stride)


class _Layer(nn.Conv2d):
    """A depthwise convolution that trains on the compiled kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H / stride, W / stride)."""
        return depthwise(x, self.weight, self.stride[0])


@contextmanager
def compiled_depthwise(net: nn.Module) -> Iterator[None]:
    """Let the depthwise convolutions of any network run on the compiled kernel, in place, until the block is left."""
    layers = [module for module in net.modules() if type(module) is nn.Conv2d and _is_depthwise(module)]
    for layer in layers:
        layer.__class__ = _Layer
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Conv2d


def _is_depthwise(conv: nn.Conv2d) -> bool:
    (k, k_wide), (stride, stride_wide) = conv.kernel_size, conv.stride
    alike = k == k_wide and stride == stride_wide and conv.padding == (k // 2, k // 2) and conv.dilation == (1, 1)
    whole = conv.groups == conv.in_channels == conv.out_channels > 1
    return alike and whole and conv.bias is None and conv.padding_mode == "zeros" and "forward" not in vars(conv)


def _stock(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=x.shape[1])


def _usable(x: Tensor, weight: Tensor) -> bool:
    return plain(x, weight) and weight.shape[-1] in (1, 3, 5, 7) and _kernel() is not None


def _run(what: What, x: Tensor, weight: Tensor, gy: Tensor, stride: int, out: Tensor) -> Tensor:
    (n, c, h, w), k = x.shape, weight.shape[-1]
    pointers = [tensor.data_ptr() for tensor in (x, weight, gy, out)]
    failed = _kernel()(int(what), is_half(x), *pointers, n, h, w, c, k, stride, threads())
    assert not failed, "the kernel had no memory for its buffers"
    return out


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        n, c, h, w = x.shape
        size = (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
        y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        return _run(What.Y, x, weight.contiguous(), y, stride, y)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        stride, (x_needed, weight_needed, _) = ctx.stride, ctx.needs_input_grad
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for
            return *_stock_backward(gy, x, weight, stride, [x_needed, weight_needed, False]), None
        gy, weight = gy.contiguous(memory_format=torch.channels_last), weight.contiguous()
        gx = _run(What.GX, x, weight, gy, stride, torch.empty_like(x)) if x_needed else None
        gw = _run(What.GW, x, weight, gy, stride, torch.empty_like(weight)) if weight_needed else None
        return gx, gw, None


def _stock_backward(
    gy: Tensor, x: Tensor, weight: Tensor, stride: int, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    pad = [weight.shape[-1] // 2] * 2
    gx, gw, _ = torch.ops.aten.convolution_backward(
        gy, x, weight.to(x.dtype), None, [stride] * 2, pad, [1, 1], False, [0, 0], x.shape[1], needed
    )
    return gx, gw if gw is None else gw.to(weight.dtype)
