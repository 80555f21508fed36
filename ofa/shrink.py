"""The kernels of smaller depthwise layers, from those of the largest one, on a compiled kernel where one can be had.

C channels, K kernel size.  A smaller kernel is the centre of the next larger one times a matrix (Cai et al. 2020,
sec. 3.3); of the last, a small image only needs the centre.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ofa.kernels import library, ordinary


@cache
def _kernels() -> Any:
    found = library("shrink")
    if found is None:
        return None
    pointer, whole = ctypes.c_void_p, ctypes.c_int
    found.shrink.argtypes = [pointer, pointer, ctypes.c_long, whole, whole, pointer, pointer]
    found.shrink_back.argtypes = [pointer, pointer, pointer, ctypes.c_long, whole, whole, pointer, pointer, pointer]
    found.shrink.restype = found.shrink_back.restype = None
    return found


def shrink(weight: Tensor, channels: int, taps: int, matrices: Sequence[Tensor] = ()) -> Tensor:
    """The first channels of (C, 1, K, K) as (channels, 1, taps, taps).

    matrices: (k * k, k * k) for each smaller kernel on the way, the largest first.
    """
    if weight.shape == (channels, 1, taps, taps) and not matrices:
        return weight
    if _usable(weight, matrices):
        run = _Shrink.apply if torch.is_grad_enabled() else _shrink
        return run(weight, channels, taps, *matrices)
    return stock(weight, channels, taps, matrices)


def stock(weight: Tensor, channels: int, taps: int, matrices: Sequence[Tensor]) -> Tensor:
    """The same by PyTorch's own operations."""
    weight = weight[:channels]
    for matrix in matrices:
        k = isqrt(len(matrix))
        weight = F.linear(_centre(weight, k).reshape(channels, -1), matrix).view(channels, 1, k, k)
    return _centre(weight, taps)


def _centre(weight: Tensor, k: int) -> Tensor:
    cut = (weight.shape[-1] - k) // 2
    return weight[:, :, cut : cut + k, cut : cut + k] if cut else weight


def _usable(weight: Tensor, matrices: Sequence[Tensor]) -> bool:
    fits = weight.shape[1] == 1 and weight.shape[-1] <= 7 and len(matrices) <= 3
    return fits and ordinary(weight, *matrices) and _kernels() is not None


def _chain(weight: Tensor, matrices: Sequence[Tensor]) -> tuple[int, Any, Any]:
    """How many matrices, the sizes of the kernels, and where the matrices are."""
    return len(matrices), _sizes(weight.shape[-1], *(len(matrix) for matrix in matrices)), _pointers(matrices)


@cache
def _sizes(taps: int, *rows: int) -> Any:
    return (ctypes.c_int * (1 + len(rows)))(taps, *map(isqrt, rows))


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _shrink(weight: Tensor, channels: int, taps: int, *matrices: Tensor) -> Tensor:
    weight, matrices = weight.contiguous(), tuple(matrix.contiguous() for matrix in matrices)
    y = weight.new_empty(channels, 1, taps, taps)
    _kernels().shrink(weight.data_ptr(), y.data_ptr(), channels, taps, *_chain(weight, matrices))
    return y


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, channels: int, taps: int, *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *matrices)
        return _shrink(weight, channels, taps, *matrices)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *matrices = ctx.saved_tensors
        channels, _, taps, _ = gy.shape
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for
            y = stock(weight, channels, taps, matrices)
            gw, *gm = torch.autograd.grad(y, (weight, *matrices), gy, create_graph=True)
            return gw, None, None, *gm
        gy, weight, matrices = gy.contiguous(), weight.contiguous(), [matrix.contiguous() for matrix in matrices]
        gw, gm = torch.empty_like(weight), [torch.empty_like(matrix) for matrix in matrices]
        if channels < len(gw):
            gw[channels:].zero_()
        sizes = (channels, taps, *_chain(weight, matrices))
        _kernels().shrink_back(weight.data_ptr(), gy.data_ptr(), gw.data_ptr(), *sizes, _pointers(gm))
        return gw, None, None, *gm
