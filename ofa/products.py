"""Products of matrices, by the one of PyTorch's libraries that is faster here.  M, K, N: their sizes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ofa.processor import facts, flags

ENOUGH = 2**20  # multiply-adds that are worth some 10 µs of oneDNN's call


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL, which leaves AVX-512 unused on AMD's processors."""
    amd = facts().get("vendor_id") == "AuthenticAMD" and "avx512f" in flags()
    return amd and torch.backends.mkldnn.is_available()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """(M, K) times (K, N), plus a bias (N,) for each row: (M, N)."""
    if not _by_onednn(a, b):
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    if bias is None and a.shape[1] > len(a) > b.shape[1]:  # a long sum, for which few rows and many columns are faster
        return _onednn(b.t(), a.t(), None).t().contiguous()
    return _onednn(a, b, bias)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write (M, K) times (K, N) into a matrix (M, N), which may be a part of a larger one."""
    if _by_onednn(a, b):
        out.copy_(product(a, b))
    else:
        torch.mm(a, b, out=out)


def compact(matrix: Tensor) -> Tensor:
    """A matrix as the products here take it without copying it first, where it is used in more than one of them."""
    return _whole(matrix) if prefers_onednn() and matrix.dtype == torch.float32 else matrix


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_whole(a), _whole(b).t(), bias, "none", [], "")


def _whole(matrix: Tensor) -> Tensor:
    """A matrix without gaps between its rows or columns: with them oneDNN takes a thousand times as long."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    (m, k), n = a.shape, b.shape[1]
    return (
        m * k * n >= ENOUGH
        and prefers_onednn()
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))  # it has no gradient
    )
