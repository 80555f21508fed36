"""Compiled kernels compute what PyTorch computes in float64, and nothing is lost where they cannot be had."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa import copies as copies_module
from ofa import depthwise as depthwise_module
from ofa import norm as norm_module
from ofa import products
from ofa import shrink as shrink_module
from ofa.copies import leading_copy
from ofa.depthwise import depthwise
from ofa.extraction import extract, recalibrate
from ofa.inference import fast
from ofa.kernels import library, plain
from ofa.layers import convolve, leading, squeeze_excite
from ofa.modules import ConvBN, SqueezeExcite, activation
from ofa.norm import ACTIVATIONS, batch_norm_act
from ofa.shrink import Smaller, shrink, stock
from ofa.space import load_space
from ofa.supernet import Supernet
from ofa.training.layers import fast_layers
from tests.ofa.nets import SPEC, random_net

compiled = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
CASES = [
    (h, w, k, s, c)
    for h, w in ((1, 1), (2, 3), (5, 4), (9, 13))
    for k in (1, 3, 5, 7)
    for s in (1, 2)
    for c in (16, 76)
]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setenv("OFA_KERNEL_THREADS", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    modules = (copies_module._kernel, depthwise_module._kernel, norm_module._kernel, shrink_module._kernels)
    cached = (library, *modules)
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def images(n: int, c: int, h: int, w: int) -> Tensor:
    return (2 * torch.randn(n, c, h, w) + 1).to(memory_format=torch.channels_last).requires_grad_()


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm().clamp_min(1e-12)).detach())


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@compiled
@pytest.mark.parametrize(("h", "w", "kernel", "stride", "channels"), CASES)
def test_depthwise_and_its_gradients_equal_float64(
    h: int, w: int, kernel: int, stride: int, channels: int, threads: int
) -> None:
    torch.manual_seed(0)
    x, weight = images(3, channels, h, w), torch.randn(channels, 1, kernel, kernel, requires_grad=True)
    y = depthwise(x, weight, stride)
    assert "_Depthwise" in type(y.grad_fn).__name__
    exact_x, exact_weight = doubled(x, weight)
    exact = F.conv2d(exact_x, exact_weight, None, stride, kernel // 2, groups=channels)
    gy = torch.randn_like(y)
    found = (y, *torch.autograd.grad(y, (x, weight), gy))
    expected = (exact, *torch.autograd.grad(exact, (exact_x, exact_weight), gy.double()))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and relative(a, b) < 1e-6


@compiled
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("h", "w", "channels"), [(1, 1, 16), (3, 5, 76), (8, 8, 24), (33, 31, 40), (7, 7, 100)])
def test_norm_with_activation_and_its_gradients_equal_float64(
    act: str, h: int, w: int, channels: int, threads: int
) -> None:
    torch.manual_seed(0)
    x, weight, bias = images(4, channels, h, w), torch.rand(channels) + 0.5, torch.randn(channels)
    weight.requires_grad_()
    bias.requires_grad_()
    z = batch_norm_act(x, weight, bias, act)
    assert "_BatchNormAct" in type(z.grad_fn).__name__
    exact_x, exact_weight, exact_bias = doubled(x, weight, bias)
    exact = norm_module.stock(exact_x, exact_weight, exact_bias, act)
    gz = torch.randn_like(z)
    found = (z, *torch.autograd.grad(z, (x, weight, bias), gz))
    expected = (exact, *torch.autograd.grad(exact, (exact_x, exact_weight, exact_bias), gz.double()))
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 2e-5


@compiled
@pytest.mark.parametrize("channels", [16, 76])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 2), (5, 1), (7, 2)])
def test_depthwise_of_bfloat16_images_equals_float64(kernel: int, stride: int, channels: int) -> None:
    torch.manual_seed(0)
    x = images(3, channels, 9, 6).detach().bfloat16().requires_grad_()
    weight = torch.randn(channels, 1, kernel, kernel, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise(x, weight, stride)
    assert "_Depthwise" in type(y.grad_fn).__name__ and y.dtype == torch.bfloat16
    exact_x, exact_weight = doubled(x, weight)
    exact = F.conv2d(exact_x, exact_weight, None, stride, kernel // 2, groups=channels)
    gy = torch.randn_like(y)
    gx, gw = torch.autograd.grad(y, (x, weight), gy, retain_graph=True)
    expected = torch.autograd.grad(exact, (exact_x, exact_weight), gy.double())
    assert relative(y, exact) < 2**-8 and relative(gx, expected[0]) < 2**-8  # rounded once, at the end
    assert gw.dtype == torch.float32 and relative(gw, expected[1]) < 1e-6
    (first,) = torch.autograd.grad(y, weight, gy, create_graph=True)
    assert first.dtype == torch.float32 and relative(first, gw) < 2**-6


@compiled
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("h", "w", "channels"), [(1, 1, 16), (9, 8, 76), (7, 7, 100)])
def test_norm_of_bfloat16_images_equals_float64(act: str, h: int, w: int, channels: int) -> None:
    torch.manual_seed(0)
    x = images(8, channels, h, w).detach().bfloat16().requires_grad_()
    weight, bias = (torch.rand(channels) + 0.5).requires_grad_(), torch.randn(channels, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        z = batch_norm_act(x, weight, bias, act)
    assert "_BatchNormAct" in type(z.grad_fn).__name__ and z.dtype == torch.bfloat16
    exact_x, exact_weight, exact_bias = doubled(x, weight, bias)
    exact = norm_module.stock(exact_x, exact_weight, exact_bias, act)
    gz = torch.randn_like(z)
    gx, *others = torch.autograd.grad(z, (x, weight, bias), gz)
    expected = torch.autograd.grad(exact, (exact_x, exact_weight, exact_bias), gz.double())
    assert relative(z, exact) < 2**-8 and relative(gx, expected[0]) < 2**-8
    assert all(relative(a, b) < 2e-5 for a, b in zip(others, expected[1:], strict=True))


@compiled
def test_a_bfloat16_image_that_is_not_finite_stays_so() -> None:
    x = images(4, 16, 2, 2).detach().bfloat16()
    x[0, 3, 0, 0], x[0, 5, 0, 0] = torch.nan, torch.inf
    with torch.autocast("cpu", torch.bfloat16):
        z = batch_norm_act(x, torch.ones(16), torch.zeros(16), "none")
    finite = z.isfinite().all(3).all(2).all(0)
    assert (~finite).nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("usable", [True, False])
def test_weights_beyond_the_channels_of_the_image_get_no_gradient(usable: bool) -> None:
    x, weight, bias = images(4, 24, 3, 3), torch.randn(40, requires_grad=True), torch.randn(40, requires_grad=True)
    z = batch_norm_act(x if usable else x.contiguous(), weight, bias, "h_swish")
    expected = norm_module.stock(x, weight[:24], bias[:24], "h_swish")
    assert relative(z, expected) < 1e-5
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (z, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-3) and a.shape == b.shape


@pytest.mark.parametrize("shape", [(6, 8, 1, 1), (4, 8, 1, 1), (6, 5, 1, 1), (3, 2, 1, 1)])
def test_leading_weights_and_their_gradient_equal_slices(shape: tuple[int, ...]) -> None:
    weight = torch.randn(6, 8, 1, 1, requires_grad=True)
    found, expected = leading(weight, *shape[:2]), weight[: shape[0], : shape[1]]
    assert torch.equal(found, expected)
    g = torch.randn(shape)
    gradients = [torch.autograd.grad((part**2 * g).sum(), weight, create_graph=True)[0] for part in (found, expected)]
    assert torch.equal(*gradients)
    assert torch.equal(*(torch.autograd.grad(gradient.square().sum(), weight)[0] for gradient in gradients))


@compiled
def test_results_do_not_depend_on_threads() -> None:
    x, weight = images(2, 200, 9, 9), torch.randn(200, 1, 5, 5, requires_grad=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        z = batch_norm_act(depthwise(x, weight, 1), weight[:, 0, 0, 0], weight[:, 0, 0, 1], "relu")
        results.append([z, *torch.autograd.grad(z.square().sum(), (x, weight))])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
def test_gradients_have_gradients() -> None:
    x, weight = images(2, 16, 4, 4), torch.randn(16, 1, 3, 3, requires_grad=True)
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for into, run in ((found, depthwise), (expected, depthwise_module._stock)):
        z = batch_norm_act(run(x, weight.flip(3), 1), weight[:, 0, 0, 0], weight[:, 0, 0, 1], "h_swish")
        (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        into += torch.autograd.grad(first.square().sum(), (x, weight))
    assert all(relative(a, b) < 1e-4 for a, b in zip(found, expected, strict=True))


def test_without_a_compiler_the_stock_operations_give_the_same(no_compiler: None) -> None:
    x, weight = images(2, 16, 6, 6), torch.randn(16, 1, 5, 5, requires_grad=True)
    assert library("depthwise") is None and library("norm") is None
    y = depthwise(x, weight, 2)
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"
    assert torch.equal(y, F.conv2d(x, weight, None, 2, 2, groups=16))
    z = batch_norm_act(x, weight[:, 0, 0, 0], weight[:, 0, 0, 1], "relu")
    assert torch.equal(z, F.relu(F.batch_norm(x, None, None, weight[:, 0, 0, 0], weight[:, 0, 0, 1], True)))
    (smaller,) = shrink(Smaller(weight, 8, 3))
    assert torch.equal(smaller, weight[:8, :, 1:4, 1:4]) and type(smaller.grad_fn).__name__ == "SliceBackward0"


def test_a_kernel_that_does_not_compile_is_told_and_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "cc"
    bad.write_text("#!/bin/sh\necho 'norm.c:7: error: no such thing' >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("CC", str(bad))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    with caplog.at_level(logging.WARNING, "ofa.kernels"):
        assert library("norm") is None
    library.cache_clear()
    assert "norm.c does not compile" in caplog.text and "no such thing" in caplog.text and "set CC" in caplog.text


def test_the_kernels_leave_other_inputs_to_pytorch() -> None:
    x, weight = images(2, 16, 6, 6), torch.randn(16, 1, 3, 3)
    assert plain(x.detach(), weight)
    for other in (x.detach().double(), x.detach().contiguous(), x.detach()[:, :8], x.detach().to("meta")):
        assert not plain(other, weight)
        expected = F.conv2d(
            other.double(), weight[: other.shape[1]].to(other.device).double(), None, 1, 1, groups=other.shape[1]
        )
        found = depthwise(other, weight[: other.shape[1]].to(other.device, other.dtype), 1)
        assert found.is_meta or relative(found, expected) < 1e-6
    assert not plain(x.detach().bfloat16(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not plain(x.detach(), weight) and plain(x.detach().bfloat16(), weight)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not plain(x.detach().half(), weight)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_small_convolve_convolutions_equal_conv2d(size: int) -> None:
    x, weight, bias = images(2, 24, size, size), torch.randn(16, 32, 1, 1)[:, :24], torch.randn(16)
    y = convolve(x, weight, bias)
    assert torch.allclose(y, F.conv2d(x, weight, bias), atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "with_bias"), [(1, 1, True), (1, 1, False), (1, 2, True), (3, 1, True), (3, 2, False)]
)
def test_small_convolutions_by_a_part_of_the_weight_have_the_gradients_of_conv2d(
    monkeypatch: pytest.MonkeyPatch, kernel: int, stride: int, with_bias: bool, onednn: bool
) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: onednn and torch.backends.mkldnn.is_available())
    monkeypatch.setattr(products, "ENOUGH", 1)
    x, weight = images(2, 24, 4, 3), torch.randn(20, 32, kernel, kernel, requires_grad=True)
    bias = torch.randn(20, requires_grad=True) if with_bias else None
    found = convolve(x, weight, bias, 12, stride)
    assert ("_Product" in type(found.grad_fn).__name__) and found.is_contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(x, weight[:12, :24], None if bias is None else bias[:12], stride, kernel // 2)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    inputs = [x, weight] if bias is None else [x, weight, bias]
    first = [torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True) for y in (found, expected)]
    assert all(relative(a, b) < 1e-5 for a, b in zip(*first, strict=True))
    second = [torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs) for gradients in first]
    assert all(relative(a, b) < 1e-5 for a, b in zip(*second, strict=True))
    plain_gradients = torch.autograd.grad(convolve(x, weight, bias, 12, stride).pow(3).sum(), inputs)
    assert all(relative(a, b) < 1e-5 for a, b in zip(plain_gradients, first[1], strict=True))


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_small_convolutions_of_bfloat16_images_equal_float64(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    x = images(2, 24, 4, 4).detach().bfloat16().requires_grad_()
    weight, bias = torch.randn(20, 32, kernel, kernel, requires_grad=True), torch.randn(20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = convolve(x, weight, bias, 12, stride)
    assert found.dtype == torch.bfloat16
    exact = doubled(x, weight, bias)
    expected = F.conv2d(exact[0], exact[1][:12, :24], exact[2][:12], stride, kernel // 2)
    g = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (x, weight, bias), g)
    assert relative(found, expected) < 2**-7
    for a, b, like in zip(gradients, torch.autograd.grad(expected, exact, g.double()), (x, weight, bias), strict=True):
        assert a.dtype == like.dtype and relative(a, b) < 2**-7


@torch.no_grad()
def test_the_fast_net_gives_the_logits_of_the_plain_one() -> None:
    net, x = random_net(), torch.randn(8, 1, 16, 16)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    logits = net(x)
    assert relative(fast(net)(x), logits) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.units[3].depthwise.conv.weight.mul_(1.01)
    assert relative(fast(net)(x), logits) > 1e-4
    assert net.spec is SPEC


@compiled
def test_calibration_on_the_kernels_gives_the_statistics_of_pytorch() -> None:
    net, other = random_net(), random_net()
    batches = [torch.randn(n, 1, 16, 16) * n for n in (8, 5)]
    recalibrate(net, batches)
    for norm in (norms := [module for module in other.train().modules() if isinstance(module, nn.BatchNorm2d)]):
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for batch in batches:
            other(batch)
    found, expected = net.state_dict(), other.state_dict()
    assert found.keys() == expected.keys() and norms
    assert all(relative(found[name].double(), expected[name].double()) < 1e-5 for name in found)


def test_extracted_nets_share_nothing() -> None:
    space = load_space("digits_mbv3")
    supernet, arch = Supernet(space), space.decode(space.largest())[0]
    first, second = extract(supernet, arch), extract(supernet, arch)
    pointers = [{t.data_ptr() for t in net.state_dict().values()} for net in (first, second, supernet)]
    assert not (pointers[0] & pointers[1] or pointers[0] & pointers[2])
    seen: list[object] = []
    first.units[0].conv.register_forward_hook(lambda *_: seen.append(1))
    second(torch.randn(1, space.in_channels, arch.resolution, arch.resolution))
    assert not seen
    assert not any(module.training for module in first.modules())
    assert all(p.requires_grad and p.is_leaf for p in first.parameters())


@pytest.mark.parametrize("channels", [1, 20, 40])
@pytest.mark.parametrize(
    ("smaller", "taps"), [((), 7), ((), 3), ((), 1), ((5,), 5), ((5,), 3), ((5, 3), 3), ((5, 3), 1)]
)
def test_kernels_of_smaller_layers_and_their_gradients_equal_float64(
    smaller: tuple[int, ...], taps: int, channels: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 1, 7, 7, requires_grad=True)
    matrices = [torch.randn(k * k, k * k, requires_grad=True) for k in smaller]
    (found,) = shrink(Smaller(weight, channels, taps, matrices))
    exact_weight, *exact_matrices = doubled(weight, *matrices)
    exact = stock(Smaller(exact_weight, channels, taps, exact_matrices))
    assert found.shape == exact.shape == (channels, 1, taps, taps) and relative(found, exact) < 1e-6
    gy = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (weight, *matrices), gy, create_graph=True, materialize_grads=True)
    plain_gradients = torch.autograd.grad(shrink(Smaller(weight, channels, taps, matrices)), (weight, *matrices), gy)
    expected = torch.autograd.grad(exact, (exact_weight, *exact_matrices), gy.double())
    for a, b, c in zip(gradients, plain_gradients, expected, strict=True):
        assert relative(a, c) < 1e-6 and relative(b, c) < 1e-6


@compiled
def test_smaller_kernels_are_made_by_the_compiled_kernel_where_it_can() -> None:
    weight, matrix = torch.randn(40, 1, 7, 7, requires_grad=True), torch.randn(25, 25)
    (found,) = shrink(Smaller(weight, 24, 3, [matrix]))
    assert "_Shrink" in type(found.grad_fn).__name__
    (double,) = shrink(Smaller(weight.double(), 24, 3, [matrix.double()]))
    assert "_Shrink" not in type(double.grad_fn).__name__
    assert shrink(Smaller(weight, 40, 7)) == [weight] and shrink() == []
    (wrong,) = shrink(Smaller(weight, 24, 3, [matrix + 0.01 * torch.eye(25)]))
    assert relative(wrong, found) > 1e-4


@compiled
def test_smaller_kernels_of_a_network_are_made_in_one_call_and_each_gets_its_own_gradients() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(c, 1, 7, 7, requires_grad=True) for c in (40, 24, 30)]
    matrices = [torch.randn(k * k, k * k, requires_grad=True) for k in (5, 3, 5)]
    wanted = [
        Smaller(weights[0], 20, 3, matrices[:2]),
        Smaller(weights[1], 24, 7),
        Smaller(weights[2], 30, 5, matrices[2:]),
    ]
    found = shrink(*wanted)
    assert found[0].grad_fn is found[2].grad_fn and found[1] is weights[1]
    given = [torch.randn_like(kernel) for kernel in found]
    together = torch.autograd.grad(found, [*weights, *matrices], given)
    alone = torch.autograd.grad([stock(one) for one in wanted], [*weights, *matrices], given)
    for a, b in zip(together, alone, strict=True):
        assert relative(a, b) < 1e-5
    first, *_ = torch.autograd.grad(shrink(*wanted)[0].sum(), [weights[0], weights[2]], materialize_grads=True)
    assert relative(first, torch.autograd.grad(stock(wanted[0]).sum(), weights[0])[0]) < 1e-5


@pytest.mark.parametrize("whole", [(1, 1), (40, 50), (300, 70), (24, 16, 3, 3), (48, 80, 1, 1), (30, 1, 5, 5)])
def test_copies_of_leading_parts_are_whole_and_their_own(whole: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if len(whole) == 4 else torch.contiguous_format
    weight = torch.randn(*whole).contiguous(memory_format=layout)
    for cout in {1, whole[0] // 2 + 1, whole[0]}:
        for cin in {1, whole[1] // 2 + 1, whole[1]}:
            copy, part = leading_copy(weight, (cout, cin, *whole[2:])), weight[:cout, :cin]
            expected = part.clone(memory_format=layout)
            assert torch.equal(copy, part) and copy.stride() == expected.stride()
            assert copy.untyped_storage().nbytes() == 4 * part.numel() and not copy.is_set_to(weight)
            assert torch.equal(leading_copy(weight.double(), copy.shape), part.double())
    rows_last = (
        weight.t().contiguous().t() if len(whole) == 2 else weight.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    )
    assert torch.equal(leading_copy(rows_last, whole), weight)


def test_fine_tuning_runs_any_network_on_kernels_and_products_and_leaves_its_layers_as_they_were() -> None:
    torch.manual_seed(0)
    odd = nn.Conv2d(16, 16, 3, padding=0, groups=16, bias=False)  # not padded as the kernel pads
    layers = [nn.Conv2d(16, 16, k, stride, k // 2, groups=16, bias=False) for k, stride in ((3, 1), (5, 2), (7, 1))]
    dense = [nn.Conv2d(16, 20, 3, 2, 1), nn.Conv2d(20, 20, 2, 1, 1), nn.Conv2d(20, 8, 1)]  # of 2 and 3 pixels a side
    net, x = nn.Sequential(*layers, nn.BatchNorm2d(16), odd, *dense), images(2, 16, 12, 12)
    net(x).square().sum().backward()
    plain_grads = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    with fast_layers(net):
        y = net(x)
        names = {node.name() for node in _nodes(y.grad_fn)}
        y.square().sum().backward()
    assert ("_DepthwiseBackward" in names) == (library("depthwise") is not None) and "_ProductBackward" in names
    assert ("_BatchNormActBackward" in names) == (library("norm") is not None)
    assert [type(layer) for layer in net] == [*[nn.Conv2d] * 3, nn.BatchNorm2d, *[nn.Conv2d] * 4]
    for parameter, expected in zip(net.parameters(), plain_grads, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_what_follows_a_product_may_work_in_place(bias: bool) -> None:
    net, x = nn.Sequential(nn.Conv2d(16, 12, 3, 1, 1, bias=bias), nn.ReLU(inplace=True)), images(2, 16, 2, 2)
    expected = net(x)
    with fast_layers(net):
        y = net(x)
        assert "_ProductBackward" in {node.name() for node in _nodes(y.grad_fn)}
        y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


def gate(x: Tensor, reduced: int, *weights: Tensor) -> Tensor:
    """Squeeze-excite by PyTorch's own operations."""
    reduce, reduce_bias, expand, expand_bias = weights
    hidden = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), reduce[:reduced, : x.shape[1]], reduce_bias[:reduced]))
    c = x.shape[1]
    return x * F.hardsigmoid(F.conv2d(hidden, expand[:c, :reduced], expand_bias[:c]))


def convolutions(channels: int, hidden: int) -> tuple[nn.Conv2d, nn.Conv2d]:
    torch.manual_seed(0)
    return nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)


@pytest.mark.parametrize(("h", "w", "channels"), [(1, 1, 16), (5, 3, 24), (9, 8, 40)])
def test_squeeze_excite_and_its_gradients_equal_float64(h: int, w: int, channels: int) -> None:
    reduce, expand = convolutions(40, 12)
    weights = reduce.weight, reduce.bias, expand.weight, expand.bias
    x = images(3, channels, h, w)
    y = squeeze_excite(x, reduce, expand, 8)
    assert "_Gated" in type(y.grad_fn).__name__ and y.is_contiguous(memory_format=torch.channels_last)
    exact = doubled(x, *weights)
    expected = gate(exact[0], 8, *exact[1:])
    g = torch.randn_like(y)
    found = y, *torch.autograd.grad(y, (x, *weights), g, retain_graph=True)
    for a, b in zip(found, (expected, *torch.autograd.grad(expected, exact, g.double())), strict=True):
        assert a.shape == b.shape and relative(a, b) < 1e-5
    again = torch.autograd.grad(y, (x, *weights), g)
    assert all(torch.equal(a, b) for a, b in zip(again, found[1:], strict=True))


def test_squeeze_excite_of_bfloat16_images_equals_float64() -> None:
    reduce, expand = convolutions(24, 8)
    weights = reduce.weight, reduce.bias, expand.weight, expand.bias
    x = images(4, 24, 8, 8).detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = squeeze_excite(x, reduce, expand)
    assert "_Gated" in type(y.grad_fn).__name__ and y.dtype == torch.bfloat16
    exact = doubled(x, *weights)
    expected = gate(exact[0], 8, *exact[1:])
    g = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, *weights), g, retain_graph=True)
    for a, b in zip(gradients, torch.autograd.grad(expected, exact, g.double()), strict=True):
        assert relative(a, b) < 2**-5
    assert relative(y, expected) < 2**-7 and gradients[0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1:])


def test_squeeze_excite_with_weights_that_are_not_trained_or_images_that_need_no_gradient() -> None:
    reduce, expand = convolutions(16, 8)
    reduce.requires_grad_(False)
    x = images(2, 16, 4, 4)
    expected = torch.autograd.grad(gate(x, 8, reduce.weight, reduce.bias, expand.weight, expand.bias).sum(), x)[0]
    for given in (x, x.detach()):
        expand.zero_grad()
        squeeze_excite(given, reduce, expand).sum().backward()
        assert reduce.weight.grad is None and expand.weight.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("changed", ["nothing", "hook", "pre-hook", "forward", "kind", "kind of another part"])
def test_fine_tuning_runs_squeeze_excite_in_fewer_passes_unless_a_part_of_it_was_changed(changed: str) -> None:
    torch.manual_seed(0)
    net, x, seen = SqueezeExcite(16, 8), images(2, 16, 6, 6), list[Tensor]()
    if changed == "hook":
        net.gate.register_forward_hook(lambda _, __, y: seen.append(y))
    elif changed == "pre-hook":
        net.reduce.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    elif changed == "forward":
        net.relu.forward = lambda y: 2 * y  # type: ignore[method-assign, assignment, misc]
    elif changed == "kind":
        net.gate = nn.Sigmoid()  # type: ignore[assignment]
    elif changed == "kind of another part":
        net.gate = nn.ReLU()  # type: ignore[assignment]
    expected = net(x)
    seen.clear()
    with fast_layers(net):
        y = net(x)
        assert ("_Gated" in type(y.grad_fn).__name__) == (changed == "nothing")
    assert type(net) is SqueezeExcite and bool(seen) == ("hook" in changed)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "h_swish"])
def test_fine_tuning_runs_an_activation_with_the_batch_norm_before_it_unless_somebody_looks_between(act: str) -> None:
    torch.manual_seed(0)
    net, x, seen = ConvBN(6, 16, 3, 1, act=act), images(2, 6, 12, 12), list[Tensor]()
    gradient = images(2, 16, 12, 12)
    expected = net(x)
    expected.backward(gradient)
    plain_grads = [parameter.grad for parameter in net.parameters()]
    for looked in (False, True):
        hook = net.bn.register_forward_hook(lambda _, __, y: seen.append(y)) if looked else None
        net.zero_grad()
        with fast_layers(net):
            assert isinstance(net.act, nn.Identity) == (not looked or act == "none")
            y = net(x)
            y.backward(gradient)
            evaluated = net.eval()(x)
        assert type(net.bn) is nn.BatchNorm2d and type(net.act) is type(activation(act))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(evaluated, net(x))
        net.train()
        for parameter, grad in zip(net.parameters(), plain_grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-3)
        if hook:
            torch.testing.assert_close(seen[0], net.bn(net.conv(x)))
            hook.remove()


def test_fine_tuning_leaves_an_activation_with_a_forward_of_its_own() -> None:
    net, x = ConvBN(6, 16, 3, 1, act="relu"), images(2, 6, 12, 12)
    net.act.forward = lambda y: 2 * y
    expected = net(x)
    with fast_layers(net):
        torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("module", ["bn", "act"])
@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_fine_tuning_shows_hooks_the_gradients_of_their_own_layer(module: str, kind: str) -> None:
    net, x, gradient = ConvBN(6, 16, 3, 1, act="relu"), images(2, 6, 12, 12), images(2, 16, 12, 12)
    seen: list[torch.Tensor] = []
    getattr(getattr(net, module), f"register_{kind}")(lambda layer, *gradients: seen.append(gradients[0][0].clone()))
    net(x).backward(gradient)
    with fast_layers(net):
        net(x).backward(gradient)
    torch.testing.assert_close(seen[1], seen[0])


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    for earlier, _ in node.next_functions:
        if earlier is not None:
            yield from _nodes(earlier)


def test_memory_is_left_to_the_c_library_where_that_is_asked_for() -> None:
    code = "from ofa.kernels import keep_memory; print(keep_memory())"
    for value, kept in (("0", "False"), ("1", "True")):
        env = os.environ | {"OFA_KEEP_MEMORY": value, "PYTHONPATH": str(Path(__file__).parents[2])}
        assert (
            subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == kept
        )
