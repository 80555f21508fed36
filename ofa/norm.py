"""Batch norm by the batch's own statistics with its activation, on a compiled kernel where it can do the work.

N images, C channels, H x W pixels.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ofa.kernels import is_half, library, plain, threads

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6, "h_swish": F.hardswish}
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}  # as norm.c numbers them


@cache
def _kernel() -> Any:
    found = library("norm")
    if found is None:
        return None
    pointers, whole = [ctypes.c_void_p] * 9, ctypes.c_int
    found.norm.argtypes = [whole, whole, whole, *pointers, ctypes.c_long, ctypes.c_long, ctypes.c_float, whole]
    return found.norm


def batch_norm_act(x: Tensor, weight: Tensor, bias: Tensor, act: str, eps: float = 1e-5) -> Tensor:
    """(N, C, H, W) normalised by its own mean and variance (plus `eps`), scaled by `weight`, shifted, activated.

    `weight` and `bias`: (C,) or longer; the rest is not used.
    """
    if usable(x, weight, bias):
        return _BatchNormAct.apply(x, weight, bias, act, eps)
    return stock(x, weight, bias, act, eps)


def usable(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the compiled kernel can do this work."""
    return plain(x, weight, bias) and x.numel() > x.shape[1] and _kernel() is not None


@torch.no_grad()
def with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor, act: str, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where the kernel is usable, without gradients; and (C,) the mean and 1 / sqrt(variance + `eps`)."""
    z, mean, inverse = torch.empty_like(x), weight.new_empty(x.shape[1]), weight.new_empty(x.shape[1])
    _run(False, act, eps, x, weight.contiguous(), bias.contiguous(), None, mean, inverse, z, None, None)
    return z, mean, inverse


def stock(x: Tensor, weight: Tensor, bias: Tensor, act: str, eps: float = 1e-5) -> Tensor:
    """The same by PyTorch's own operations."""
    c = x.shape[1]
    return ACTIVATIONS[act](F.batch_norm(x, None, None, weight[:c], bias[:c], True, eps=eps))


def _run(back: bool, act: str, eps: float, x: Tensor, *tensors: Tensor | None) -> None:
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (x, *tensors)]
    rows = x.numel() // x.shape[1]
    failed = _kernel()(int(back), is_half(x), CODES[act], *pointers, rows, x.shape[1], eps, threads())
    assert not failed, "plain() lets only through what the kernel can do"


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, act: str, eps: float) -> Tensor:
        z, mean, inverse = with_statistics(x, weight, bias, act, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.act, ctx.eps = act, eps
        return z

    @staticmethod
    def backward(ctx: Any, gz: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for
            z = stock(x, weight, bias, ctx.act, ctx.eps)
            first, second, third = torch.autograd.grad(z, (x, weight, bias), gz, create_graph=True)
            return first, second, third, None, None
        gz = gz.contiguous(memory_format=torch.channels_last)
        weight, bias = weight.contiguous(), bias.contiguous()
        gx, gw, gb = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
        _run(True, ctx.act, ctx.eps, x, weight, bias, gz, mean, inverse, gx, gw, gb)
        return gx, gw, gb, None, None
