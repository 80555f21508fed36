"""Fine-grained pruning: which weights go, how many from each layer, and that they stay away."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ofa.compress.allocation import Sensitivity, by_magnitude, by_sensitivity, erdos_renyi, sensitivity, uniform
from ofa.compress.chain import Step, Work, compress
from ofa.compress.fisher import FEW, FLOOR, weight_scales
from ofa.compress.gating import Gating
from ofa.compress.kmeans import KMeans
from ofa.compress.layers import Counts, count, layer_macs, positions, weight_layers
from ofa.compress.linear import Linear
from ofa.compress.magnitude import Magnitude, NOfM, Ramp, cubic, train_sparse
from ofa.compress.movement import Movement, SoftFilter
from ofa.compress.prune import macs
from ofa.compress.sparsity import hold_zeros, n_of_m, zero_smallest
from ofa.data import digits
from ofa.errors import UserError
from ofa.evaluate import accuracy
from ofa.finetune import Finetuning, finetune
from ofa.static import StaticNet, build_spec
from ofa.weights import load_tensors, load_weights, save_tensors
from tests.ofa.nets import SPEC, random_net

SHORT = Finetuning(epochs=0.3)


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(digits(), resolution=16)


@pytest.fixture(scope="module")
def trained(work: Work) -> StaticNet:
    return finetune(random_net(), work.data, Finetuning(epochs=3, lr=0.1))


def tiny() -> nn.Sequential:
    """A 3x3 convolution of 1 to 2 channels with padding, and a linear layer of 2 to 3."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
    )


def zeros(net: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight == 0 for name, layer in weight_layers(net).items()}


def share(net: nn.Module) -> float:
    tensors = list(net.parameters())
    return sum(int(t.count_nonzero()) for t in tensors) / sum(t.numel() for t in tensors)


@pytest.mark.parametrize(
    "step",
    [
        Linear(4, images=64, finetuning=SHORT),
        Linear(4, images=64, finetuning=SHORT, learned_steps=True),
        Linear(4, images=64, rounding="adaptive"),
        SoftFilter(0.1, finetuning=SHORT),
        Movement(0.5, finetuning=SHORT),
        Gating(finetuning=SHORT),
        Magnitude(0.9, gradual=1.0, finetuning=SHORT),
        Magnitude(0.9, keep=("units.2.*",), gradual=1.0, finetuning=SHORT),
        KMeans(4, {"units.2.*": 32}, finetuning=SHORT),
    ],
    ids=lambda step: f"{type(step).__name__}-{getattr(step, 'rounding', '')}{getattr(step, 'keep', '')}",
)
def test_pruned_weights_stay_zero_in_every_later_step(step: Step, trained: StaticNet, work: Work) -> None:
    pruned = NOfM(2, 4, finetuning=Finetuning(epochs=0))(trained, work)
    after = [layer.weight for layer in weight_layers(step(pruned, work)).values()]
    for zero in (zero for zero in zeros(pruned).values() if zero.any()):
        assert any(bool((weight[zero] == 0).all()) for weight in after if weight.shape == zero.shape)


def test_soft_filters_leave_a_layer_one_filter(trained: StaticNet, work: Work) -> None:
    net = SoftFilter(0.99, finetuning=Finetuning(epochs=0))(trained, work)
    assert all(layer.weight.any() for layer in weight_layers(net).values())


def test_the_smallest_magnitudes_go() -> None:
    weight = torch.tensor([[0.3, -0.1], [2.0, -0.5]])
    assert zero_smallest(weight, 0.5).tolist() == [[0.0, 0.0], [2.0, -0.5]]
    assert zero_smallest(weight, 0).equal(weight) and not zero_smallest(weight, 1).any()
    assert zero_smallest(weight, 0.25, torch.tensor([[0.0, -1.0], [3.0, -2.0]]))[1, 1] == 0
    assert weight.count_nonzero() == 4, "the argument is left as it is"


def test_two_of_four_neighbours_along_the_input_channels_stay() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.1, 0.2, -0.4, 0.3]])
    assert n_of_m(weight, 2, 4).tolist() == torch.tensor([[0, -4.0, 3.0, 0, 0, 0, -0.4, 0.3]]).tolist()
    kernel = torch.randn(3, 8, 3, 3)
    pruned = n_of_m(kernel, 1, 4)
    kept = (pruned != 0).view(3, 2, 4, 3, 3).sum(2)
    assert (kept == 1).all() and torch.isin(pruned[pruned != 0], kernel).all()
    assert pruned.abs().view(3, 2, 4, 3, 3).amax(2).equal(kernel.abs().view(3, 2, 4, 3, 3).amax(2))


def test_counts_are_those_of_the_formula() -> None:
    net = tiny()
    with torch.no_grad():
        net[0].weight.fill_(1)[0, 0, 0] = 0
        net[3].weight.fill_(1)[0, 0] = 0
        net[3].bias.fill_(1)
    image = torch.zeros(1, 1, 5, 5)
    assert positions(net, image) == {"0": 25, "3": 1}
    assert layer_macs(net, image) == {"0": 25 * 18, "3": 6}
    assert count(net, image) == Counts(18 + 6 + 3, 15 + 5 + 3, 25 * 18 + 6, 25 * 15 + 5)
    assert sum(layer_macs(random_net(), torch.zeros(1, 1, 16, 16)).values()) == macs(SPEC)


def test_layers_share_zeros_by_the_magnitudes_of_all() -> None:
    net = tiny()
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(1, 19).view(2, 1, 3, 3))
        net[3].weight.copy_(torch.tensor([[0.5, 0.6], [2.5, 30], [40, 50]]))
    layers = weight_layers(net)
    assert by_magnitude(layers, 6) == {"0": 3 / 18, "3": 3 / 6}  # 0.5 0.6 1 2 2.5 3
    assert by_magnitude(layers, 6, {"3": torch.full((3, 2), 100.0)}) == {"0": 6 / 18, "3": 0}
    assert uniform(layers, 6) == {"0": 0.25, "3": 0.25}


def test_scales_are_the_fourth_roots_of_squared_gradients(work: Work) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    net.requires_grad_(False)  # frozen weights are felt too
    batches = list(work.data.batches("val", FEW, 16, rng=None, limit=3 * FEW))
    squared = torch.zeros(10, 256)
    for x, labels in batches:
        wrong = net(x).softmax(1) - nn.functional.one_hot(labels, 10)
        squared += (wrong.T @ x.flatten(1)).square()
    expected = ((squared + FLOOR * squared.mean()) / (3 * FEW)).pow(0.25)
    found = weight_scales(net, ["1"], work, images=3 * FEW)["1"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_what_the_loss_feels_keeps_more_than_magnitude(trained: StaticNet, work: Work) -> None:
    pruned = [
        Magnitude(0.2, criterion=criterion, finetuning=Finetuning(epochs=0))(trained, work)
        for criterion in ("magnitude", "fisher")
    ]
    assert share(pruned[1]) == pytest.approx(share(pruned[0]), abs=1e-3)
    by_magnitude, felt = (accuracy(net, work.data, "test", resolution=16) for net in pruned)
    assert felt > by_magnitude + 0.03
    with pytest.raises(UserError, match="criterion 'hessian' is not known; choose from magnitude, fisher"):
        Magnitude(criterion="hessian")
    with pytest.raises(
        UserError, match="allocation sensitivity is measured by magnitude; give criterion=fisher another"
    ):
        Magnitude(criterion="fisher", allocation="sensitivity")


def test_small_layers_stay_denser_by_the_sum_of_their_sides() -> None:
    layers = weight_layers(tiny())  # 2 x 1 x 3 x 3: 9 / 18; 3 x 2: 5 / 6
    assert erdos_renyi(layers, 10) == pytest.approx({"0": 0.5, "3": 1 / 6}), "14 weights stay: sides' sums are 14"
    assert erdos_renyi(layers, 6) == pytest.approx({"0": 1 / 3, "3": 0}), "the second stays whole, the first gives all"
    assert erdos_renyi(layers, 0) == pytest.approx({"0": 0, "3": 0})


def test_layers_lose_the_same_accuracy_alone() -> None:
    rows = [Sensitivity("robust", 100, 0.5, 0.90), Sensitivity("robust", 100, 0.9, 0.80)]
    rows += [Sensitivity("frail", 100, 0.5, 0.70), Sensitivity("frail", 100, 0.9, 0.10)]
    found = by_sensitivity(rows, 0.9, 95)  # at a loss of 0.05: 0.5 + 0.4 * 0.5 = 0.7, and 0.5 * 0.05 / 0.2 = 0.125
    assert found["robust"] * 100 + found["frail"] * 100 == pytest.approx(95)
    loss = (found["robust"] - 0.5) / 0.4 * 0.1
    assert found["frail"] == pytest.approx(0.5 * loss / 0.2)
    level = by_sensitivity([Sensitivity("a", 10, 0.5, 0.9), Sensitivity("b", 10, 0.5, 0.5)], 0.9, 3)
    assert level == {"a": pytest.approx(0.3), "b": pytest.approx(0)}, "the layer that loses nothing is taken in part"


def test_sensitivity_is_the_accuracy_with_one_layer_pruned(trained: StaticNet, work: Work) -> None:
    before = copy.deepcopy(trained.state_dict())
    rows = sensitivity(trained, work, levels=(0, 0.9), keep=("units.[0-6].*",))
    assert [(row.layer, row.level) for row in rows][:2] == [("units.7.conv", 0), ("units.7.conv", 0.9)]
    whole = accuracy(trained, work.data, "val", resolution=16)
    assert [row.accuracy for row in rows if row.level == 0] == pytest.approx([whole, whole])
    twin = copy.deepcopy(trained)
    with torch.no_grad():
        weight = twin.units[8].weight
        weight[weight.abs() <= weight.abs().flatten().sort().values[round(0.9 * weight.numel()) - 1]] = 0
    assert rows[-1].accuracy == pytest.approx(accuracy(twin, work.data, "val", resolution=16))
    assert all(before[name].equal(value) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("allocation", ["magnitude", "sensitivity", "uniform", "erdos_renyi"])
def test_a_quarter_of_the_size_is_left(allocation: str, trained: StaticNet, work: Work) -> None:
    step = Magnitude(0.25, allocation, images=100, finetuning=SHORT)
    ((name, net),) = compress(trained, {"magnitude": step}, work)
    assert name == "magnitude" and share(net) == pytest.approx(0.25, abs=1e-3) and not net.training
    assert share(trained) > 0.99
    parameters = sum(p.numel() for p in trained.parameters())
    bytes_ = Magnitude(f"{parameters}B", allocation, images=100, finetuning=Finetuning(epochs=0))(trained, work)
    assert share(bytes_) == pytest.approx(0.25, abs=1e-3), "a byte for each parameter is a quarter of float32"


def test_rounds_and_the_gradual_schedule_end_at_the_same_size(trained: StaticNet, work: Work) -> None:
    for step in (Magnitude(0.3, rounds=2, finetuning=SHORT), Magnitude(0.3, gradual=0.6, finetuning=SHORT)):
        assert share(step(trained, work)) == pytest.approx(0.3, abs=1e-3)


def test_the_gradual_schedule_is_the_papers_cubic() -> None:
    assert [cubic(x) for x in (0, 0.5, 1, 2)] == [0, 0.875, 1, 1]
    done: list[float] = []
    ramp = Ramp(lambda net, share: done.append(share), steps=50, gradual=0.6)
    for _ in range(50):
        ramp(tiny())
    assert done == pytest.approx([1 - (2 / 3) ** 3, 1 - (1 / 3) ** 3, 1])


def test_zeros_survive_saving_loading_copying_and_training(trained: StaticNet, work: Work, tmp_path: Path) -> None:
    pruned = train_sparse(trained, dict.fromkeys(weight_layers(trained), 0.5), work, Finetuning(epochs=0))
    save_tensors(tmp_path / "net.safetensors", pruned.state_dict())
    loaded = build_spec(SPEC)
    load_weights(loaded, load_tensors(tmp_path / "net.safetensors")[0], "net")
    tuned = finetune(copy.deepcopy(loaded), work.data, SHORT, after_step=hold_zeros(loaded))
    before, after = zeros(pruned), zeros(tuned)
    assert all(after[name].equal(zero) for name, zero in before.items())
    assert not tuned.units[8].weight.equal(pruned.units[8].weight)
    free = finetune(loaded, work.data, SHORT)
    assert share(free) > 0.9, "without hold_zeros they come back"


def test_n_of_m_prunes_what_bears_it_and_holds_it(trained: StaticNet, work: Work) -> None:
    net = NOfM(2, 4, finetuning=SHORT)(trained, work)
    found = zeros(net)
    assert found["units.5.conv"].view(64, 10, 4).sum(2).eq(2).all()
    assert not found["units.0.conv"].any() and not found["units.1.depthwise.conv"].any()


def test_what_cannot_be_pruned_is_answered(trained: StaticNet, work: Work) -> None:
    with pytest.raises(UserError, match=r"size 0.001 cannot be met: .* is 0\.\d+ of the size already"):
        Magnitude(0.001)(trained, work)
    with pytest.raises(UserError, match="2:2 keeps n of every m"):
        NOfM(2, 2)
    with pytest.raises(UserError, match="size=0 must be above 0"):
        Magnitude(0)
    with pytest.raises(UserError, match=r"^size=1\.2 is neither a share, at most 1, nor a whole number"):
        Magnitude(1.2)
    assert Magnitude(keep="units.0*").keep == ("units.0*",)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="allocation 'best' is not known; choose from"):
        Magnitude(allocation="best")
    with pytest.raises(UserError, match="suits no layer"):
        NOfM(2, 4)(tiny(), Work(work.data, 16))
    with pytest.raises(UserError, match="no convolution or linear layer is left to compress, only BatchNorm2d"):
        weight_layers(nn.BatchNorm2d(3))
    with pytest.raises(UserError, match="which matches no layer; the layers are 0, 3"):
        weight_layers(tiny(), keep=("conv*",))
    with pytest.raises(UserError, match="multiples of 4, not 6"):
        n_of_m(torch.ones(2, 6), 2, 4)
