"""Convolution whose weights learn by a compiled kernel, where a processor with AMX multiplies bfloat16.

oneDNN's gradient of these weights takes two to four times as long on maps of 8 x 8 pixels and less.
N images, C channels in, D out, H x W pixels, K kernel size.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ofa.kernels import is_half, library, plain, threads
from ofa.processor import flags

WIDE = 64  # channels on both sides from which on the kernel is the faster one


@cache
def _kernel() -> Any:
    found = library("dense") if "amx_bf16" in flags() else None
    if found is None:
        return None
    found.dense.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_long] * 6, ctypes.c_int]
    return found.dense


def usable(x: Tensor, weight: Tensor, d: int) -> bool:
    """Whether the kernel takes (N, C, H, W) and d filters of K x K taps, at stride 1, and gains by it."""
    return (
        weight.shape[-1] in (3, 5, 7)
        and min(x.shape[1], d) >= WIDE
        and threads() >= torch.get_num_threads()
        and plain(x, weight)
        and is_half(x)
        and _kernel() is not None
    )


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """(N, C, H, W) of bfloat16 convolved with (D, C, K, K) of float32, padded by K // 2: (N, D, H, W) of bfloat16."""
    return _Dense.apply(x, weight)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        used = weight.to(x.dtype)
        ctx.save_for_backward(x, weight, used)
        return F.conv2d(x, used, None, 1, weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, used = ctx.saved_tensors
        x_needed, weight_needed = ctx.needs_input_grad
        (n, c, h, w), (d, _, k, _) = x.shape, weight.shape
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for
            used, by_kernel = weight.to(x.dtype), False
        else:
            gy, by_kernel = gy.contiguous(memory_format=torch.channels_last), weight_needed
        gw = torch.empty(d, k, k, c) if by_kernel else None
        if gw is not None and _kernel()(x.data_ptr(), gy.data_ptr(), gw.data_ptr(), n, h, w, c, d, k, threads()):
            gw = None  # no memory for its buffers, or no leave to use AMX
        needed = [x_needed, weight_needed and gw is None, False]
        geometry = [1, 1], [k // 2] * 2, [1, 1], False, [0, 0], 1
        gx, stock, _ = torch.ops.aten.convolution_backward(gy, x, used, None, *geometry, needed)
        return gx, gw.permute(0, 3, 1, 2) if gw is not None else stock.to(weight.dtype) if needed[1] else None
