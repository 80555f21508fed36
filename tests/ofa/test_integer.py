"""Integer arithmetic against exact fractions, operators against hand-computed numbers, networks against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ofa.compress.affine import without_grids
from ofa.compress.equalize import ChannelCap, Equalization, equalize
from ofa.compress.linear import Linear, quantize_linear
from ofa.data import digits
from ofa.errors import UserError
from ofa.export.onnx import compare, run_torch
from ofa.integer import tables
from ofa.integer.convert import affine, from_net, record_ranges
from ofa.integer.factors import FREE, add_factors, limits, mean_factor, mul_factor
from ofa.integer.fixed import clamp, quantize_multiplier, rescale
from ofa.integer.net import Add, Conv, Depthwise, IntegerNet, Lookup, MaxPool, Mean, Mul, Op, Pool, Tensor
from ofa.integer.run import quantize_images, run, run_all, run_float
from ofa.modules import SqueezeExcite
from tests.ofa.nets import RESNET, SPEC, random_net

HALF = Fraction(1, 2)


@given(st.floats(2.0**-30, 2.0**29))
def test_a_multiplier_is_the_nearest_of_31_bits(real: float) -> None:
    multiplier, shift = (int(v) for v in quantize_multiplier(real))
    assert 2**30 <= multiplier < 2**31
    assert abs(Fraction(multiplier) * Fraction(2) ** (shift - 31) / Fraction(real) - 1) <= Fraction(1, 2**31)


@given(st.integers(-(2**30), 2**30), st.integers(2**30, 2**31 - 1), st.integers(-31, 0))
def test_rescaling_rounds_the_exact_product_twice(acc: int, multiplier: int, shift: int) -> None:
    high = floor(Fraction(acc * multiplier, 2**31) + HALF)
    size = floor(Fraction(abs(high), 2**-shift) + HALF)
    found = int(rescale(acc, multiplier, shift))
    assert found == (size if high >= 0 else -size)
    assert abs(found - Fraction(acc * multiplier) / 2 ** (31 - shift)) <= HALF + Fraction(1, 2 ** (1 - shift))


@given(st.integers(-(2**30), 2**30), st.integers(2**30, 2**31 - 1), st.integers(1, 30))
def test_rescaling_upwards_is_exact_until_it_is_held(acc: int, multiplier: int, shift: int) -> None:
    held = max(-(2**30), min(2**30, acc * 2**shift))
    assert int(rescale(acc, multiplier, shift)) == floor(Fraction(held * multiplier, 2**31) + HALF)


def test_rescaling_by_hand() -> None:
    half = quantize_multiplier(0.5)
    assert [int(part) for part in half] == [2**30, 0]
    assert rescale([3, -3, 5, -5], *half).tolist() == [2, -1, 3, -2]  # halves up in the first rounding
    quarter = quantize_multiplier(0.25)
    assert rescale([2, -2, 6, 7], *quarter).tolist() == [1, -1, 2, 2]  # -2 -> -1 -> -1: halves away from 0; 7 -> 4 -> 2
    assert [int(part) for part in quantize_multiplier(0.0)] == [0, 0]
    assert int(rescale(2**30, *quantize_multiplier(2.0**-33))) == 0


@pytest.mark.parametrize("real", [-1.0, float("nan"), float("inf"), 2.0**31])
def test_impossible_factors_are_refused(real: float) -> None:
    with pytest.raises(UserError, match=r"not in 0\.\.2\^30"):
        quantize_multiplier(real)


# -- operators ---------------------------------------------------------------------------------------------------------


def one(op: Op, *tensors: Tensor) -> IntegerNet:
    """A network of one operator: input, output, other tensors."""
    return IntegerNet(tensors, (op,), 0, 1)


def unit(*shape: int, scale: float = 1.0, zero: int = 0) -> Tensor:
    return Tensor("t", shape, scale, zero)  # type: ignore[arg-type]


def filters(weight: Any, bias: Any, factor: float) -> dict[str, Any]:
    weight = np.array(weight, np.int8)
    multiplier, shift = quantize_multiplier(np.full(len(weight), factor))
    return {"weight": weight, "bias": np.array(bias, np.int32), "multiplier": multiplier, "shift": shift}


def test_a_convolution_by_hand() -> None:
    """2x2 pixels of one channel under 3x3 ones with a ring of padding: every output sums all four."""
    net = one(
        Conv(y=1, **FREE, x=0, pad=(1, 1), **filters(np.ones((1, 3, 3, 1)), [10], 0.5)),
        unit(2, 2, 1, zero=5),
        unit(2, 2, 1, zero=-3),
    )
    image = np.array([[6, 7], [8, 9]], np.int8)[None, ..., None]  # 1, 2, 3, 4 above the zero point
    assert run(net, image).tolist() == [[7] * 4]  # (1 + 2 + 3 + 4 + 10) / 2 - 3


def test_a_stride_and_uneven_padding_by_hand() -> None:
    net = one(Conv(y=1, **FREE, x=0, stride=(2, 1), **filters([[[[1], [10]]]], [0], 1.0)), unit(3, 3, 1), unit(2, 2, 1))
    image = np.arange(1, 10, dtype=np.int8).reshape(1, 3, 3, 1)
    assert run(net, image).tolist() == [[21, 32, 87, 98]]
    late = Conv(**vars(net.ops[0]) | {"pad": (0, 1)})
    assert run(one(late, *net.tensors), image).tolist() == [[10, 21, 70, 87]]


def test_a_depthwise_convolution_keeps_channels_apart() -> None:
    weight = np.array([np.ones((3, 3)), np.diag([0, 2, 0])])
    net = one(Depthwise(y=1, **FREE, x=0, pad=(1, 1), **filters(weight, [0, 1], 1.0)), unit(2, 2, 2), unit(2, 2, 2))
    image = np.array([[[1, 5], [2, 6]], [[3, 7], [4, 8]]], np.int8)[None]
    assert run(net, image).reshape(4, 2).tolist() == [[10, 11], [10, 13], [10, 15], [10, 17]]


def test_sums_products_and_means_by_hand() -> None:
    a, b, y = unit(1, 2, 2, scale=0.5), unit(1, 2, 2, scale=0.25, zero=4), unit(1, 2, 2, scale=0.5, zero=1)
    multiplier, shift = add_factors(a, b, y)
    table = Lookup(y=2, **FREE, x=0, table=np.arange(-128, 128).astype(np.int8))
    add = Add(y=1, **FREE, a=0, b=2, multiplier=multiplier, shift=shift)
    image = np.array([[[8, 4], [-10, 100]]], np.int8)[None]
    net = IntegerNet((a, y, b), (table, add), 0, 1)
    # 4 + 1 = 5, 2 + 0, -5 - 3.5, 50 + 24, halves of it plus 1
    assert run(net, image).tolist() == [[11, 5, -16, 127]]
    mul = Mul(y=1, **FREE, a=0, b=2, **mul_factor(a, b, y))
    assert run(IntegerNet((a, y, b), (table, mul), 0, 1), image).tolist() == [[9, 1, 36, 127]]
    x, mean = unit(2, 2, 1, scale=0.5, zero=1), unit(1, 1, 1, scale=0.25, zero=-2)
    net = one(Mean(y=1, **FREE, x=0, **mean_factor(x, mean, 4)), x, mean)
    assert run(net, np.array([3, 5, 7, 9], np.int8).reshape(1, 2, 2, 1)).tolist() == [[8]]  # 5 -> 2.5 -> 10 - 2


def test_pools_leave_padding_out_and_round_away_from_zero() -> None:
    image = np.array([[1, 2, 4], [-4, -5, 0], [7, 8, 9]], np.int8)[None, ..., None]
    average = Pool(y=1, **FREE, x=0, kernel=(2, 2), stride=(2, 2))
    assert run(one(average, unit(3, 3, 1), unit(2, 2, 1)), image).tolist() == [[-2, 2, 8, 9]]  # -6/4, 4/2, 15/2, 9
    largest = MaxPool(y=1, **FREE, x=0, kernel=(3, 3), stride=(2, 2), pad=(1, 1))
    assert run(one(largest, unit(3, 3, 1), unit(2, 2, 1)), image).tolist() == [[2, 4, 8, 9]]
    below = (image - 20).astype(np.int8)
    assert run(one(largest, unit(3, 3, 1), unit(2, 2, 1)), below).max() == -11


def test_tables_follow_their_functions() -> None:
    x, y = unit(1, 1, 1, scale=0.05, zero=7), unit(1, 1, 1, scale=0.04, zero=-110)
    real = (np.arange(-128, 128) - 7) * 0.05
    swish = real * np.clip(real + 3, 0, 6) / 6 / 0.04 - 110
    exact, lite = tables.tabulate(tables.hard_swish, x, y), tables.lite_hard_swish(x, y)
    inside = np.abs(swish) < 127
    assert np.abs(exact - swish)[inside].max() <= 0.5 + 1e-5
    assert np.abs(lite - swish)[inside].max() <= 1.5
    gate = unit(1, 1, 1, scale=1 / 256, zero=-128)
    assert np.abs(tables.tabulate(tables.logistic, x, gate) - (256 / (1 + np.exp(-real)) - 128)).max() <= 0.51
    assert np.abs(tables.requantize(x, y) - np.clip(real / 0.04 - 110, -128, 127)).max() <= 1
    with pytest.raises(UserError, match="LiteRT refuses it"):
        tables.lite_hard_swish(unit(1, 1, 1, scale=1.0), unit(1, 1, 1, scale=1 / 200))


def test_a_fused_relu6_is_a_clamp() -> None:
    assert limits("relu6", unit(1, 1, 1, scale=0.1, zero=-100)) == {"low": -100, "high": -40}
    assert limits("relu", unit(1, 1, 1, scale=0.1, zero=-100)) == {"low": -100, "high": 127}
    assert clamp(np.array([-200, 5, 200]), -100, 100).tolist() == [-100, 5, 100]


def test_networks_that_make_no_sense_are_refused() -> None:
    conv = Conv(y=1, **FREE, x=0, **filters(np.ones((1, 1, 1, 2)), [0], 1.0))
    with pytest.raises(UserError, match="Conv cannot make t of shape"):
        one(conv, unit(2, 2, 3), unit(2, 2, 1))
    with pytest.raises(UserError, match="read before written"):
        IntegerNet((unit(2, 2, 2), unit(2, 2, 1), unit(2, 2, 2)), (replace(conv, x=2),), 0, 1)
    with pytest.raises(UserError, match="written twice"):
        IntegerNet((unit(2, 2, 2), unit(2, 2, 1)), (conv, conv), 0, 1)
    with pytest.raises(UserError, match=r"may pass 2\^30"):
        Conv(y=1, **FREE, x=0, **filters(np.full((1, 1, 1, 40000), 127), [0], 1.0))
    for bad in ({"scale": 0.0}, {"scale": float("nan")}, {"zero": 200}, {"shape": (1, 1)}):
        with pytest.raises(UserError, match="tensor t has"):
            replace(unit(1, 1, 1), **bad)
    with pytest.raises(UserError, match="this network takes int8"):
        run(one(conv, unit(2, 2, 2), unit(2, 2, 1)), np.zeros((1, 2, 2, 2), np.float32))  # type: ignore[arg-type]


# -- from PyTorch ------------------------------------------------------------------------------------------------------


def test_scale_and_zero_point_reach_both_ends_and_hold_zero() -> None:
    for low, high in ((-1.0, 3.0), (2.0, 5.0), (-5.0, -2.0), (0.0, 0.0)):
        scale, zero = affine(low, high)
        assert (0 - zero + 127) * scale >= max(high, 0) - scale and (-128 - zero) * scale <= min(low, 0) + scale
        assert -128 <= zero <= 127


@pytest.mark.parametrize("spec", [SPEC, RESNET])
def test_a_quantized_network_follows_the_float_one_on_real_images(spec: Any) -> None:
    images = next(digits().batches("test", 100, spec.resolution, rng=None))[0]
    net = random_net(spec)
    quantized = from_net(net, images.split(50))
    logits, reference = run_float(quantized, images.numpy()), run_torch(net, images)
    parity = compare(logits, reference)
    assert parity.sqnr_db > 13 and parity.agreement > 0.85
    first = vars(quantized.ops[0])
    broken = Conv(**first | {"shift": first["shift"] - 1})
    worse = run_float(replace(quantized, ops=(broken, *quantized.ops[1:])), images.numpy())
    assert compare(worse, reference).sqnr_db < parity.sqnr_db - 1


def test_an_equalized_network_with_a_cap_for_each_channel_follows_the_first() -> None:
    data = digits()
    images = next(data.batches("test", 256, 16, rng=None))[0]
    batches = list(data.calibration("val", 256, 16))
    net = random_net()
    equal, reference = equalize(net, Equalization()), run_torch(net, images)
    integer = from_net(equal, batches)
    assert {tensor.name for tensor in integer.tensors} <= set(record_ranges(equal, batches))
    parity = compare(run_float(integer, images.numpy()), reference)
    assert parity.sqnr_db > 13 and parity.agreement > 0.88
    for module in equal.modules():
        if isinstance(module, ChannelCap):
            module.caps *= 0.5
    assert compare(run_float(from_net(equal, batches), images.numpy()), reference).sqnr_db < parity.sqnr_db - 1


def test_every_tensor_is_near_what_pytorch_has_there() -> None:
    net, images = random_net(RESNET), torch.rand(32, 1, 16, 16)
    quantized, seen = from_net(net, [images]), {}
    hooks = {"units_0_act": net.units[0].act, "units_3_conv1_act": net.units[3].conv1.act, "units_2": net.units[2]}
    for name, module in hooks.items():
        module.register_forward_hook(lambda m, args, y, name=name: seen.update({name: y.detach()}))
    net(images)
    maps = run_all(quantized, quantize_images(quantized, images.numpy()))
    for i, tensor in enumerate(quantized.tensors):
        if tensor.name in hooks:
            real = (maps[i].astype(float) - tensor.zero) * tensor.scale
            error = np.abs(real - seen[tensor.name].permute(0, 2, 3, 1).numpy())
            assert error.max() < 12 * tensor.scale and error.mean() < 2 * tensor.scale, tensor.name
    assert len(seen) == len(hooks) <= sum(tensor.name in hooks for tensor in quantized.tensors)


def test_given_ranges_replace_those_seen() -> None:
    net, images = random_net(), torch.randn(16, 1, 16, 16)
    name = "units_0_bn"
    assert record_ranges(net, [images])[name][1] != 9.2
    tensor = next(t for t in from_net(net, [images], ranges={name: (-1.0, 9.2)}).tensors if t.name == name)
    assert tensor.scale == pytest.approx(10.2 / 255) and tensor.zero == -128 + 25
    with pytest.raises(UserError, match=r"ranges name .*'nothing'"):
        from_net(net, [images], ranges={"nothing": (0.0, 1.0)})


def test_a_dead_channel_keeps_its_bias() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1)).eval()
    nn.init.constant_(net[0].weight, 0.0)
    nn.init.constant_(net[0].bias, 0.7)
    logits = run_float(from_net(net, [torch.rand(4, 1, 1, 1)]), np.zeros((1, 1, 1, 1), np.float32))
    assert logits == pytest.approx(np.full((1, 2), 0.7), abs=0.01)


def test_a_flattened_map_keeps_pytorchs_order() -> None:
    torch.manual_seed(0)
    images, flat = torch.randn(64, 1, 6, 6), nn.Flatten()
    for between in ([nn.ReLU(), flat], [flat], [flat, nn.ReLU()], [flat, nn.Hardswish()], [nn.Hardswish(), flat]):
        net = nn.Sequential(nn.Conv2d(1, 3, 3), *between, nn.Linear(3 * 4 * 4, 5)).eval()
        assert compare(run_float(from_net(net, [images]), images.numpy()), run_torch(net, images)).sqnr_db > 25  # type: ignore[arg-type]


def test_what_is_called_by_keywords_has_an_integer_form() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(1, 4, 3), nn.MaxPool2d(2, dilation=(1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.flatten(input=self.pool(self.conv(input=x)), start_dim=1)

    net, images = Keywords().eval(), torch.randn(16, 1, 6, 6)
    plain = nn.Sequential(net.conv, nn.MaxPool2d(2), nn.Flatten()).eval()
    found, wanted = (run_float(from_net(one, [images]), images.numpy()) for one in (net, plain))
    np.testing.assert_array_equal(found, wanted)


def test_the_integer_form_says_that_it_leaves_grids_out(caplog: pytest.LogCaptureFixture) -> None:
    images = torch.randn(16, 1, 16, 16)
    net = quantize_linear(random_net(), Linear(activation_bits=3), [images])
    found, wanted = (run_float(from_net(one, [images]), images.numpy()) for one in (net, without_grids(net)))
    assert "the integer form leaves out the grids of what 19 layers read" in caplog.text
    np.testing.assert_array_equal(found, wanted)


def test_a_gate_that_was_closed_on_every_image_can_be_quantized() -> None:
    net, images = random_net(), torch.randn(32, 1, 16, 16)
    for module in net.modules():
        if isinstance(module, SqueezeExcite):
            nn.init.constant_(module.reduce.bias, -100.0)  # type: ignore[arg-type]
    assert compare(run_float(from_net(net, [images]), images.numpy()), run_torch(net, images)).sqnr_db > 13


@pytest.mark.parametrize("function", [lambda x: x + 1, lambda x: 2 * x])
def test_a_sum_or_product_with_a_number_is_named(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Numbered(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    with pytest.raises(UserError, match=r"(add|mul) has a number among .*two maps"):
        from_net(Numbered().eval(), [torch.rand(2, 1, 4, 4)])


def test_a_relu_whose_input_is_read_twice_is_not_fused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y + self.act(y)

    torch.manual_seed(0)
    net, images = Twice().eval(), torch.randn(16, 1, 5, 5)
    quantized = from_net(net, [images])
    assert [type(op) for op in quantized.ops] == [Conv, Lookup, Add]
    want = net(images).detach().permute(0, 2, 3, 1).reshape(16, -1).numpy()
    assert np.abs(run_float(quantized, images.numpy()) - want).max() < 0.05


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Sequential(nn.Conv2d(2, 4, 1, groups=2), nn.Tanh()), "groups 2|2 groups"),
        (nn.Sequential(nn.Tanh()), "is a Tanh, which has no integer form"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, dilation=2, padding=2)), "is dilated"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2)), "only global pools"),
        (nn.Sequential(nn.AvgPool2d(2, padding=1)), "averages over padding"),
        (nn.Sequential(nn.MaxPool2d(2, dilation=(1, 2))), "dilates"),
        (nn.Sequential(nn.Conv2d(2, 2, (3, 1), padding=1)), r"_0 pads windows of \(3, 1\) by \(1, 1\); pad by less"),
    ],
)
def test_modules_without_an_integer_form_are_named(module: nn.Module, words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_net(module.eval(), [torch.rand(2, 2, 4, 4)])


def test_calibration_needs_images_and_finite_numbers() -> None:
    with pytest.raises(UserError, match="no calibration images"):
        from_net(random_net(), [])
    with pytest.raises(UserError, match="is not finite"):
        from_net(random_net(), [torch.full((1, 1, 16, 16), float("nan"))])


def test_a_dead_filter_leaves_room_for_its_bias() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        net[0].weight[1] *= 1e-9
        net[0].weight[2] = 0
        net[0].bias.copy_(torch.tensor([0.1, -0.7, 0.5, 0.0]))
    images = torch.rand(8, 3, 5, 5)
    made = from_net(net, [images])
    exact = np.asarray(run_torch(net, images))
    scale = float(made.tensors[made.ops[-1].y].scale)
    np.testing.assert_allclose(run_float(made, images.numpy()).reshape(exact.shape), exact, atol=2 * scale)
