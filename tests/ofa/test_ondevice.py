"""On-device training: memory equals what autograd keeps, plans fit, only what is planned moves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ofa.data import ImageData
from ofa.errors import UserError
from ofa.finetune import Finetuning, finetune
from ofa.ondevice.memory import Plan, Update, layers, memory
from ofa.ondevice.modules import Updating
from ofa.ondevice.plan import OnDevice, choose, contributions, whole
from ofa.static import StaticNet
from tests.ofa.nets import RESNET, SPEC, random_net

LAST = "units.8"
PLANS: dict[str, Plan] = {
    "classifier's bias": {LAST: Update()},
    "classifier": {LAST: Update(channels=tuple(range(48)))},
    "biases": {"units.2.depthwise": Update(), "units.3.expand": Update()},
    "some channels": {
        "units.3.depthwise": Update(channels=(0, 5, 7)),
        "units.3.project": Update(bias=False, channels=(1, 2)),
        "units.7": Update(bias=False, channels=(3, 4, 5)),
        LAST: Update(channels=(40, 47)),
    },
    "first layer": {"units.0": Update(bias=False, channels=(0,))},
    "everything": whole(random_net()),
}


@pytest.fixture(scope="module")
def net() -> StaticNet:
    return random_net(replace(SPEC, resolution=13))


def images(n: int, side: int = 13) -> Tensor:
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(0))


def kept(module: torch.nn.Module, x: Tensor) -> int:
    """Bytes of all tensors that autograd saves in a forward pass, but for parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            found[place] = max(found.get(place, 0), tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    y.sum().backward()
    return sum(found.values())


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("n", [1, 3])
def test_memory_equals_what_autograd_keeps(net: StaticNet, name: str, n: int) -> None:
    updating = Updating(net, PLANS[name])
    needed = memory(net.spec, PLANS[name], images=n)
    assert needed.activations == kept(updating, images(n))
    moved = [p for p in updating.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in moved)
    assert needed.weights == needed.gradients == needed.optimizer == 4 * sum(p.numel() for p in moved)
    assert memory(net.spec, PLANS[name], images=n, momentum=False).optimizer == 0


def test_memory_of_the_classifier_is_computed_by_hand(net: StaticNet) -> None:
    assert memory(net.spec, PLANS["classifier's bias"]).total == 10 * 3 * 4
    assert memory(net.spec, PLANS["classifier"], images=2).total == 2 * 48 * 4 + (48 * 10 + 10) * 3 * 4


def test_plain_layers_keep_more(net: StaticNet) -> None:
    plain = random_net(net.spec)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.startswith(LAST) or "bias" in name)
    assert kept(plain, images(1)) > 2 * memory(net.spec, whole(net, weights=False)).activations


def test_the_same_logits_and_gradients_as_the_plain_network(net: StaticNet) -> None:
    updating, x = Updating(net, whole(net)), images(4)
    plain = random_net(net.spec)
    plain.load_state_dict(net.state_dict())
    assert torch.allclose(updating(x), plain(x), atol=1e-4)
    y = torch.tensor([0, 1, 2, 3])
    for module in (updating, plain):
        F.cross_entropy(module(x), y).backward()
    for layer in layers(net.spec):
        mine, other = updating.net.get_submodule(layer.name), plain.get_submodule(layer.name)
        weighted, reference = (mine, other) if layer.name == LAST else (mine.conv, other.conv)
        scale = reference.weight.grad.abs().max()
        assert torch.allclose(weighted.part.grad, reference.weight.grad, atol=1e-4 * scale), layer.name
        if layer.bias and layer.name != LAST:
            assert torch.allclose(mine.bn.shift.grad.flatten(), other.bn.bias.grad, rtol=1e-3, atol=1e-5), layer.name


def test_images_one_by_one_have_the_gradient_of_the_batch(net: StaticNet) -> None:
    plan, x = PLANS["some channels"], images(4)
    together, single = Updating(net, plan), Updating(net, plan)
    together(x).sum().backward()
    for image in x.split(1):
        single(image).sum().backward()
    for a, b in zip(together.parameters(), single.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_only_what_is_planned_moves(data: ImageData) -> None:
    before, plan = random_net(), PLANS["some channels"]
    settings = Finetuning(epochs=0.1, lr=0.05, batch_size=32, weight_decay=0.1)
    updating = finetune(Updating(before, plan), data, settings, resolution=16)
    after = updating.write_to(before)
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    weights = {"units.3.depthwise.conv.weight", "units.3.project.conv.weight", "units.7.conv.weight"}
    assert changed == weights | {"units.3.depthwise.bn.bias", f"{LAST}.weight", f"{LAST}.bias"}
    project = (old["units.3.project.conv.weight"] != new["units.3.project.conv.weight"]).sum((0, 2, 3)).nonzero()
    assert project.flatten().tolist() == [1, 2]
    depthwise = (old["units.3.depthwise.conv.weight"] != new["units.3.depthwise.conv.weight"]).sum((1, 2, 3)).nonzero()
    assert depthwise.flatten().tolist() == [0, 5, 7]
    x = images(8, 16)
    assert torch.allclose(after(x), updating(x), atol=1e-3), "the plain network computes what was trained"


@pytest.mark.parametrize("method", ["sparse", "bias", "last"])
@pytest.mark.parametrize("limit", [2_000, 30_000, 10**7])
def test_a_plan_fits_its_limit_by_recording(data: ImageData, method: str, limit: int) -> None:
    net, settings = random_net(), OnDevice(limit, method, batches=1)
    plan = choose(net, data, settings)
    updating = Updating(net, plan)
    activations = kept(updating, images(1, 16))
    moved = sum(p.numel() for p in updating.parameters() if p.requires_grad)
    assert activations + 12 * moved == settings.needed(net.spec, plan).total <= limit
    if limit == 10**7 and method != "bias":
        assert plan == whole(net), "all of it fits"
    if method == "bias":
        assert not any(update.channels for update in plan.values())


def test_a_sparse_plan_contributes_more_than_the_last_layers(data: ImageData) -> None:
    net = random_net()
    gains = contributions(net, data, OnDevice(1e9, batches=2))

    def contributed(method: str) -> float:
        plan = choose(net, data, OnDevice(20_000, method, batches=2))
        parts = [gains[n].channels[list(u.channels)].sum() + gains[n].bias * u.bias for n, u in plan.items()]
        return float(np.sum(parts))

    assert contributed("sparse") >= max(contributed("last"), contributed("bias"))


def test_contributions_are_squared_gradients(data: ImageData) -> None:
    net = random_net()
    gains = contributions(net, data, OnDevice(1e9, batches=1))
    x, y = next(data.batches("train", 64, 16, rng=np.random.default_rng((0, 6)), limit=64))
    F.cross_entropy(net(x), y).backward()
    weight = net.get_submodule("units.3.project").conv.weight.grad
    expected = weight.square().sum((0, 2, 3)).double().numpy()
    assert np.allclose(gains["units.3.project"].channels, expected, rtol=1e-2, atol=1e-3 * expected.max())


def test_an_impossible_limit_names_the_least(data: ImageData) -> None:
    with pytest.raises(UserError, match=r"no update fits 100 bytes; .* units\.8, needs 120 bytes"):
        choose(random_net(), data, OnDevice(100))
    assert choose(random_net(), data, OnDevice(120)) == {LAST: Update()}


def test_mistakes_are_explained(net: StaticNet) -> None:
    with pytest.raises(UserError, match=r"no layer 'units\.99'"):
        memory(net.spec, {"units.99": Update()})
    with pytest.raises(UserError, match="no bias to update"):
        memory(net.spec, {"units.7": Update()})
    with pytest.raises(UserError, match="not maxpool"):
        layers(RESNET)
    with pytest.raises(UserError, match="choose from sparse"):
        OnDevice(100, "all")
