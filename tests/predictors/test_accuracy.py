"""Learned accuracy: order and error on subnets that the fit never saw, uncertainty, persistence, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import multivariate_normal

from ofa.errors import UserError
from ofa.space import Genes, Space, load_space
from predictors import Accuracy, Macs
from predictors.accuracy import _choose
from predictors.features import Features
from predictors.gp import JITTER, GroupedGP, Scaled, negative_log_likelihood
from predictors.models import MODELS
from predictors.scores import held_out, kendall_tau, rmse
from predictors.warped import Warp, WarpedGP
from tests.predictors.published import read_genes


def made_up_accuracy(space: Space, genes: Genes) -> NDArray[np.float64]:
    """Grows with log MACs, depth and kernel, with a little noise: the shape that real tables have."""
    kernel = (space.values(genes, "kernel") * space.active(genes)[:, space.columns("kernel")]).sum(axis=1)
    depth = space.values(genes, "depth").sum(axis=1)
    noise = 0.05 * np.random.default_rng(9).standard_normal(len(genes))
    return 60 + 4 * np.log(Macs(space)(genes)) - 0.02 * (depth - 8) ** 2 + 0.05 * kernel + noise


@pytest.fixture(scope="module")
def sample() -> tuple[Space, Genes, NDArray[np.float64]]:
    space = load_space("cifar_mbv3")
    genes = space.sample(160, np.random.default_rng(0))
    return space, genes, made_up_accuracy(space, genes)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_ranks_subnets_it_never_saw(sample: tuple[Space, Genes, NDArray[np.float64]], model: str) -> None:
    space, genes, accuracy = sample
    predictor = Accuracy(space, model).fit(genes[:80], accuracy[:80])
    mean, std = predictor.predict(genes[80:])
    assert kendall_tau(mean, accuracy[80:]) > 0.8
    assert rmse(mean, accuracy[80:]) < 0.5 * accuracy.std()
    standardised = (accuracy[80:] - mean) / std
    assert 0.4 < np.sqrt(np.mean(standardised**2)) < 2.5


def test_auto_chooses_the_first_within_a_standard_error_of_the_best(
    sample: tuple[Space, Genes, NDArray[np.float64]],
) -> None:
    space, genes, accuracy = sample
    predictor = Accuracy(space, candidates=("boosting", "gp", "ridge")).fit(genes[:60], accuracy[:60])
    found = predictor.cross_validation
    assert set(found) == {"boosting", "gp", "ridge"}
    assert found["boosting"]["rmse"] > 1.3 * min(scores["rmse"] for scores in found.values())
    assert predictor.chosen in ("gp", "ridge")
    exact = np.full(4, 0.01)
    assert _choose({"a": np.array([0.0, 0, 0, 4]), "b": exact}) == "a"  # one outlier proves nothing
    assert _choose({"a": np.array([3.0, 4, 4, 4]), "b": exact}) == "b"


def test_shuffled_accuracies_teach_nothing(sample: tuple[Space, Genes, NDArray[np.float64]]) -> None:
    space, genes, accuracy = sample
    shuffled = np.random.default_rng(1).permutation(accuracy[:80])
    predictor = Accuracy(space, "gp").fit(genes[:80], shuffled)
    assert abs(kendall_tau(predictor(genes[80:]), accuracy[80:])) < 0.35
    assert predictor.cross_validation["gp"]["kendall_tau"] < 0.35


def test_published_once_for_all_accuracies_are_predicted(data_folder: Path) -> None:
    frame = pd.read_csv(data_folder / "tables/ofa_mbv3_w1.0_imagenet_r224.csv")
    space = load_space("ofa_mbv3_w1.0")
    genes = read_genes(space, frame)
    found = held_out(lambda seed: Accuracy(space, "gp", seed=seed), genes, frame.top1, fit_on=100, repeats=3)
    assert found["kendall_tau"] > 0.9
    assert found["rmse"] < 0.13


@pytest.mark.parametrize("model", ["gp", "svr", "boosting"])
def test_a_stored_predictor_answers_as_before(
    sample: tuple[Space, Genes, NDArray[np.float64]], model: str, tmp_path: Path
) -> None:
    space, genes, accuracy = sample
    predictor = Accuracy(space, model, seed=3).fit(genes[:40], accuracy[:40])
    predictor.save(tmp_path / "accuracy.json")
    again = Accuracy.load(tmp_path / "accuracy.json")
    for before, after in zip(predictor.predict(genes), again.predict(genes), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-12)
    assert again.to_dict() == predictor.to_dict()


def test_equal_networks_have_equal_features() -> None:
    space = load_space("digits_mbv3")
    genes = (np.random.default_rng(0).random((200, len(space.genes))) * space.counts).astype(np.int8)
    features = Features(space)
    np.testing.assert_array_equal(features(genes), features(space.canonical(genes)))
    assert features(genes).shape[1] == features.groups[-1].columns.stop
    assert len(np.unique(features(space.canonical(genes)), axis=0)) == len(np.unique(space.canonical(genes), axis=0))


def naive_likelihood(p: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """-log N(y; 0, K), K written out pair by pair, for two groups of two features."""
    w, a, (s, noise) = np.exp(p[:2]), np.exp(p[2:4]), np.exp(p[4:])
    groups, n = (slice(0, 2), slice(2, 4)), len(y)
    apart = [np.mean([[((u[g] - v[g]) ** 2).sum() for u in x] for v in x]) for g in groups]
    length = [np.mean([(u[g] ** 2).sum() for u in x]) for g in groups]
    k = np.zeros((n, n))
    for i, u in enumerate(x):
        for j, v in enumerate(x):
            r = np.sqrt(5 * sum(w[c] * ((u[g] - v[g]) ** 2).sum() / apart[c] for c, g in enumerate(groups)))
            line = sum(a[c] * u[g] @ v[g] / length[c] for c, g in enumerate(groups))
            k[i, j] = s * (1 + r + r**2 / 3) * np.exp(-r) + line + (noise + JITTER) * (i == j)
    return float(-multivariate_normal(np.zeros(n), k).logpdf(y) - 0.5 * n * np.log(2 * np.pi))


def test_the_marginal_likelihood_is_that_of_a_kernel_written_out_pair_by_pair_and_so_is_its_gradient() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 4)), rng.standard_normal(12)
    data = Scaled(x, [slice(0, 2), slice(2, 4)])
    point = 0.3 * rng.standard_normal(6)
    value, gradient = negative_log_likelihood(point, data, y)
    assert value == pytest.approx(naive_likelihood(point, x, y), rel=1e-9)
    for i, step in enumerate(1e-5 * np.eye(6)):
        up, down = (naive_likelihood(point + s, x, y) for s in (step, -step))
        assert gradient[i] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-6)


def test_a_warp_undoes_itself_and_its_slope_is_that_of_finite_differences() -> None:
    y = np.array([60.0, 70.0, 75.0, 76.0])
    warp = Warp.above(y, 0.5)
    assert warp.top == pytest.approx(76 + 0.5 * y.std())
    np.testing.assert_allclose(warp.back(warp(y), np.zeros(4))[0], y)
    slopes = (warp(y + 1e-6) - warp(y - 1e-6)) / 2e-6
    assert warp.log_slope(y) == pytest.approx(np.log(slopes).sum(), rel=1e-6)
    drawn = np.random.default_rng(0).standard_normal(400_000) * 0.3
    mean, std = warp.back(np.zeros(1), np.array([0.3]))
    back = warp.back(drawn, np.zeros(len(drawn)))[0]
    assert mean[0] == pytest.approx(back.mean(), abs=0.02)
    assert std[0] == pytest.approx(back.std(), rel=0.02)


def test_a_target_that_saturates_is_warped_and_a_straight_one_is_not() -> None:
    x = np.random.default_rng(0).standard_normal((80, 3))
    line = x @ np.array([1.0, 0.5, 0.2])
    straight = WarpedGP([slice(0, 3)]).fit(x, line / line.std())
    bent = -np.exp(-1.5 * line)
    saturating = WarpedGP([slice(0, 3)]).fit(x, (bent - bent.mean()) / bent.std())
    assert np.isinf(max(warp.top for warp, _ in straight.members))
    assert np.isfinite(max(warp.top for warp, _ in saturating.members))


def test_a_gaussian_process_is_sure_where_it_measured_and_unsure_elsewhere() -> None:
    x = np.linspace(-1, 1, 30)[:, None]
    process = GroupedGP([slice(0, 1)]).fit(x, np.sin(3 * x[:, 0]))
    mean, std = process.predict(np.array([[0.5], [4.0]]))
    assert mean[0] == pytest.approx(np.sin(1.5), abs=0.02)
    assert std[0] < 0.05 < std[1]


def test_a_fold_whose_best_network_is_better_than_all_before_is_fitted() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((40, 3))
    y = -np.exp(-1.5 * x @ np.array([1.0, 0.5, 0.2]))
    process = WarpedGP([slice(0, 3)]).fit(x, (y - y.mean()) / y.std())
    mean, _ = process.refit(x, 10 * y + 5).predict(x)  # far above the top of the first fit
    assert rmse(mean, 10 * y + 5) < 0.1 * 10 * y.std()


def test_mistakes_are_answered_with_rule_value_and_remedy(tmp_path: Path) -> None:
    space = load_space("digits_mbv3")
    genes = space.sample(12, np.random.default_rng(0))
    with pytest.raises(UserError, match="'forest' is not known; choose from auto, gp"):
        Accuracy(space, "forest")
    with pytest.raises(UserError, match="9 measured subnets are too few"):
        Accuracy(space, "ridge").fit(genes[:9], np.arange(9.0))
    with pytest.raises(UserError, match="one finite number for each of 12"):
        Accuracy(space, "ridge").fit(genes, np.full(12, np.nan))
    with pytest.raises(UserError, match="learned nothing yet"):
        Accuracy(space, "ridge")(genes)
    (tmp_path / "broken.json").write_text(json.dumps({"model": "gp"}))
    with pytest.raises(UserError, match="lacks 'space'"):
        Accuracy.load(tmp_path / "broken.json")
