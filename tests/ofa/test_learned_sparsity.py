"""Sparsity that training finds: movement, soft filters, gates; each against its formula."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ofa.compress.chain import Work
from ofa.compress.channels import Channels
from ofa.compress.gating import Gated, GatedMacs, Gating, gated_macs
from ofa.compress.layers import weight_layers
from ofa.compress.magnitude import Magnitude
from ofa.compress.movement import Movement, Scored, SoftFilter, zero_filters
from ofa.data import digits
from ofa.errors import UserError
from ofa.export.graph import onnx_model
from ofa.export.onnx import run_onnx, run_torch
from ofa.files import atomic_write
from ofa.finetune import Finetuning
from ofa.static import StaticNet
from tests.ofa.nets import random_net

SHORT = Finetuning(epochs=0.5)


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(digits(), resolution=16)


def test_a_score_sums_up_minus_gradient_times_weight() -> None:
    weight, scored = torch.tensor([[1.0, -2.0, 3.0, 0.5]], requires_grad=True), Scored(torch.empty(1, 4))
    scored.sparsity = 0.5
    scored.scores.data.copy_(torch.tensor([[0.2, 0.1, -1.0, 0.3]]))
    out = scored(weight)
    assert out.tolist() == [[1.0, 0.0, 0.0, 0.5]], "the two of least score are zero, whatever their size"
    gradient = torch.tensor([[0.5, -1.0, 2.0, 4.0]])
    out.backward(gradient)
    assert scored.scores.grad is not None and weight.grad is not None
    assert scored.scores.grad.tolist() == [[0.5, 2.0, 6.0, 2.0]], "a pruned weight's score is learned too"
    assert weight.grad.tolist() == [[0.5, 0.0, 0.0, 4.0]]


def test_movement_leaves_ordinary_weights_of_the_size(work: Work, tmp_path: Path) -> None:
    net = random_net()
    pruned = Movement(0.3, finetuning=Finetuning(epochs=1))(net, work)
    tensors = list(pruned.parameters())
    assert sum(int(t.count_nonzero()) for t in tensors) / sum(t.numel() for t in tensors) == pytest.approx(
        0.3, abs=0.01
    )
    assert list(pruned.state_dict()) == list(net.state_dict()), "exporters go by the order"
    assert type(pruned.units[8]) is nn.Linear  # type: ignore
    copy.deepcopy(pruned)
    layer = pruned.get_submodule("units.5.conv").weight  # type: ignore[union-attr]
    original = net.get_submodule("units.5.conv").weight  # type: ignore[union-attr]
    smallest = original.abs().flatten().argsort()[: int((layer == 0).sum())]  # type: ignore[union-attr, operator]
    assert (layer.flatten()[smallest] != 0).any(), "not merely the smallest ones go"  # type: ignore[operator, union-attr]
    atomic_write(tmp_path / "net.onnx", onnx_model(pruned, (1, 16, 16)).SerializeToString())
    images = next(work.data.batches("test", 16, 16, rng=None))[0]
    np.testing.assert_allclose(run_onnx(tmp_path / "net.onnx", images), run_torch(pruned, images), atol=1e-4)  # type: ignore


def test_movement_counts_the_zeros_that_are_there(work: Work) -> None:
    sparse = Magnitude(0.35, allocation="uniform", finetuning=Finetuning(epochs=0))(random_net(), work)
    moved = Movement(0.3, finetuning=Finetuning(epochs=1))(sparse, work)
    total = sum(t.numel() for t in moved.parameters())
    assert sum(int(t.count_nonzero()) for t in moved.parameters()) / total == pytest.approx(0.3, abs=0.01)
    for before, after in zip(weight_layers(sparse).values(), weight_layers(moved).values(), strict=True):
        assert not after.weight[before.weight == 0].any()


def test_the_weakest_filters_are_zero_and_channels_removes_them_first(work: Work) -> None:
    layer = nn.Conv2d(1, 4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([3.0, -1.0, 2.0, -4.0]).view(4, 1, 1, 1))
    zero_filters(nn.Sequential(layer), ["0"], 0.5)
    assert layer.weight.flatten().tolist() == [3, 0, 0, -4] and layer.bias is not None and layer.bias[1] == 0
    pruned = SoftFilter(0.25, keep=("units.7.*",), finetuning=SHORT)(random_net(), work)
    assert isinstance(pruned, StaticNet)
    for name, conv in weight_layers(pruned).items():
        if isinstance(conv, nn.Conv2d) and conv.groups == 1 and not name.startswith("units.7"):
            assert int((conv.weight.flatten(1).norm(dim=1) == 0).sum()) == round(0.25 * len(conv.weight)), name
    zero = (pruned.units[5].conv.weight.flatten(1).norm(dim=1) == 0).nonzero().flatten()  # type: ignore
    small = Channels(macs=0.95, criterion="l1", finetuning=Finetuning(epochs=0))(pruned, work)
    assert isinstance(small, StaticNet)
    assert len(zero) == 16 and int((small.units[5].conv.weight.flatten(1).norm(dim=1) == 0).sum()) < 16  # type: ignore


def hand() -> Gated:
    """Gates 2 |x0| and 1, and -1 and 3, of two input channels and four output channels; two are kept."""
    gated = Gated(nn.Conv2d(2, 4, 1, bias=False), nn.Identity(), 2)
    with torch.no_grad():
        gated.conv.weight.fill_(1)
        gated.gate.weight.copy_(torch.tensor([[2.0, 0], [0, 0], [0, 0], [0, 1.0]]))
        gated.gate.bias.copy_(torch.tensor([0, 1.0, -1.0, 0]))
    return gated


def test_gates_are_the_largest_of_a_linear_function_of_mean_magnitudes() -> None:
    x = torch.tensor([[[[1.0, -1.0]], [[3.0, -3.0]]], [[[0.0, 0.0]], [[0.25, 0.25]]]])  # means of |x|: (1, 3), (0, 1/4)
    assert hand().gates(x).tolist() == [[2, 0, 0, 3], [0, 1, 0, 0.25]]
    y = hand()(x)
    assert y[0, :, 0, 0].tolist() == [8, 0, 0, 12] and y[1, :, 0, 1].tolist() == [0, 0.25, 0, 0.0625]


def test_macs_count_what_is_run_and_what_had_to_be() -> None:
    net = nn.Sequential(hand(), nn.Conv2d(4, 3, 1, bias=False))
    x = torch.tensor([[[[1.0, -1.0]], [[3.0, -3.0]]], [[[0.0, 0.0]], [[0.25, 0.25]]]])
    dense, gates = 2 * (8 + 12), 8
    first = (2 * 2 + 2 * 1) / 2 * 2  # kept outputs x living inputs x 2 pixels, mean of the two images
    second = 3 * 2 * 2  # of 4 inputs 2 live
    assert gated_macs(net, [x]) == GatedMacs(dense, dense + gates, first + second + gates)


def test_a_gated_network_begins_as_the_network_and_is_trained(work: Work) -> None:
    net = random_net()
    whole = Gating(1.0, finetuning=Finetuning(epochs=0))(net, work)
    gates = [module for module in whole.modules() if isinstance(module, Gated)]
    assert len(gates) == 8 and all(module.kept == module.conv.out_channels for module in gates)
    x: Tensor = next(work.data.batches("test", 16, 16, rng=None))[0]
    half = Gating(0.5, finetuning=SHORT)(net, work)
    assert [2 * m.kept for m in half.modules() if isinstance(m, Gated)] == [m.conv.out_channels for m in gates]
    counts = gated_macs(half, [x])
    assert counts.needed < 0.8 * counts.dense < counts.dense < counts.executed
    twin = copy.deepcopy(half)
    twin.load_state_dict(half.state_dict())
    assert twin(x).equal(half(x)) and half(x).shape == (16, 10)
    assert not half.state_dict()["units.5.conv.gate.weight"].equal(whole.state_dict()["units.5.conv.gate.weight"])


def test_what_cannot_be_learned_is_answered(work: Work) -> None:
    with pytest.raises(UserError, match="movement is learned; give a share above 0"):
        Movement(finetuning=Finetuning(epochs=0))
    with pytest.raises(UserError, match="ratio 0 is the share of filters"):
        SoftFilter(0)
    with pytest.raises(UserError, match="kept 0 is the share of channels"):
        Gating(0)
    with pytest.raises(UserError, match="gradual 0 is the share of training"):
        Gating(gradual=0)
    with pytest.raises(UserError, match="no convolution but the first"):
        Gating()(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), work)
    with pytest.raises(UserError, match="needs a convolution that is not grouped"):
        SoftFilter()(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), work)
