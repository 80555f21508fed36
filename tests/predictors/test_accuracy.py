"""Learned accuracy: order and error on subnets that the fit never saw, uncertainty, persistence, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes, Space, load_space
from predictors import Accuracy, Macs
from predictors.features import Features
from predictors.gp import GroupedGP, _negative_log_likelihood
from predictors.models import MODELS
from predictors.scores import held_out, kendall_tau, rmse
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


def test_auto_chooses_the_best_by_cross_validation(sample: tuple[Space, Genes, NDArray[np.float64]]) -> None:
    space, genes, accuracy = sample
    predictor = Accuracy(space, candidates=("boosting", "gp", "ridge")).fit(genes[:60], accuracy[:60])
    found = predictor.cross_validation
    assert set(found) == {"boosting", "gp", "ridge"}
    best = max(round(scores["kendall_tau"], 2) for scores in found.values())
    assert predictor.chosen is not None
    assert round(found[predictor.chosen]["kendall_tau"], 2) == best


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


def test_gradient_of_the_marginal_likelihood_is_that_of_finite_differences() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 4)), rng.standard_normal(12)
    distances, products = GroupedGP([slice(0, 2), slice(2, 4)])._grams(x)
    point = 0.3 * rng.standard_normal(6)
    _, gradient = _negative_log_likelihood(point, distances, products, y)
    for i, step in enumerate(1e-6 * np.eye(6)):
        up, down = (_negative_log_likelihood(point + s, distances, products, y)[0] for s in (step, -step))
        assert gradient[i] == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-6)


def test_a_gaussian_process_is_sure_where_it_measured_and_unsure_elsewhere() -> None:
    x = np.linspace(-1, 1, 30)[:, None]
    process = GroupedGP([slice(0, 1)]).fit(x, np.sin(3 * x[:, 0]))
    mean, std = process.predict(np.array([[0.5], [4.0]]))
    assert mean[0] == pytest.approx(np.sin(1.5), abs=0.02)
    assert std[0] < 0.05 < std[1]


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
