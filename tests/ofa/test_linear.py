"""Linear quantization, calibration, equalization, rounding: against values computed by hand or by brute force."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from ofa.compress.adaround import adaptive_rounding, output_error, second_moments
from ofa.compress.affine import ActivationGrid, Grid, grid, on_grid, per_channel, without_grids
from ofa.compress.calibrate import observe
from ofa.compress.chain import Work
from ofa.compress.equalize import ChannelCap, Equalization, equalize, find_pairs, uncapped
from ofa.compress.fidelity import agreement, sqnr
from ofa.compress.fold import fold_batch_norms, unfolded
from ofa.compress.layers import layer_macs, weight_layers
from ofa.compress.linear import Linear, correct_bias, quantize_linear
from ofa.compress.operations import bit_operations, layer_bits
from ofa.compress.packed import pack, unpack
from ofa.compress.ranges import Histogram, divergence, entropy_threshold, limits, weight_limits
from ofa.data import digits
from ofa.errors import UserError
from ofa.evaluate import accuracy
from ofa.export.graph import onnx_model
from ofa.finetune import Finetuning
from ofa.liveness import peak_elements
from ofa.spec import NetSpec
from ofa.table import layer_macs as table_macs
from ofa.table import spec_table
from tests.ofa.nets import RESNET, SPEC, random_net


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return list(digits().calibration("val", 96, 16, batch_size=32))


def logits(net: nn.Module, images: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(x) for x in images])


# -- grids and ranges --------------------------------------------------------------------------------------------------


def test_grids_are_those_computed_by_hand() -> None:
    asymmetric = grid(torch.tensor(-1.0), torch.tensor(2.0), 2, symmetric=False)
    assert [float(value) for value in asymmetric] == [1, 1, 0, 3]
    x = torch.tensor([-9.0, -0.6, -0.4, 0.4, 1.4, 1.6, 9.0])
    assert on_grid(x, asymmetric).tolist() == [-1, -1, 0, 0, 1, 2, 2]
    symmetric = grid(torch.tensor(-1.0), torch.tensor(3.0), 3, symmetric=True)
    assert [float(value) for value in symmetric] == [1, 0, -3, 3]
    assert on_grid(torch.tensor([-9.0, -2.4, 2.6]), symmetric).tolist() == [-3, -2, 3]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_and_every_value_of_a_grid_stay(bits: int, symmetric: bool) -> None:
    g = grid(torch.tensor(-0.37), torch.tensor(1.21), bits, symmetric=symmetric)
    values = (torch.arange(g.least, g.most + 1) - g.zero) * g.scale
    assert 0 in values and torch.equal(on_grid(values, g), values)


def test_the_gradient_of_the_scale_is_that_of_learned_steps() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    x = torch.tensor([0.6, 9.0, -9.0], requires_grad=True)
    on_grid(x, Grid(scale, torch.tensor(0.0), -3, 3)).sum().backward()
    # Esser et al. 2020, eq. 3: round(x/s) - x/s = 1 - 1.2 inside, the bounds outside
    torch.testing.assert_close(scale.grad, torch.tensor(-0.2 + 3 - 3))
    assert x.grad.tolist() == [1, 0, 0]


def test_a_percentile_leaves_out_what_lies_beyond() -> None:
    counts = np.ones(100)
    assert limits(Histogram(0.0, 100.0, counts), "percentile", 8, percentile=90) == (0.0, 90.0)
    assert limits(Histogram(-50.0, 50.0, counts), "percentile", 8, percentile=90) == (-45.0, 45.0)
    assert limits(Histogram(-50.0, 50.0, counts), "minmax", 8) == (-50.0, 50.0)


def test_the_least_squared_error_is_found_by_brute_force() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 20000), [40.0]])
    counts, edges = np.histogram(values, 2048)
    found = limits(Histogram(edges[0], edges[-1], counts.astype(float)), "mse", 4, symmetric=True)

    def error(top: float) -> float:
        step = top / 7
        return float(((np.clip(np.rint(values / step), -7, 7) * step - values) ** 2).sum())

    tops = np.linspace(0.01, 1, 100) * 40
    best = tops[np.argmin([error(top) for top in tops])]
    assert abs(max(-found[0], found[1]) - best) <= 0.41 and error(best) < 0.2 * error(40.0)


def test_a_divergence_is_that_computed_by_hand() -> None:
    # Migacz 2017, slide 36, with 4 bins kept in 2 levels: (1 + 0) -> 1 in its one used bin, (2 + 3) -> 2.5 each
    p = np.array([1, 0, 2, 3 + 4]) / 10  # what is clipped lies in the last bin
    q = np.array([1, 0, 2.5, 2.5]) / 6
    expected = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a)
    assert divergence(np.array([1.0, 0, 2, 3, 4]), 4, 2) == pytest.approx(expected)
    assert divergence(np.array([1.0, 1, 2, 2, 0]), 4, 2) == pytest.approx(0)


def test_entropy_clips_outliers_and_keeps_an_even_spread() -> None:
    even = Histogram(0.0, 1.0, np.full(2048, 10.0))
    assert entropy_threshold(even, 128) == pytest.approx(1.0)
    spread = np.random.default_rng(0).exponential(1, 200_000)
    counts, _ = np.histogram(np.append(spread, 100.0), 2048, (0, 100))
    assert 3 < entropy_threshold(Histogram(0.0, 100.0, counts.astype(float)), 128) < 30


def test_weight_ranges_are_of_each_channel_or_of_all() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    assert [r.tolist() for r in weight_limits(weight, 8, "minmax", symmetric=True, channels=True)] == [
        [-2, 0.5],
        [1, 3],
    ]
    assert [r.tolist() for r in weight_limits(weight, 8, "minmax", symmetric=True, channels=False)] == [[-2], [3]]
    many = torch.cat([torch.randn(1, 5000), torch.full((1, 1), 30.0)], 1)
    _, high = weight_limits(many, 4, "mse", symmetric=True, channels=True)
    assert high < 30


def test_sqnr_and_agreement_are_those_computed_by_hand() -> None:
    a, b = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.5], [0.0, 0.0]])
    assert sqnr(a, b) == pytest.approx(20) and sqnr(a, a) == np.inf
    assert agreement(torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[2.0, 0], [1, 0]])) == 0.5


# -- rounding and biases -----------------------------------------------------------------------------------------------


def test_adaptive_rounding_is_never_worse_and_closes_half_of_the_gap_to_the_best_of_all() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(12, 6), torch.randn(64, 6) @ torch.randn(6, 6)
    moments = (x.T @ x / 64)[None]
    g = grid(per_channel(weight.amin(1), weight), per_channel(weight.amax(1), weight), 3, symmetric=True)
    ups = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)))
    every = ((weight / g.scale).floor()[:, None] + ups).clamp(g.least, g.most) * g.scale[:, None]
    best = output_error(every - weight[:, None], moments.expand(12, 6, 6)).amin(1)
    nearest = output_error((on_grid(weight, g) - weight)[None], moments)[0]
    found = output_error((adaptive_rounding(weight, g, moments) - weight)[None], moments)[0]
    assert (found <= nearest * 1.001).all() and (found >= best * 0.999).all()
    assert (found - best).sum() < 0.5 * (nearest - best).sum()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Conv2d(4, 6, (3, 5), padding="same", bias=False),
        nn.Conv2d(4, 6, 3, 2, padding=1, padding_mode="reflect", bias=False),
    ],
)
def test_second_moments_give_the_error_of_the_outputs(layer: nn.Conv2d) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4, 6, 6)  # fewer positions than are sampled
    moments = second_moments(layer, x, torch.Generator().manual_seed(0))
    change = torch.randn_like(layer.weight)
    layer.weight.data = change
    y = layer(x)
    error = output_error(change.reshape(moments.shape[0], -1, moments.shape[1]), moments).flatten()
    torch.testing.assert_close(error, y.square().mean((0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_corrected_bias_keeps_the_mean_of_the_outputs(groups: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 8, 1, groups=groups), torch.rand(16, 4, 5, 5) + 1
    before = layer(x).mean((0, 2, 3))
    change = 0.1 * torch.randn_like(layer.weight)
    layer.weight.data += change
    assert not torch.allclose(layer(x).mean((0, 2, 3)), before, atol=1e-3)
    correct_bias(layer, change, x.mean((0, 2, 3)))
    torch.testing.assert_close(layer(x).mean((0, 2, 3)), before, rtol=1e-4, atol=1e-5)


# -- equalization ------------------------------------------------------------------------------------------------------


def test_two_layers_are_equalized_as_computed_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    net[0].weight.data = torch.tensor([[8.0, -4.0], [0.5, 0.25]])
    net[0].bias.data = torch.tensor([2.0, 1.0])
    net[2].weight.data = torch.tensor([[0.5, 8.0]])
    x = torch.randn(20, 2)
    equal = equalize(net, Equalization())
    # ranges 8 and 0.5: s = sqrt(8 / 0.5) = 4, both become 2; ranges 0.5 and 8: s = 0.25, both become 2 (eq. 11)
    assert equal[0].weight.tolist() == [[2.0, -1.0], [2.0, 1.0]]
    assert equal[0].bias.tolist() == [0.5, 4.0] and equal[2].weight.tolist() == [[2.0, 2.0]]
    torch.testing.assert_close(equal(x), net(x))


@pytest.mark.parametrize("spec", [SPEC, RESNET])
def test_an_equalized_network_computes_the_same_and_its_ranges_are_alike(spec: object, images: list[Tensor]) -> None:
    net = random_net(spec)  # type: ignore[arg-type]
    equal = equalize(net, Equalization())
    torch.testing.assert_close(logits(equal, images), logits(net, images), rtol=1e-3, atol=1e-3)
    pairs, skipped = find_pairs(fold_batch_norms(net))
    for pair in pairs:
        first, second = equal.get_submodule(pair.first).weight, equal.get_submodule(pair.second).weight
        r1, depthwise = first.flatten(1).abs().amax(1), second.shape[1] == 1 != first.shape[0]
        r2 = second.transpose(0, 0 if depthwise else 1).flatten(1).abs().amax(1)
        torch.testing.assert_close(r1, r2, rtol=0.05, atol=0)
    if spec is SPEC:
        assert any("Hardswish" in reason for reason in skipped)
        assert Equalization(relu6="relu") and not any("units.4.depthwise" in reason for reason in skipped)


def test_an_equalized_network_is_written_as_onnx_with_a_cap_for_each_channel(images: list[Tensor]) -> None:
    equal = equalize(random_net(), Equalization())
    assert any(isinstance(module, ChannelCap) for module in equal.modules())
    session = onnxruntime.InferenceSession(onnx_model(equal, tuple(images[0].shape[1:])).SerializeToString())
    for batch in images:
        exact = logits(equal, [batch]).numpy()
        np.testing.assert_allclose(session.run(None, {"input": batch.numpy()})[0], exact, rtol=1e-4, atol=1e-4)


def test_caps_go_back_into_the_layers_around_them(images: list[Tensor]) -> None:
    net = random_net()
    equal = equalize(equalize(net, Equalization(rounds=1)), Equalization())
    plain = uncapped(equal)
    assert not any(isinstance(module, ChannelCap) for module in plain.modules()) and uncapped(plain) is plain
    torch.testing.assert_close(logits(plain, images), logits(net, images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(equal, images), logits(net, images), rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match=r"^1 clips each channel at a cap of its own.*; set step.equalize.relu6=relu"):
        uncapped(nn.Sequential(nn.Conv2d(1, 2, 1), ChannelCap(torch.ones(2, 1, 1)), nn.Hardswish()))


def test_relu6_of_a_flattened_map_keeps_its_layers_apart() -> None:
    layers = [nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU6(), nn.Linear(2, 2)]
    assert find_pairs(nn.Sequential(*layers))[1][0] == "0 (ReLU6)"
    layers[2:4] = layers[3:1:-1]
    assert [pair.relu6 for pair in find_pairs(nn.Sequential(*layers))[0]] == [("2",)]


class Again(nn.Module):
    """A convolution, or the ReLU6 behind it, that runs twice; and a layer that never does."""

    def __init__(self, *, conv: bool) -> None:
        super().__init__()
        self.first, self.second, self.third, self.spare = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.act, self.conv = nn.ReLU6(), conv

    def forward(self, x: Tensor) -> Tensor:
        again = self.first if self.conv else self.act
        found: Tensor = self.third(again(self.second(again(x))))
        return found


@pytest.mark.parametrize("conv", [True, False])
def test_layers_that_run_twice_are_not_equalized(conv: bool) -> None:
    pairs, skipped = find_pairs(Again(conv=conv))
    assert not pairs and "runs more than once" in skipped[0]
    several = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1, groups=8))
    assert find_pairs(several)[1][0] == "0 (groups or shape)", "two outputs a channel"


def test_a_layer_that_never_runs_may_stay_in_float() -> None:
    net, x = Again(conv=True).eval(), torch.randn(8, 4, 5, 5)
    with pytest.raises(UserError, match="layer spare was never used on the calibration images; keep it in float"):
        quantize_linear(net, Linear(), [x])
    kept = quantize_linear(net, Linear(layers={"spare": 32}, inputs={"spare": 32}), [x])
    assert not hasattr(kept.spare, "weight_scale") and hasattr(kept.first, "weight_scale")


def test_means_of_maps_with_channels_last_are_of_channels() -> None:
    x = torch.randn(4, 6, 5, 3) + torch.arange(3.0)
    seen = observe(nn.Sequential(layer := nn.Linear(3, 2)), {"0": layer}, [x])["0"]
    torch.testing.assert_close(seen.means, x.mean((0, 1, 2)))


def test_a_network_without_pairs_is_refused() -> None:
    with pytest.raises(UserError, match=r"no two layers can be equalized: 0 .Hardswish"):
        equalize(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Hardswish(), nn.Conv2d(2, 1, 1)), Equalization())


# -- whole networks ----------------------------------------------------------------------------------------------------


def test_a_quantized_layer_computes_what_whole_numbers_compute() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
    x = torch.rand(64, 3, 2, 2) * 3 - 1
    small = quantize_linear(net, Linear(), [x])
    weight = net[1].weight.detach().double().numpy()
    scale = np.abs(weight).max(1, keepdims=True) / 127
    step = (float(x.max()) - float(x.min())) / 255
    zero = np.rint(-float(x.min()) / step)
    q = np.clip(np.rint(x.flatten(1).double().numpy() / step) + zero, 0, 255) - zero
    whole = (q.astype(np.int64) @ np.rint(weight / scale).astype(np.int64).T) * step * scale[:, 0]
    expected = whole + np.rint(net[1].bias.detach().double().numpy() / (step * scale[:, 0])) * step * scale[:, 0]
    np.testing.assert_allclose(small(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_more_bits_are_closer_and_eight_are_close(images: list[Tensor]) -> None:
    net = random_net()
    exact = logits(net, images)
    found = [sqnr(exact, logits(quantize_linear(net, Linear(b, b), images), images)) for b in (2, 4, 6, 8)]
    assert found == sorted(found) and found[-1] > 15 and found[0] < 0


@pytest.mark.parametrize("options", [{"rounding": "adaptive"}, {"bias_correction": True, "per_channel": False}])
def test_what_costs_more_thought_is_closer(options: dict, images: list[Tensor]) -> None:
    net = random_net()
    exact, plain = logits(net, images), Linear(4, 32, per_channel=options.get("per_channel", True))
    before = sqnr(exact, logits(quantize_linear(net, plain, images), images))
    settings = Linear(4, 32, **options)
    assert sqnr(exact, logits(quantize_linear(net, settings, images), images)) > before + 1


def test_a_quantized_network_is_packed_as_whole_numbers_copied_pickled_and_counted(images: list[Tensor]) -> None:
    net = random_net()
    small = quantize_linear(net, Linear(4, 8, inputs={"units.0.*": 4}), images)
    exact = logits(small, images)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(logits(twin, images), exact)
    state = unpack(pack(small.state_dict()))[0]
    small.load_state_dict(state)
    assert torch.equal(logits(small, images), exact)
    assert len(pack(small.state_dict())) < 0.3 * len(pack(net.state_dict()))
    image = torch.zeros(1, 1, 16, 16)
    rows = layer_bits(small, image)
    assert {(r.weight_bits, r.input_bits) for r in rows} == {(4, 8), (4, 4)}
    macs = layer_macs(net, image)
    assert sum(macs.values()) == table_macs(spec_table(SPEC)).sum()
    assert bit_operations(small, image) == 4 * 8 * sum(macs.values()) - 4 * 4 * macs["units.0.conv"]


def test_accuracy_sees_the_quantized_inputs(images: list[Tensor]) -> None:
    data = digits()
    small = quantize_linear(random_net(), Linear(8, 2), images)
    x, y = next(data.batches("test", 200, 16, rng=None, limit=200))
    right = float((logits(small, [x]).argmax(1) == y).double().mean())
    assert accuracy(small, data, "test", resolution=16, limit=200) == pytest.approx(right)


@pytest.mark.parametrize("learned", [False, True])
def test_training_keeps_the_weights_on_their_grids_and_learned_steps_move(learned: bool, images: list[Tensor]) -> None:
    work = Work(digits(), 16)
    settings = Linear(3, 4, images=64, finetuning=Finetuning(epochs=0.1, lr=0.01), learned_steps=learned)
    before = quantize_linear(random_net(), settings, work.data.calibration("val", 64, 16, batch_size=64))
    after = settings(random_net(), work)
    assert after.state_dict().keys() == before.state_dict().keys()
    moved = False
    for name, layer in weight_layers(after).items():
        numbers = layer.weight / per_channel(layer.weight_scale, layer.weight)
        assert torch.allclose(numbers, numbers.round(), atol=1e-3) and numbers.abs().max() < 3.001
        old = before.get_submodule(name)
        moved |= not torch.equal(layer.weight_scale, old.weight_scale)
        moved |= not torch.equal(layer.input_grid.scale, old.input_grid.scale)
    assert moved == learned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 3.5}, "3.5 bits must be a whole number from 2 to 8, or 32"),
        ({"activation_bits": 1}, "1 bits"),
        ({"calibration": "max"}, "calibration 'max' is not known; choose from minmax, percentile, entropy, mse"),
        ({"weight_range": "entropy"}, "weight_range 'entropy' is not known"),
        ({"rounding": "up"}, "rounding 'up' is not known; choose from nearest, adaptive"),
        ({"images": 0}, "images 0"),
        ({"percentile": 20}, "percentile 20"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Linear(**options)


def test_what_cannot_be_quantized_is_named() -> None:
    with pytest.raises(UserError, match="only BatchNorm1d"):
        quantize_linear(nn.Sequential(nn.BatchNorm1d(3)), Linear(), [torch.randn(4, 3)])
    with pytest.raises(UserError, match="calibration got no images"):
        quantize_linear(nn.Sequential(nn.Linear(3, 3)), Linear(), [])
    unused = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UserError, match="never used"):
        observe(unused, {"0": nn.Linear(3, 3)}, [torch.randn(4, 3)])


def test_a_learned_activation_grid_is_trained() -> None:
    quantizer = ActivationGrid(0.0, 3.0, 2, symmetric=False)
    start = quantizer.scale
    del quantizer.scale
    quantizer.scale = nn.Parameter(start)
    quantizer(torch.rand(4, 5) * 9).sum().backward()
    assert quantizer.scale.grad > 0, "values are clipped: a larger step gives larger outputs"


def test_a_float_graph_says_that_it_leaves_grids_out(caplog: pytest.LogCaptureFixture) -> None:
    quantized = quantize_linear(random_net(), Linear(), [torch.randn(8, 1, 16, 16)])
    onnx_model(quantized, (1, 16, 16))
    assert "ONNX leaves out the grids of what 19 layers read: int8 runtimes calibrate their own" in caplog.text
    caplog.clear()
    onnx_model(without_grids(quantized), (1, 16, 16))
    assert not caplog.text


def test_a_simulated_grid_takes_no_memory_of_the_network() -> None:
    net, image = random_net(), torch.zeros(1, 1, 16, 16)
    quantized = Linear()(net, Work(digits(), 16))
    assert peak_elements(without_grids(quantized), image) == peak_elements(net, image) < peak_elements(quantized, image)


# -- batch norms given back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, RESNET])
def test_an_unfolded_network_is_its_specs_and_computes_the_same(spec: NetSpec, images: list[Tensor]) -> None:
    net = random_net(spec)
    for folded in (net, fold_batch_norms(net), quantize_linear(net, Linear(), images)):
        plain = unfolded(folded)
        assert plain is not None and str(plain) == str(net)
        torch.testing.assert_close(logits(plain, images), logits(without_grids(folded), images), rtol=0, atol=1e-3)
    other = quantize_linear(net, Linear(), images)
    weight_layers(other)["units.0.conv"].weight.data *= 1.01
    changed = unfolded(other)
    assert changed is not None
    assert not torch.allclose(logits(changed, images), logits(plain, images), atol=1e-3)  # type: ignore[arg-type]


def test_a_network_with_other_layers_than_its_specs_cannot_be_unfolded() -> None:
    net = random_net()
    assert unfolded(equalize(net, Equalization())) is None, "its ReLU6 clips each channel at its own cap"
    assert unfolded(nn.Sequential(nn.Flatten(), nn.Linear(256, 10))) is None
    wider = copy.deepcopy(net)
    wider.units[8] = nn.Linear(48, 12)
    assert unfolded(wider) is None
    biased = fold_batch_norms(net)
    correct_bias(weight_layers(biased)["units.7.conv"], torch.ones(48, 64, 1, 1), torch.ones(64))
    assert unfolded(biased) is None, "a convolution without batch norm has no place for it"
