"""Gradients of dense convolutions by AMX equal float64's, and others stay PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ofa import dense as module
from ofa.dense import usable
from ofa.layers import convolve
from ofa.processor import flags
from tests.ofa.test_kernels import compiled, doubled, images, relative, threads  # noqa: F401

amx = pytest.mark.skipif("amx_bf16" not in flags(), reason="a processor without AMX")
SHAPES = [
    (3, 64, 64, 8, 8, 3),
    (2, 65, 130, 5, 7, 3),
    (5, 96, 64, 1, 1, 3),
    (3, 100, 77, 9, 4, 5),
    (2, 64, 70, 3, 11, 7),
    (2, 64, 64, 33, 31, 3),  # more pixels than one pass
]


def half_images(n: int, c: int, h: int, w: int) -> Tensor:
    torch.manual_seed(0)
    return images(n, c, h, w).detach().bfloat16().requires_grad_()


def convolved(x: Tensor, weight: Tensor, d: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return convolve(x, weight, None, d)


@amx
@compiled
@pytest.mark.parametrize(("n", "c", "d", "h", "w", "kernel"), SHAPES)
def test_gradients_equal_float64(threads: int, n: int, c: int, d: int, h: int, w: int, kernel: int) -> None:  # noqa: F811
    x = half_images(n, c, h, w)
    weight = torch.randn(d + 5, c + 3, kernel, kernel).to(memory_format=torch.channels_last).requires_grad_()
    y = convolved(x, weight, d)
    assert "_Dense" in type(y.grad_fn).__name__
    gy = torch.randn_like(y)
    gx, gw = torch.autograd.grad(y, (x, weight), gy)
    exact_x, exact_weight = doubled(x, weight)
    exact = F.conv2d(exact_x, exact_weight[:d, :c], None, 1, kernel // 2)
    exact_gx, exact_gw = torch.autograd.grad(exact, (exact_x, exact_weight), gy.double())
    assert relative(y, exact) < 2**-7 and relative(gx, exact_gx) < 2**-7
    assert relative(gw, exact_gw) < 1e-6  # sums of floats, which oneDNN rounds to bfloat16
    assert gw.shape == weight.shape and gw.stride() == weight.stride()


@amx
@compiled
def test_gradients_of_gradients_are_pytorchs() -> None:
    x, weight = half_images(2, 64, 4, 5), torch.randn(64, 64, 3, 3, requires_grad=True)
    (found,) = torch.autograd.grad(convolved(x, weight, 64).square().sum(), x, create_graph=True)
    second = torch.autograd.grad(found.float().square().sum(), weight)[0]
    exact_x, exact_weight = doubled(x, weight)
    square = F.conv2d(exact_x, exact_weight, None, 1, 1).square().sum()
    (first,) = torch.autograd.grad(square, exact_x, create_graph=True)
    assert relative(second, torch.autograd.grad(first.square().sum(), exact_weight)[0]) < 2**-5


@amx
@compiled
def test_pytorch_does_what_the_kernel_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = half_images(2, 64, 6, 6), torch.randn(64, 64, 3, 3, requires_grad=True)
    before = torch.autograd.grad(convolved(x, weight, 64).float().sum(), weight)[0]
    monkeypatch.setattr(module, "_kernel", lambda: lambda *args: 1)  # as where the system refuses AMX
    y = convolved(x, weight, 64)
    assert "_Dense" in type(y.grad_fn).__name__
    assert relative(torch.autograd.grad(y.float().sum(), weight)[0], before) < 2**-7


@pytest.mark.parametrize(("channels", "kernel"), [(64, 3), (48, 3), (64, 1)])
def test_full_precision_and_few_channels_are_left_to_pytorch(channels: int, kernel: int) -> None:
    x, weight = half_images(2, 64, 6, 6), torch.randn(64, 64, kernel, kernel)
    assert not usable(x.float(), weight, channels)
    with torch.autocast("cpu", torch.bfloat16):
        assert usable(x, weight, channels) == ((channels, kernel) == (64, 3) and module._kernel() is not None)
