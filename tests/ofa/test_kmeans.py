"""k-means codebooks and weights of a few levels, against values computed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as Reference
from torch import Tensor, nn

from ofa.compress.binary import Binary, XnorConv2d, bearing, clip_weights, scaled_binary, sign, ternary
from ofa.compress.binary import binary as plain_binary
from ofa.compress.chain import Work
from ofa.compress.fold import fold_batch_norms
from ofa.compress.kmeans import KMeans, Shared, bake, codebook, share
from ofa.compress.layers import weight_layers
from ofa.compress.operations import layer_bits, weight_bits
from ofa.compress.packed import pack
from ofa.compress.scales import Scales
from ofa.data import ImageData, digits
from ofa.errors import UserError
from ofa.export.graph import onnx_model
from ofa.extraction import recalibrate
from ofa.finetune import Finetuning
from tests.ofa.nets import random_net

BRIEF = Finetuning(epochs=0.1, lr=0.01)


@pytest.fixture(scope="module")
def work() -> Work:
    data: ImageData = digits()
    return Work(data, 16, teacher=random_net())


def test_the_codebook_is_that_of_the_deep_compression_figure() -> None:
    weights = np.array(
        [2.09, -0.98, 1.48, 0.09, 0.05, -0.14, -1.08, 2.12, -0.91, 1.92, 0.03, -1.03, 1.87, 0.03, 1.53, 1.49]
    )
    weights[10] = 0.04  # Han et al. 2016, fig. 3, whose weights of 0 would have an entry of their own
    entries, indices = codebook(weights, 4)
    np.testing.assert_allclose(entries, [-1.0, 0.014, 1.5, 2.0], atol=1e-9)
    assert indices.reshape(4, 4).tolist() == [[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]]


@pytest.mark.parametrize("start", ["linear", "density"])
def test_lloyd_ends_where_scikit_learns_does_from_the_same_start(start: str) -> None:
    weights = np.sort(np.random.default_rng(0).standard_normal(3000))
    first = (
        np.linspace(weights[0], weights[-1], 8) if start == "linear" else np.quantile(weights, (np.arange(8) + 0.5) / 8)
    )
    theirs = Reference(8, init=first[:, None], n_init=1, max_iter=100, tol=0).fit(weights[:, None])
    np.testing.assert_allclose(codebook(weights, 8, start)[0], np.sort(theirs.cluster_centers_[:, 0]), atol=1e-6)


@pytest.mark.parametrize("start", ["linear", "density", "random"])
def test_pruned_weights_keep_an_entry_of_their_own(start: str) -> None:
    weights = np.random.default_rng(0).standard_normal(1000)
    weights[::3] = 0
    entries, indices = codebook(weights, 4, start)
    assert len(entries) == 4 and np.array_equal(entries[indices] == 0, weights == 0)


def test_an_entry_moves_by_the_mean_of_what_its_weights_would_move_by() -> None:
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0, 3.0], [3.0, 3.0, 3.0]])
    share(layer, 1)
    gradient = torch.tensor([[0.1, 0.5, 1.0], [2.0, 3.0, 6.0]])
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    (layer.weight * gradient).sum().backward()
    entries = torch.tensor([1.0, 3.0])
    summed = torch.bincount(torch.tensor([0, 0, 1, 1, 1, 1]), layer.parametrizations.weight.original.grad.flatten())
    torch.testing.assert_close(summed.float(), torch.tensor([0.6, 12.0]))  # fig. 3: the sum over a cluster
    assert torch.equal(layer.weight.unique(), entries)
    optimizer.step()
    expected = torch.tensor([[1 - 0.03, 1 - 0.03, 3 - 0.3], [3 - 0.3] * 3])
    torch.testing.assert_close(layer.weight, expected)
    torch.testing.assert_close(bake(copy.deepcopy(layer)).weight, expected)


def test_the_entry_of_pruned_weights_is_not_trained_and_takes_no_other_weight() -> None:
    shared = Shared(torch.tensor([[0, 1], [1, 2]]), torch.tensor([-1.0, 0.0, 0.1]), zero=1)
    weight = torch.tensor([[-1.0, 5.0], [5.0, 0.01]], requires_grad=True)  # pruned ones have been trained away from 0
    found = shared(weight)
    assert torch.equal(found, torch.tensor([[-1.0, 0.0], [0.0, 0.1]]))
    found.sum().backward()
    assert shared.entries.grad is not None and shared.entries.grad.tolist() == [1.0, 0.0, 1.0]
    shared.assign(weight)
    assert shared.indices.tolist() == [[0, 1], [1, 2]]


def test_weights_that_training_moved_go_to_the_nearest_entry_which_stays() -> None:
    shared = Shared(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.5, 4.0]), zero=None)
    weight = torch.tensor([0.0, 0.0, 4.5, 3.0, 5.0])
    shared.assign(weight)
    assert shared.indices.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(shared(weight), torch.tensor([1.5, 1.5, 4.0, 4.0, 4.0]))


def test_entries_may_pass_one_another_and_an_empty_one_takes_weights_again() -> None:
    shared = Shared(torch.tensor([2, 2, 0, 0]), torch.tensor([8.0, 6.2, 3.5]), zero=None)
    shared.assign(torch.tensor([1.0, 6.0, 7.2, 9.0]))
    assert shared.indices.tolist() == [2, 1, 0, 0]
    shared(torch.zeros(4, requires_grad=True)).sum().backward()
    assert shared.entries.grad is not None and shared.entries.grad.tolist() == [1.0, 1.0, 1.0]


def test_a_scale_passes_from_weights_to_the_batch_norm_as_computed_by_hand(work: Work) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=1.0)).eval()
    net[0].weight.data.copy_(torch.tensor([8.0, 2.0]).view(2, 1, 1, 1))  # the geometric mean is 4: divided by 2 and 1/2
    net[0].bias.data.copy_(torch.tensor([6.0, 3.0]))
    net[1].running_mean.copy_(torch.tensor([2.0, 1.0]))
    net[1].running_var.copy_(torch.tensor([11.0, 5.0]))
    leveled = Scales()(net, work)
    conv: Any
    norm: Any
    conv, norm = leveled.children()
    assert (conv.weight.flatten().tolist(), conv.bias.tolist()) == ([4.0, 4.0], [3.0, 6.0])
    assert (norm.running_mean.tolist(), norm.running_var.tolist()) == ([1.0, 2.0], [2.0, 23.0])  # (11 + 1) / 4 - 1
    x = torch.randn(4, 1, 3, 3)
    torch.testing.assert_close(leveled(x), net(x))
    assert net[0].weight.flatten().tolist() == [8.0, 2.0], "the network itself is left as it is"


def test_channels_of_one_scale_compute_the_same_and_lose_less_to_a_codebook(work: Work) -> None:
    net, x = random_net(), torch.randn(32, 1, 16, 16)
    depthwise = net.units[3].depthwise.conv.weight
    with torch.no_grad():
        depthwise.mul_(torch.logspace(-2, 2, len(depthwise)).view(-1, 1, 1, 1))
        depthwise[0] = 0
        recalibrate(net, [x])
        leveled = Scales()(net, work)
        y, found = net(x), leveled(x)
        torch.testing.assert_close(found, y, rtol=1e-3, atol=1e-4 * y.abs().max().item())
        squares = leveled.units[3].depthwise.conv.weight[1:].square().flatten(1).mean(1)
        assert squares.max() / squares.min() < 1.01
        few = KMeans(2, {"units.3.depthwise.conv": 2, "*": 32})
        losses = [(few(one, work)(x) - y).norm() / y.norm() for one in (net, leveled)]
    assert losses[1] < 0.7 * losses[0]


class Twice(nn.Module):
    """A convolution that two batch norms read, in two runs of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.last, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.last(self.second(self.conv(self.first(self.conv(x))))))


@pytest.mark.parametrize("change", [fold_batch_norms, lambda net: Scales()(net, cast(Work, None))])
def test_a_convolution_that_runs_twice_keeps_its_batch_norms(change: Callable[[nn.Module], nn.Module]) -> None:
    net, x = Twice(), torch.randn(16, 4, 3, 3)
    recalibrate(net, [2 * x + 1])
    changed = change(net.eval())
    torch.testing.assert_close(changed(x), net(x))
    assert torch.equal(changed.conv.weight, net.conv.weight)
    assert not torch.equal(changed.last.weight, net.last.weight)


def test_scales_without_a_batch_norm_are_refused(work: Work) -> None:
    with pytest.raises(UserError, match="no convolution has a batch norm behind it"):
        Scales()(nn.Sequential(nn.Conv2d(1, 2, 1)), work)


@pytest.mark.parametrize("renewed", [True, False])
def test_training_renews_assignments_only_if_asked(renewed: bool, work: Work) -> None:
    start = KMeans(2)(random_net(), work)
    trained = KMeans(2, reassign=renewed, finetuning=replace(BRIEF, lr=0.1))(random_net(), work)
    pairs = [
        (a.weight, b.weight)
        for a, b in zip(weight_layers(start).values(), weight_layers(trained).values(), strict=True)
    ]
    same = [torch.equal(a.unique(return_inverse=True)[1], b.unique(return_inverse=True)[1]) for a, b in pairs]
    assert all(len(b.unique()) <= 4 for _, b in pairs)
    assert not any(torch.equal(a, b) for a, b in pairs), "all codebooks were trained"
    assert all(same) != renewed


def test_weights_of_a_sparse_layer_are_32_bits_unless_they_share_values() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(48, 48, 1)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < 0.05)
    assert weight_bits(layer) == 32 and len(layer.weight.unique()) <= 256
    with torch.no_grad():
        layer.weight.copy_((16 * layer.weight).round())
    assert weight_bits(layer) <= 3
    with torch.no_grad():
        layer.weight.zero_()
    assert weight_bits(layer) == 1


def test_a_network_has_at_most_the_values_asked_for_after_training_and_a_small_file(work: Work) -> None:
    net = random_net()
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net.units[5].conv.weight.mul_(torch.rand_like(net.units[5].conv.weight) > 0.5)
    step = KMeans(3, {"units.0.*": 8, "units.8": 32}, finetuning=BRIEF)
    small = step(net, work)
    layers = weight_layers(small)
    bits = {name: weight_bits(layer) for name, layer in layers.items()}
    assert bits.pop("units.8") == 32 and bits.pop("units.0.conv") >= 7 and max(bits.values()) <= 3
    assert torch.equal(small.units[5].conv.weight == 0, net.units[5].conv.weight == 0)
    assert not torch.equal(small.units[2].expand.bn.weight, before["units.2.expand.bn.weight"]), "it was trained"
    assert torch.equal(net.units[2].expand.conv.weight, before["units.2.expand.conv.weight"]), "the original was not"
    assert len(pack(small.state_dict())) < 0.3 * len(pack(before))
    assert list(small.state_dict()) == list(before), "names keep their order, which exporters go by"
    assert onnx_model(small, (1, 16, 16)).graph.node


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3.5}, r"3.5 bits must be a whole number from 1 to 8"),
        ({"bits": 9}, r"9 bits"),
        ({"layers": {"a": 0}}, r"0 bits"),
        ({"start": "forgy"}, r"start 'forgy' is not known; choose from linear, density, random"),
    ],
)
def test_impossible_codebooks_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        KMeans(**options)


def test_a_pattern_that_matches_nothing_lists_the_layers(work: Work) -> None:
    with pytest.raises(UserError, match=r"'stem', which matches no layer; the layers are units.0.conv"):
        KMeans(layers={"unit*": 8, "stem": 4})(random_net(), work)


# -- few levels --------------------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([[0.5, -1.5], [0.1, -0.3]])


def test_levels_are_those_computed_by_hand() -> None:
    torch.testing.assert_close(plain_binary(WEIGHT), torch.tensor([[0.6, -0.6], [0.6, -0.6]]))
    torch.testing.assert_close(scaled_binary(WEIGHT), torch.tensor([[1.0, -1.0], [0.2, -0.2]]))
    # threshold 0.7 x 0.6 = 0.42: 0.5 and 1.5 stay, whose mean is 1
    torch.testing.assert_close(ternary(WEIGHT), torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


def test_the_gradient_of_a_sign_stops_beyond_one() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True)
    y = sign(x)
    y.sum().backward()
    assert y.tolist() == [-1, -1, 1, 1, 1] and x.grad.tolist() == [0, 1, 1, 1, 0]


def test_an_xnor_convolution_is_the_product_of_signs_and_means() -> None:
    conv = nn.Conv2d(2, 1, 2, bias=False)
    layer = XnorConv2d(conv).eval()  # its batch norm changes nothing but eps
    layer.norm.eps = 0.0
    layer.weight.data = scaled_binary(torch.tensor([[[[1.0, -2.0], [3.0, 2.0]], [[1.0, 1.0], [-1.0, 5.0]]]]))
    x = torch.tensor([[[[1.0, -3.0], [2.0, 0.5]], [[-1.0, 1.0], [2.0, 0.5]]]])
    signs = (1 + 1 + 1 + 1) + (-1 + 1 - 1 + 1)  # of products, pixel by pixel
    k = (1 + 2 + 2 + 0.5) / 4  # mean magnitudes of both channels
    torch.testing.assert_close(layer(x), torch.tensor([[[[signs * k * 2.0]]]]))


@pytest.mark.parametrize(("kind", "values"), [("binary", 2), ("ternary", 3), ("scaled", 2), ("xnor", 2)])
def test_layers_end_with_few_levels_and_the_first_and_last_stay(kind: str, values: int, work: Work) -> None:
    small = Binary(kind, finetuning=BRIEF)(random_net(), work)
    names = set(bearing(random_net()))
    assert not names & {"units.0.conv", "units.8", "units.1.depthwise.conv", "units.2.se.reduce"}
    for name, layer in weight_layers(small).items():
        if name in names:
            assert all(len(row.unique()) <= values for row in layer.weight.flatten(1))
    found = {(row.weight_bits, row.input_bits) for row in layer_bits(small, torch.zeros(1, 1, 16, 16))}
    assert (2 if kind == "ternary" else 1, 1 if kind == "xnor" else 32) in found and (32, 32) in found


def test_ternary_weights_that_were_pruned_stay_zero(work: Work) -> None:
    net = random_net()
    pruned = {name: torch.arange(m.weight.numel()).view_as(m.weight) % 3 == 0 for name, m in weight_layers(net).items()}
    for name, layer in weight_layers(net).items():
        layer.weight.data[pruned[name]] = 0
    small = Binary("ternary", finetuning=BRIEF)(net, work)
    for name, layer in weight_layers(small).items():
        assert not layer.weight[pruned[name]].any(), name


def test_trained_weights_are_clipped_at_one() -> None:
    layer = nn.Linear(4, 4)
    share(layer, 2)
    layer.parametrizations.weight.original.data.fill_(9.0)
    clip_weights(layer)
    assert layer.parametrizations.weight.original.max() == 1


def test_unknown_kinds_and_networks_without_a_layer_for_them_are_refused() -> None:
    with pytest.raises(UserError, match="kind 'quaternary' is not known; choose from binary"):
        Binary("quaternary")
    with pytest.raises(UserError, match="no layer bears binary weights"):
        bearing(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Linear(2, 2)))
