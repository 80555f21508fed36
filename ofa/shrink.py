"""The kernels of smaller depthwise layers, from those of the largest one, on a compiled kernel where one can be had.

C channels, K kernel size.  A smaller kernel is the centre of the next larger one times a matrix (Cai et al. 2020,
sec. 3.3); of the last, a small image only needs the centre.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
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


@dataclass(frozen=True, slots=True)
class Smaller:
    """A kernel that is wanted: the first channels of `weight` (C, 1, K, K) as (channels, 1, taps, taps).

    matrices: (k * k, k * k) for each smaller kernel on the way, the largest first.
    """

    weight: Tensor
    channels: int
    taps: int
    matrices: Sequence[Tensor] = ()

    @property
    def same(self) -> bool:
        """Whether it is the weight itself."""
        return self.weight.shape == (self.channels, 1, self.taps, self.taps) and not self.matrices


def shrink(*wanted: Smaller) -> list[Tensor]:
    """The kernels that are wanted, a whole network's in one call of autograd, which takes longer than its work."""
    new = [one for one in wanted if not one.same]
    tensors = [tensor for one in new for tensor in (one.weight, *one.matrices)]
    if not (all(map(_fits, new)) and ordinary(*tensors) and _kernels()):
        made = [stock(one) for one in new]
    elif torch.is_grad_enabled() and new:
        sizes = [(one.channels, one.taps, len(one.matrices)) for one in new]
        made = list(_Shrink.apply(sizes, *tensors))
    else:
        made = [_shrink(one) for one in new]
    return [one.weight if one.same else made.pop(0) for one in wanted]


def stock(wanted: Smaller) -> Tensor:
    """One of them by PyTorch's own operations."""
    weight, channels = wanted.weight[: wanted.channels], wanted.channels
    for matrix in wanted.matrices:
        k = isqrt(len(matrix))
        weight = F.linear(_centre(weight, k).reshape(channels, -1), matrix).view(channels, 1, k, k)
    return _centre(weight, wanted.taps)


def _centre(weight: Tensor, k: int) -> Tensor:
    cut = (weight.shape[-1] - k) // 2
    return weight[:, :, cut : cut + k, cut : cut + k] if cut else weight


def _fits(wanted: Smaller) -> bool:
    """Whether the compiled kernel has room for it."""
    return wanted.weight.shape[1] == 1 and wanted.weight.shape[-1] <= 7 and len(wanted.matrices) <= 3


def _chain(weight: Tensor, matrices: Sequence[Tensor]) -> tuple[int, Any, Any]:
    """How many matrices, the sizes of the kernels, and where the matrices are."""
    return len(matrices), _sizes(weight.shape[-1], *(len(matrix) for matrix in matrices)), _pointers(matrices)


@cache
def _sizes(taps: int, *rows: int) -> Any:
    return (ctypes.c_int * (1 + len(rows)))(taps, *map(isqrt, rows))


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _shrink(wanted: Smaller) -> Tensor:
    weight, matrices = wanted.weight.contiguous(), [matrix.contiguous() for matrix in wanted.matrices]
    y = weight.new_empty(wanted.channels, 1, wanted.taps, wanted.taps)
    _kernels().shrink(weight.data_ptr(), y.data_ptr(), wanted.channels, wanted.taps, *_chain(weight, matrices))
    return y


def _shrink_back(wanted: Smaller, gy: Tensor) -> list[Tensor]:
    """The gradients of its weight and matrices."""
    weight, matrices = wanted.weight.contiguous(), [matrix.contiguous() for matrix in wanted.matrices]
    gw, gm, gy = torch.empty_like(weight), [torch.empty_like(matrix) for matrix in matrices], gy.contiguous()
    if wanted.channels < len(gw):
        gw[wanted.channels :].zero_()
    sizes = (wanted.channels, wanted.taps, *_chain(weight, matrices))
    _kernels().shrink_back(weight.data_ptr(), gy.data_ptr(), gw.data_ptr(), *sizes, _pointers(gm))
    return [gw, *gm]


class _Shrink(torch.autograd.Function):
    """All that are wanted, of each the channels, the taps and the number of matrices, and its weight and matrices."""

    @staticmethod
    def forward(ctx: Any, sizes: list[tuple[int, int, int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.sizes = sizes
        return tuple(_shrink(one) for one in _wanted(sizes, tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = _wanted(ctx.sizes, tensors)
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for
            made = [stock(one) for one in wanted]
            return None, *torch.autograd.grad(made, tensors, gradients, create_graph=True)
        return None, *(part for one, gy in zip(wanted, gradients, strict=True) for part in _shrink_back(one, gy))


def _wanted(sizes: list[tuple[int, int, int]], tensors: Sequence[Tensor]) -> Iterator[Smaller]:
    rest = iter(tensors)
    for channels, taps, matrices in sizes:
        yield Smaller(next(rest), channels, taps, list(islice(rest, matrices)))
