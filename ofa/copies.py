"""Copies of the leading parts of weights, on a compiled kernel where one can be had."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from ofa.kernels import library, ordinary


@cache
def _kernel() -> Any:
    found = library("copy")
    if found is None:
        return None
    found.copy.argtypes, found.copy.restype = [*2 * [ctypes.c_void_p], *3 * [ctypes.c_long]], None
    return found.copy


def leading_copy(weight: Tensor, size: Sequence[int]) -> Tensor:
    """A copy of the leading part (K, C) or (K, C, H, W) of a weight, channels last.  To be called without gradients."""
    layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
    if weight.is_contiguous(memory_format=layout) and ordinary(weight) and _kernel() is not None:
        (cout, cin), taps = size[:2], prod(size[2:])
        part = torch.empty(size, dtype=weight.dtype, device=weight.device, memory_format=layout)
        _kernel()(part.data_ptr(), weight.data_ptr(), cout * taps, cin, weight.shape[1])
        return part
    part = weight if weight.shape == size else weight.as_strided(size, weight.stride())
    return part.clone(memory_format=layout)
