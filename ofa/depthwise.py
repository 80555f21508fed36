"""Depthwise convolution on a compiled kernel, where one can be had and does the work; else PyTorch's own.

N images, C channels, H x W pixels, K kernel size.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
