"""Channel pruning to any target, by any criterion, of any network."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import shufflenet_v2_x0_5

from ofa.compress.chain import Work
from ofa.compress.channels import Channels, activation_bytes, onnx_latency, weight_bytes
from ofa.compress.criteria import channel_groups, channel_parameters, channel_scores, taylor_scores
from ofa.compress.layers import count, layer_macs
from ofa.compress.magnitude import Magnitude
from ofa.compress.prune import Pruning, prune, sort_channels
from ofa.data import digits
from ofa.distill import label_loss
from ofa.errors import UserError
from ofa.finetune import Finetuning
from ofa.liveness import peak_elements
from ofa.static import StaticNet
from tests.ofa.nets import RESNET, SPEC, random_net

BARE = Finetuning(epochs=0)
IMAGE = torch.zeros(1, 1, 16, 16)


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(digits(), resolution=16)


def residual() -> nn.Module:
    """A network that is no StaticNet: torchvision's smallest residual block between two convolutions."""
    from torchvision.models.resnet import BasicBlock

    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    head = nn.Sequential(nn.Conv2d(32, 64, 3, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(stem, BasicBlock(32, 32), head, nn.Flatten(), nn.Linear(64, 10)).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


@pytest.mark.parametrize("spec", [SPEC, RESNET])
def test_taylor_scores_are_the_squared_gradients_of_gates_image_by_image(spec: object, work: Work) -> None:
    net, batches = random_net(spec), list(work.data.batches("train", 32, 16, rng=None, limit=64))  # type: ignore[arg-type]
    groups, gates, handles = channel_groups(net.spec), {}, []
    for key, _, axes in channel_parameters(net, groups):
        name = key.rpartition(".")[0]
        lonely = name.endswith(".conv") and isinstance(net.get_submodule(name.removesuffix("conv") + "bn"), nn.Identity)
        if key.endswith("bn.weight") or (lonely and key.endswith("weight")):
            module = net.get_submodule(name)
            gate = torch.ones(1, module.weight.shape[0], 1, 1, requires_grad=True)  # type: ignore[union-attr]
            gates[name] = axes[0], gate
            handles.append(module.register_forward_hook(lambda m, i, out, gate=gate: out * gate))
    expected: dict[int, Tensor] = {}
    for image, label in ((x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))):
        grads = torch.autograd.grad(label_loss(net(image), label), [gate for _, gate in gates.values()])
        change: dict[int, Tensor] = {}
        for (group, _), grad in zip(gates.values(), grads, strict=True):
            change[group] = change.get(group, torch.zeros(())) + grad.flatten()
        for group, total in change.items():
            expected[group] = expected.get(group, torch.zeros(())) + total.square()
    for handle in handles:
        handle.remove()
    found = taylor_scores(net, batches, streams=True)
    assert set(found) == {g for group in groups for g in group} - {0, groups[-1].outer}
    for group, scores in found.items():
        np.testing.assert_allclose(scores, (expected[group] / expected[group].mean()).numpy(), rtol=1e-3, atol=1e-6)


COSTS: dict[str, Callable[[nn.Module], float]] = {
    "macs": lambda net: sum(layer_macs(net, IMAGE).values()),
    "size_bytes": lambda net: 4 * sum(p.numel() for p in net.parameters()),
    "peak_memory_bytes": lambda net: 4 * peak_elements(net, IMAGE),
}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("cost", COSTS)
def test_each_target_is_met_and_hardly_missed_by_one_step_less(cost: str, share: bool, work: Work) -> None:
    net = random_net(RESNET)
    before = COSTS[cost](net)
    target = dict.fromkeys(COSTS) | {cost: 0.7 if share else f"{0.7 * before / 1000}k"}
    if not share and cost != "macs":
        target[cost] = f"{0.7 * before / 1000}KB"
    small = Channels(**target, finetuning=BARE)(net, work)  # type: ignore[arg-type]
    assert 0.35 * before < COSTS[cost](small) <= 0.7 * before
    assert isinstance(small, StaticNet) and not small.training


def test_latency_is_what_the_timer_says(work: Work) -> None:
    net, timer = random_net(), lambda net, image: weight_bytes(net, image) / 1e3
    small = Channels(macs=None, latency_ms="30ms", timer=timer, finetuning=BARE)(net, work)
    assert 20 < timer(small, IMAGE) <= 30 < timer(net, IMAGE)
    assert onnx_latency(small, IMAGE) > 0


def test_two_targets_are_both_met(work: Work) -> None:
    small = Channels(macs=0.8, size_bytes=0.5, criterion="taylor", images=64, finetuning=BARE)(random_net(), work)
    assert COSTS["macs"](small) <= 0.8 * COSTS["macs"](random_net())
    assert weight_bytes(small, IMAGE) <= 0.5 * weight_bytes(random_net(), IMAGE)
    assert activation_bytes(small, IMAGE) > 0


@pytest.mark.parametrize("spec", [SPEC, RESNET])
def test_sorted_channels_compute_the_same_and_the_first_are_the_most_important(spec: object, work: Work) -> None:
    net = random_net(spec)  # type: ignore[arg-type]
    scores = channel_scores(net, "l2", streams=True)
    in_order = sort_channels(net, scores)
    x = next(work.data.batches("test", 16, 16, rng=None))[0]
    torch.testing.assert_close(in_order(x), net(x), rtol=1e-4, atol=1e-4)
    assert all((np.diff(s) <= 1e-6).all() for s in channel_scores(in_order, "l2", streams=True).values())
    first, last = (prune(n, Pruning(0.6, "first", streams=True)) for n in (in_order, net))
    assert first.spec == last.spec, "both lose as many channels"
    kept = {g: len(np.unique(s)) for g, s in channel_scores(first, "l2", streams=True).items()}
    assert kept and not torch.equal(first(x), last(x))


def own_groups(net: StaticNet) -> set[frozenset[tuple[str, str]]]:
    """What goes together by the net's spec: (layer, which side of it)."""
    found: dict[int, set[tuple[str, str]]] = {}
    for key, value, axes in channel_parameters(net, channel_groups(net.spec)):
        name, _, kind = key.rpartition(".")
        if kind == "weight":
            for side, group in zip(("out", "in"), axes[: value.ndim], strict=False):
                if group >= 0:
                    found.setdefault(group, set()).add((name, side))
    groups = channel_groups(net.spec)
    return {frozenset(members) for group, members in found.items() if group not in (0, groups[-1].outer)}


def traced_groups(net: StaticNet) -> set[frozenset[tuple[str, str]]]:
    """What goes together by torch-pruning's trace of the running network."""
    tp = pytest.importorskip("torch_pruning")
    graph = tp.DependencyGraph().build_dependency(net, IMAGE)
    names = {module: name for name, module in net.named_modules()}
    found = set()
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d]):
        members = set()
        for dependency, _ in group:
            module, handler = dependency.target.module, dependency.handler.__name__
            if module in names:
                whole = getattr(module, "groups", 1) > 1 or isinstance(module, nn.BatchNorm2d)
                members.add((names[module], "in" if handler.endswith("in_channels") and not whole else "out"))
        found.add(frozenset(members))
    return found


def test_groups_are_those_that_torch_pruning_finds_in_the_running_network() -> None:
    inside = {("reduce", "out"), ("expand", "in")}  # squeeze-excite's own channels, which we do not prune
    traced = traced_groups(random_net())
    assert own_groups(random_net()) == {g for g in traced if {(n.rpartition(".")[2], s) for n, s in g} != inside}
    net = random_net(RESNET)
    own, traced = own_groups(net), traced_groups(net)
    for group in own:
        parts = [part for part in traced if part <= group]
        assert frozenset().union(*parts) == group
        assert len(parts) == 1 + any("conv2" in name for name, _ in group), "both middles of a bottleneck are one group"


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "taylor"])
def test_a_module_that_is_no_static_net_is_pruned_with_its_dependencies(criterion: str, work: Work) -> None:
    pytest.importorskip("torch_pruning")
    net = residual()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    small = Channels(macs=0.5, criterion=criterion, images=64, finetuning=BARE)(net, work)
    share = sum(layer_macs(small, IMAGE).values()) / sum(layer_macs(net, IMAGE).values())
    assert 0.25 < share <= 0.5
    assert small(torch.randn(2, 1, 16, 16)).shape == (2, 10)
    assert all(before[name].equal(value) for name, value in net.state_dict().items())


def test_targets_are_met_where_removing_more_would_leave_more() -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    convs = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU()]
    net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    work, image = Work(digits(), 16), torch.zeros(1, 1, 16, 16)
    whole = sum(layer_macs(net, image).values())
    for share in (0.7, 0.4):
        small = Channels(share, criterion="l2", finetuning=Finetuning(epochs=0))(net, work)
        assert 0.5 * share * whole < sum(layer_macs(small, image).values()) <= share * whole
    with pytest.raises(UserError, match=r"macs (\d+) of [\d.]+ cannot be met") as error:
        Channels(0.05, criterion="l2", finetuning=Finetuning(epochs=0))(net, work)
    assert int(re.search(r"macs (\d+)", str(error.value))[1]) < 0.4 * whole, "the least, not the whole"


def test_a_network_that_torch_pruning_follows_wrongly_is_named() -> None:
    pytest.importorskip("torch_pruning")
    net = shufflenet_v2_x0_5(num_classes=10).eval()
    net.conv1[0] = nn.Conv2d(1, 24, 3, 2, 1, bias=False)  # the digits are grey
    with pytest.raises(UserError, match=r"torch-pruning cannot narrow ShuffleNetV2 \(.*\); leave channels out"):
        Channels(macs=0.5, criterion="l2", finetuning=Finetuning(epochs=0))(net, Work(digits(), 32, 0))


def test_zeros_stay_zero_through_the_steps_that_follow(work: Work) -> None:
    tuned = Finetuning(epochs=0.3)
    sparse = Magnitude(0.3, finetuning=BARE)(random_net(), work)
    small = Channels(macs=0.8, finetuning=tuned)(sparse, work)
    bare = Channels(macs=0.8, finetuning=BARE)(sparse, work)
    share, same = (count(net, IMAGE).nonzeros / count(net, IMAGE).parameters for net in (small, bare))
    assert share == pytest.approx(same, abs=1e-3) and share < 0.5


def test_what_cannot_be_pruned_is_answered(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"macs [\d.e+]+ of [\d.e+]+ cannot be met: that is what widths of 8 leaves"):
        Channels(macs=0.01)(random_net(), work)
    with pytest.raises(UserError, match="channels has no target; give macs"):
        Channels(macs=None)
    with pytest.raises(UserError, match="macs=0 must be above 0"):
        Channels(macs=0)
    with pytest.raises(UserError, match="limit size_bytes=3 apples is not understood"):
        Channels(size_bytes="3 apples")
    with pytest.raises(UserError, match=r"criterion 'best' is not known; choose from l1, .*taylor"):
        Channels(criterion="best")
    with pytest.raises(UserError, match="give at least one batch"):
        taylor_scores(random_net(), [], streams=False)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UserError, match=r'pip install "ofa-nas\[prune\]"'):
        Channels()(residual(), work)
