"""Factorized layers: exact at full rank, and losing what was left out of them, to the digit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ofa.compress.chain import Work
from ofa.compress.factors import cp, cp_product, factorized, spatial, svd, tucker
from ofa.compress.fisher import DAMPING, Metric, metrics
from ofa.compress.layers import layer_macs, opened, put
from ofa.compress.low_rank import LowRank, Option, Pixels, choose, layer_options
from ofa.compress.magnitude import Magnitude
from ofa.data import digits
from ofa.errors import UserError
from ofa.evaluate import accuracy
from ofa.export.graph import onnx_model
from ofa.export.latency import open_session
from ofa.finetune import Finetuning
from tests.ofa.nets import RESNET, random_net

BARE = Finetuning(epochs=0)
FULL = {"svd": (6,), "spatial": (15,), "tucker": (5, 6), "cp": (90,)}


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(digits(), resolution=16)


def conv(**options: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, 6, 3, **{"padding": 1} | options).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 2, "dilation": 2}, {"bias": False, "padding": 0}])
@pytest.mark.parametrize("method", FULL)
def test_full_rank_is_the_layer_itself(method: str, options: dict[str, object]) -> None:
    layer, x = conv(**options), torch.randn(2, 5, 11, 9)
    made = factorized(layer, method, FULL[method])
    torch.testing.assert_close(made(x), layer(x), rtol=1e-3, atol=1e-3 if method == "cp" else 1e-5)
    if method != "cp":
        fewer = factorized(layer, method, tuple(rank // 4 for rank in FULL[method]))
        assert (fewer(x) - layer(x)).abs().max() > 1e-2


def test_a_linear_layer_of_full_rank_is_itself() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    torch.testing.assert_close(factorized(layer, "tucker", (3,))(x), layer(x), rtol=1e-5, atol=1e-6)


def test_what_is_lost_is_the_energy_of_the_singular_values_left_out() -> None:
    layer = conv()
    weight = layer.weight.detach().double()
    values = np.linalg.svd(weight.flatten(1).numpy(), compute_uv=False)
    first, last = svd(weight, 2, Metric.of_weight(layer))
    lost = (weight - torch.einsum("or,riyx->oiyx", last, first)).square().sum()
    assert float(lost) == pytest.approx((values[2:] ** 2).sum(), rel=1e-6)
    matrix = weight.permute(1, 2, 0, 3).reshape(15, 18)
    column, row = spatial(weight, 4)
    lost = (weight - torch.einsum("riy,orx->oiyx", column, row)).square().sum()
    assert float(lost) == pytest.approx((np.linalg.svd(matrix.numpy(), compute_uv=False)[4:] ** 2).sum())
    layer = conv()
    losses = [o.loss for o in layer_options(layer, "svd", Pixels(9, 9, 9), 9 * 270, Metric.of_weight(layer))]
    values = np.linalg.svd(layer.weight.detach().flatten(1).double().numpy(), compute_uv=False) ** 2
    assert losses == pytest.approx([1 - values[: r + 1].sum() / values.sum() for r in range(len(losses))])


def spread(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(0)
    return centred.T @ centred / len(rows)


def test_a_metric_is_what_the_loss_feels_of_the_responses(work: Work) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * 7 * 7, 10))
    found = metrics(net, {"0": net[0]}, work, images=20)["0"]  # type: ignore[dict-item]
    x, labels = next(work.data.batches("val", 20, 16, rng=None, limit=20))
    y = net[0](x).detach().requires_grad_()
    nn.functional.cross_entropy(net[3](y.clamp_min(0).flatten(1)), labels, reduction="sum").backward()
    assert y.grad is not None
    responses, gradients = (t.detach().permute(0, 2, 3, 1).reshape(-1, 3).double().numpy() for t in (y, y.grad))
    felt = gradients.T @ gradients / 20
    felt += DAMPING * np.trace(felt) / 3 * np.eye(3)
    np.testing.assert_allclose((found.root @ found.root).numpy(), felt, rtol=1e-4)
    np.testing.assert_allclose((found.root @ found.inverse).numpy(), np.eye(3), atol=1e-9)
    assert found.total() == pytest.approx(np.trace(felt @ spread(responses)), rel=1e-4)


def test_svd_in_a_metric_loses_the_last_eigenvalues_and_no_rank_loses_less() -> None:
    rng, layer = np.random.default_rng(0), nn.Linear(8, 6)
    x = rng.normal(size=(200, 8)) * np.arange(1, 9) + 3
    y = layer(torch.from_numpy(x).float()).detach().double().numpy()
    half = rng.normal(size=(6, 6))
    root = half @ half.T + np.eye(6)
    covariance = root @ spread(y) @ root
    metric = Metric(*map(torch.from_numpy, (root, np.linalg.inv(root), covariance, y.mean(0))))

    def lost(made: nn.Module) -> float:
        away = (made(torch.from_numpy(x).float()).detach().double().numpy() - y) @ root
        return float((away**2).sum(1).mean())

    options = {o.ranks[0]: o.loss for o in layer_options(layer, "svd", Pixels(1, 1, 1), 48, metric)}
    for rank in (1, 3):
        expected = np.linalg.eigvalsh(covariance)[: 6 - rank].sum()
        assert options[rank] == pytest.approx(expected, rel=1e-6)
        made = factorized(layer, "svd", (rank,), metric)
        assert lost(made) == pytest.approx(expected, rel=1e-3), "the bias makes up for the mean"
        assert lost(factorized(layer, "svd", (rank,))) > 1.05 * expected


def test_a_trained_network_keeps_more_where_images_tell_what_matters(work: Work) -> None:
    net = work.finetune(random_net(), Finetuning(epochs=4, lr=0.1))
    made = [LowRank(0.5, images=images, finetuning=BARE)(net, work) for images in (0, 200)]
    blind, seeing = (accuracy(thin, work.data, "test", resolution=16) for thin in made)
    assert seeing > blind + 0.1


class WithSpare(nn.Module):
    """A layer that does not run, and one whose output is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead, self.spare = nn.Linear(256, 10), nn.Linear(256, 8), nn.Linear(256, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.dead(x.flatten(1))
        return self.used(x.flatten(1))


def test_layers_that_do_nothing_do_no_harm(work: Work) -> None:
    net = WithSpare().eval()
    thin = LowRank(0.5, images=20, finetuning=BARE)(net, work)
    assert isinstance(thin.get_submodule("used"), nn.Sequential) and isinstance(thin.get_submodule("spare"), nn.Linear)
    pruned = Magnitude(0.5, criterion="fisher", images=20, finetuning=BARE)(net, work)
    kept = [int(layer.weight.count_nonzero()) for layer in (pruned.used, pruned.spare)]  # type: ignore[union-attr, arg-type]
    assert kept[0] > 1200 > kept[1]


def numpy_hosvd(weight: np.ndarray, inner: int, outer: int) -> np.ndarray:
    """The rank-(inner, outer) approximation by numpy's SVD of the two unfoldings."""
    u = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)[0][:, :outer]
    v = np.linalg.svd(weight.swapaxes(0, 1).reshape(weight.shape[1], -1), full_matrices=False)[0][:, :inner]
    return np.einsum("oiyx,op,rp,iq,sq->rsyx", weight, u, u, v, v)


def test_tucker_begins_with_hosvd_and_hooi_loses_no_more() -> None:
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64)

    def product(sweeps: int) -> Tensor:
        a, core, b = tucker(weight, (2, 3), sweeps)
        return torch.einsum("sryx,ir,os->oiyx", core, a, b)

    reference = numpy_hosvd(weight.numpy(), 2, 3)
    np.testing.assert_allclose(product(0).numpy(), reference, atol=1e-10)
    hosvd, hooi = ((weight - product(sweeps)).norm().item() for sweeps in (0, 10))
    assert hooi < hosvd
    layer = conv()
    with torch.no_grad():
        layer.weight.copy_(weight)
    options = {o.ranks: o for o in layer_options(layer, "tucker", Pixels(9, 9, 9), 9 * 270, Metric.of_weight(layer))}
    lost = hosvd**2 / weight.square().sum().item()
    assert options[2, 3].loss == pytest.approx(lost, rel=1e-4)
    assert options[2, 3].macs == 9 * (5 * 2 + 2 * 3 * 9 + 3 * 6)


def numpy_sweep(weight: np.ndarray, factors: list[np.ndarray]) -> list[np.ndarray]:
    """One sweep of alternating least squares by numpy's solver on Khatri-Rao products."""
    for mode in range(4):
        others = [factors[m] for m in range(4) if m != mode]
        khatri_rao = np.einsum("ar,br,cr->abcr", *others).reshape(-1, factors[0].shape[1])
        unfolded = np.moveaxis(weight, mode, 0).reshape(weight.shape[mode], -1)
        factors[mode] = np.linalg.lstsq(khatri_rao, unfolded.T, rcond=None)[0].T
        if mode < 3:
            factors[mode] = factors[mode] / np.linalg.norm(factors[mode], axis=0)
    return factors


def test_cp_is_the_same_sweep_as_numpys_and_finds_a_weight_of_its_rank() -> None:
    start = [torch.randn(n, 3, dtype=torch.float64) for n in (6, 5, 3, 3)]
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    expected = numpy_sweep(weight.numpy(), [factor.numpy().copy() for factor in start])
    for found, reference in zip(cp(weight, 3, 1, start), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), reference, rtol=1e-6, atol=1e-8)
    low = cp_product([torch.randn(n, 2, dtype=torch.float64) for n in (6, 5, 3, 3)])
    assert (low - cp_product(cp(low, 2, 500))).norm() < 0.01 * low.norm()
    assert (low - cp_product(cp(low, 1, 500))).norm() > 0.1 * low.norm()


def test_the_price_of_a_multiply_add_is_the_same_for_all_layers() -> None:
    options = {
        "a": [Option((), 0.0, 100), Option((2,), 0.1, 50), Option((1,), 0.5, 20)],
        "b": [Option((), 0.0, 100), Option((2,), 0.3, 50), Option((1,), 0.9, 10)],
    }
    assert {name: o.macs for name, o in choose(options, 150).items()} == {"a": 50, "b": 100}
    assert {name: o.macs for name, o in choose(options, 100).items()} == {"a": 50, "b": 50}
    assert {name: o.macs for name, o in choose(options, 200).items()} == {"a": 100, "b": 100}


@pytest.mark.parametrize("method", FULL)
def test_macs_are_at_most_the_target_and_near_it(method: str, work: Work) -> None:
    net, image = random_net(RESNET), torch.zeros(1, 1, 16, 16)
    before = layer_macs(net, image)
    thin = LowRank(0.6, method, finetuning=BARE)(net, work)
    after = sum(layer_macs(thin, image).values())
    assert 0.5 * sum(before.values()) < after <= 0.6 * sum(before.values())
    x = next(work.data.batches("test", 8, 16, rng=None))[0]
    session = open_session(onnx_model(thin, (1, 16, 16)).SerializeToString())
    np.testing.assert_allclose(
        session.run(None, {"input": x.contiguous().numpy()})[0], thin(x).detach().numpy(), rtol=1e-3, atol=1e-3
    )


def test_a_layer_that_runs_twice_counts_twice(work: Work) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, 2), conv, nn.ReLU(), conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(16, 10))
    image = torch.zeros(1, 1, 16, 16)
    after = sum(layer_macs(LowRank(0.7, images=0, finetuning=BARE)(net, work), image).values())
    assert after <= 0.7 * sum(layer_macs(net, image).values())


def test_a_factorized_network_is_trained_and_the_original_left_alone(work: Work) -> None:
    net = random_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    thin = LowRank(0.6, finetuning=replace(BARE, epochs=0.3))(net, work)
    assert isinstance(thin.units[2].depthwise.conv, nn.Conv2d), "depthwise convolutions are left alone"
    assert any(name.endswith("conv.0.weight") for name in thin.state_dict())
    assert all(before[name].equal(value) for name, value in net.state_dict().items())


def test_the_classifier_may_be_a_chain_of_two(work: Work) -> None:
    net, x = random_net(), torch.randn(5, 1, 16, 16)
    thin = opened(net)
    put(thin, "units.8", factorized(net.units[8], "svd", (10,)))
    with torch.inference_mode():
        torch.testing.assert_close(thin(x), net(x), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_factorized_is_answered(work: Work) -> None:
    with pytest.raises(UserError, match=r"macs 0.01 cannot be met: ranks of 1 leave [\d,]+ \(0\.\d+\); give more"):
        LowRank(0.01)(random_net(), work)
    with pytest.raises(UserError, match="method 'qr' is not known; choose from svd"):
        LowRank(method="qr")
    with pytest.raises(UserError, match="images -1 must be at least 0"):
        LowRank(images=-1)
    with pytest.raises(UserError, match="macs=0 must be above 0"):
        LowRank(0)
    with pytest.raises(UserError, match="no layer can be factorized: 1 are grouped"):
        LowRank(0.5, keep=("0",))(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4)), work)
