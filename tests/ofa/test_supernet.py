"""An extracted network computes what the supernet computes, and its counts are fvcore's."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ofa.errors import UserError
from ofa.extraction import extract, recalibrate
from ofa.inference import fast
from ofa.layers import ElasticBatchNorm, ElasticDepthwise, crop_kernel
from ofa.records import Layer, Stage
from ofa.shrink import shrink
from ofa.space import Arch, Space, load_space
from ofa.supernet import Supernet
from ofa.table import layer_table
from ofa.units import arch_units, space_spec
from tests.ofa.nets import random_net, small

FAMILIES = (
    "cifar_mbv3",
    "cifar_conv",
    "ofa_mbv3_w1.0",
    "ofa_proxyless_w1.3",
    "ofa_resnet50",
    "mcunet",
    "nas_bench_macro",
)


def shaken(space: Space, steps: int = 8) -> Supernet:
    """A supernet after some steps of training: statistics and transforms matter, logits follow the image."""
    torch.manual_seed(0)
    supernet = Supernet(space)
    torch.nn.init.normal_(supernet.units[-1].linear.weight)
    optimizer = torch.optim.SGD(supernet.parameters(), 0.01)
    archs = space.decode(np.concatenate([space.largest(), space.sample(steps - 1, np.random.default_rng(0))]))
    with torch.enable_grad():
        for arch in archs:
            F.cross_entropy(supernet(images(space, arch, 8), arch), torch.arange(8) % space.classes).backward()
            optimizer.step()
            optimizer.zero_grad()
    net = extract(supernet, archs[0])
    recalibrate(net, [images(space, archs[0], 32)])
    for module in supernet.modules():
        if isinstance(module, ElasticBatchNorm):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    kept = [m for m, unit in zip(supernet.units, arch_units(space, archs[0]), strict=True) if unit is not None]
    elastic = [module for unit in kept for module in unit.modules() if isinstance(module, ElasticBatchNorm)]
    plain = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for mine, theirs in zip(elastic, plain, strict=True):
        mine.running_mean.copy_(theirs.running_mean)
        mine.running_var.copy_(theirs.running_var)
    for module in supernet.modules():
        if isinstance(module, ElasticDepthwise):
            for transform in module.transforms.values():
                transform.data.add_(0.05 * torch.randn_like(transform))
    return supernet.eval()


def images(space: Space, arch: Arch, n: int = 2) -> Tensor:
    side = arch.resolution
    return torch.randn(n, space.in_channels, side, side).to(memory_format=torch.channels_last)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def digits() -> Supernet:
    return shaken(load_space("digits_mbv3"))


@torch.no_grad()
def test_200_random_subnets_equal_their_extraction(digits: Supernet) -> None:
    space = digits.space
    logits: list[float] = []
    for arch in space.decode(space.sample(200, np.random.default_rng(1))):
        x = images(space, arch)
        found, expected = extract(digits, arch)(x), digits(x, arch)
        assert relative(found, expected) < 1e-5
        logits.append(((expected[0] - expected[1]).abs().max() / expected.abs().max()).item())
    assert min(logits) > 1e-3, "logits that do not depend on the image prove nothing"


def test_extraction_leaves_the_garbage_collector_as_it_was(digits: Supernet) -> None:
    arch = digits.space.decode(digits.space.smallest())[0]
    for before in (False, True):
        (gc.enable if before else gc.disable)()
        extract(digits, arch)
        after = gc.isenabled()
        gc.enable()
        assert after == before


@torch.no_grad()
def test_a_change_of_one_weight_by_one_percent_is_seen(digits: Supernet) -> None:
    arch = digits.space.decode(digits.space.largest())[0]
    x, net = images(digits.space, arch), extract(digits, arch)
    weight = net.units[2].project.conv.weight
    weight[tuple(int(i) for i in (weight.abs() == weight.abs().max()).nonzero()[0])] *= 1.01
    assert relative(net(x), digits(x, arch)) > 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["cifar_mbv3", "cifar_conv", "ofa_mbv3_w1.0", "ofa_proxyless_w1.3", "ofa_resnet50", "mcunet", "nas_bench_macro"],
)
def test_other_families_too(name: str) -> None:
    space = load_space(name) if name == "ofa_mbv3_w1.0" else small(name)
    supernet = shaken(space.restrict(resolution=[space.resolution[0]]), steps=2)
    for arch in supernet.space.decode(supernet.space.sample(4, np.random.default_rng(1))):
        x = images(space, arch)
        assert relative(extract(supernet, arch)(x), supernet(x, arch)) < 1e-5


@torch.no_grad()
def test_a_smaller_expand_ratio_may_make_more_channels() -> None:
    stem = Layer("conv", 4, width=None)
    stages = (Stage(4, depth=(1, 2), kernel=(3, 5), expand=(0.5, 1), se=True, width=None),)
    space = Space("odd", (8,), stages, (stem,), (Layer("pool"), Layer("linear")), classes=10)
    supernet = Supernet(space).eval()
    archs = space.decode(space.sample(8, np.random.default_rng(0)))
    assert {unit.mid for arch in archs for unit in space_spec(space, arch).units if unit.mid} == {4, 8}
    for arch in archs:
        x = images(space, arch)
        assert relative(extract(supernet, arch)(x), supernet(x, arch)) < 1e-5


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_other_channels_are_refused(channels: int) -> None:
    space = small("cifar_mbv3")
    arch = space.decode(space.smallest())[0]
    with pytest.raises(UserError, match=rf"images have shape \(2, {channels}, 8, 8\); small takes \(N, 3, H, W\)"):
        Supernet(space)(torch.zeros(2, channels, 8, 8), arch)


@torch.no_grad()
def test_the_same_architecture_gives_the_same_logits_whatever_ran_before(digits: Supernet) -> None:
    space = digits.space
    small, large = (space.decode(genes)[0] for genes in (space.smallest(), space.largest()))
    x = images(space, small)
    before = digits(x, small)
    digits(images(space, large), large)
    assert torch.equal(digits(x, small), before)


@torch.no_grad()
@pytest.mark.parametrize(("size", "kernel"), [(1, 7), (2, 7), (3, 7), (3, 5), (1, 3), (4, 7), (2, 5)])
def test_cropped_kernels_are_exact(size: int, kernel: int) -> None:
    x, weight = torch.randn(2, 8, size, size, dtype=torch.double), torch.randn(8, 1, kernel, kernel, dtype=torch.double)
    cropped = crop_kernel(weight, size, stride=1)
    expected = F.conv2d(x, weight, padding=kernel // 2, groups=8)
    assert torch.allclose(F.conv2d(x, cropped, padding=cropped.shape[-1] // 2, groups=8), expected)
    assert cropped.shape[-1] == min(kernel, 2 * size - 1)
    assert crop_kernel(weight, size, stride=2) is weight


def test_depthwise_weights_are_made_once_for_a_network_or_by_their_block(digits: Supernet) -> None:
    arch = digits.space.decode(digits.space.smallest())[0]
    x, asked = images(digits.space, arch), []
    place, unit = next(
        (i, unit) for i, unit in enumerate(arch_units(digits.space, arch)) if unit is not None and unit.kind == "mbconv"
    )
    block = digits.units[place]
    hook = block.register_forward_hook(lambda module, given, y: asked.append((given, y)))
    digits(x, arch)
    hook.remove()
    ((before, *_, weight), y), own = asked[0], block(asked[0][0][0], unit)
    assert isinstance(weight, Tensor) and torch.equal(y, own)
    assert not torch.equal(y, block(before, unit, None, 2 * weight)), "the weight that is given counts"
    assert torch.equal(own, block(before, unit, None, weight[:, :, :1, :1])), "of other taps it does not"


@torch.no_grad()
@pytest.mark.parametrize("sides", [(32, 8), (8, 20)])
def test_images_that_are_not_square_lose_no_taps(digits: Supernet, sides: tuple[int, int]) -> None:
    arch = digits.space.decode(digits.space.largest())[0]
    x, net, other = torch.randn(2, 1, *sides), extract(digits, arch), extract(digits, arch)
    assert relative(digits(x, arch), net(x)) < 1e-5
    assert relative(fast(net)(x), net(x)) < 1e-5
    recalibrate(net, [x])
    recalibrate(torch.nn.Sequential(other).eval(), [x])  # by PyTorch's own operations
    assert relative(net(x), other(x)) < 1e-4


def test_kernel_transforms_follow_once_for_all() -> None:
    space = load_space("ofa_mbv3_w1.0")
    layer = Supernet(space).units[2].depthwise
    assert isinstance(layer, ElasticDepthwise)
    middle = layer.weight[:6, :, 1:6, 1:6].reshape(6, 25) @ layer.transforms["5"].T
    inner = middle.view(6, 5, 5)[:, 1:4, 1:4].reshape(6, 9) @ layer.transforms["3"].T
    seven, five, three = shrink(*(layer.smaller(6, k, k) for k in (7, 5, 3)))
    assert torch.equal(seven, layer.weight[:6])
    assert torch.allclose(five.reshape(6, 25), middle)
    assert torch.allclose(three.reshape(6, 9), inner)


@torch.no_grad()
def test_sorting_channels_keeps_the_largest_net_and_changes_a_narrow_one() -> None:
    supernet = shaken(load_space("digits_mbv3"), steps=2)
    space = supernet.space
    large = space.decode(space.largest())[0]
    narrow = replace(large, expand=(2,) * len(large.expand))
    x = images(space, large)
    before = [supernet(x, arch) for arch in (large, narrow)]
    supernet.sort_channels()
    assert relative(supernet(x, large), before[0]) < 1e-5
    assert relative(supernet(x, narrow), before[1]) > 1e-3
    norms = supernet.units[2].project.conv.weight.abs().sum((0, 2, 3))
    assert torch.equal(norms, norms.sort(descending=True).values)


@torch.no_grad()
def test_sorting_the_channels_of_bottlenecks_keeps_the_largest_net_and_changes_a_narrow_one() -> None:
    supernet = shaken(small("ofa_resnet50"), steps=2)
    large = supernet.space.decode(supernet.space.largest())[0]
    narrow = replace(large, expand=(0.2,) * len(large.expand))
    x = images(supernet.space, large)
    before = [supernet(x, arch) for arch in (large, narrow)]
    supernet.sort_channels()
    assert relative(supernet(x, large), before[0]) < 1e-4
    assert relative(supernet(x, narrow), before[1]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("name", "trained"), [("ofa_mbv3_w1.0", [4, 6]), ("ofa_resnet50", [0.25, 0.35])])
def test_sorting_channels_keeps_the_nets_that_were_trained(name: str, trained: list[float]) -> None:
    supernet = shaken(small(name), steps=2)
    space = supernet.space
    large = space.decode(space.largest())[0]
    x = images(space, large)
    values = (*trained, space.stages[-1].choices("expand")[0])
    nets = [replace(large, expand=(value,) * len(large.expand)) for value in values]
    before = [supernet(x, arch) for arch in nets]
    supernet.sort_channels(space.restrict(expand=trained, width=1))
    for arch, logits in list(zip(nets, before, strict=True))[:2]:
        assert relative(supernet(x, arch), logits) < 1e-4
    assert relative(supernet(x, nets[2]), before[2]) > 1e-3, "the smallest gets the best of them"


@torch.no_grad()
def test_recalibration_sets_the_statistics_of_the_given_images(digits: Supernet) -> None:
    arch = digits.space.decode(digits.space.smallest())[0]
    net, other = extract(digits, arch), extract(digits, arch)
    batches = [images(digits.space, arch, 16) for _ in range(3)]
    recalibrate(net, batches)
    seen = torch.stack([net.units[0].conv(batch).mean((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(net.units[0].bn.running_mean, seen, atol=1e-5)
    assert not torch.allclose(other.units[0].bn.running_mean, seen, atol=1e-3)
    assert not net.training
    assert net.units[0].bn.momentum == other.units[0].bn.momentum
    with pytest.raises(UserError, match="at least one batch"):
        recalibrate(net, [])


def test_layers_of_skipped_blocks_are_zero() -> None:
    space = load_space("digits_mbv3")
    genes = space.sample(50, np.random.default_rng(0))
    table = layer_table(space, genes)
    for values in (table.cin, table.cout, table.kernel, table.size_in, table.size_out, table.held):
        assert not values[~table.active].any()


@pytest.mark.parametrize("op", [[0], [1], [0, 2], [1, 2]])
def test_a_space_of_some_of_its_operations_has_the_same_networks(op: list[int]) -> None:
    whole = small("nas_bench_macro")
    space = whole.restrict(op=op)
    supernet = Supernet(space).eval()
    for arch in space.decode(space.sample(4, np.random.default_rng(0))):
        assert space_spec(space, arch) == space_spec(whole, arch)
        x = images(space, arch, 2)
        torch.testing.assert_close(extract(supernet, arch)(x), supernet(x, arch))


def test_a_recalibration_that_fails_leaves_the_network_in_its_mode() -> None:
    net = random_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError, match="recalibration got no images"):
        recalibrate(net, [])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recalibrate(net, [torch.zeros(1, 1, 1, 1)])
    assert not net.training
    assert {norm.momentum for norm in net.modules() if isinstance(norm, torch.nn.BatchNorm2d)} == {0.1}
