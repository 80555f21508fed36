"""Learned accuracy: order and error on subnets that the fit never saw, uncertainty, persistence, mistakes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import multivariate_normal

from ofa.errors import UserError
from ofa.space import Arch, Genes, Space, load_space
from predictors import Accuracy, LearnedLatency, Macs
from predictors.accuracy import _choose
from predictors.averaged import AveragedGP
from predictors.calibration import Calibration
from predictors.features import Features
from predictors.fitting import fit_accuracy
from predictors.gp import GroupedGP, WarpedGP
from predictors.likelihood import (
    JITTER,
    Correlation,
    Scaled,
    gaussian,
    matern32,
    matern52,
    negative_log_likelihood,
    warped_likelihood,
)
from predictors.models import MODELS
from predictors.scores import coverage, held_out, kendall_tau, later_split, rmse
from predictors.tables import read_table
from predictors.warp import Warp
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
    value, gradient, by_y = negative_log_likelihood(point, data, y, matern52)
    assert value == pytest.approx(naive_likelihood(point, x, y), rel=1e-9)
    for i, step in enumerate(1e-5 * np.eye(6)):
        up, down = (naive_likelihood(point + s, x, y) for s in (step, -step))
        assert gradient[i] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-6)
    for i, step in enumerate(1e-5 * np.eye(12)):
        up, down = (naive_likelihood(point, x, y + s) for s in (step, -step))
        assert by_y[i] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-6)


def test_the_likelihood_of_a_warped_target_is_that_of_even_ones_less_the_slope_of_each_value() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 4)), rng.standard_normal(12)
    y[:3] = y.max()
    data, best = Scaled(x, [slice(0, 2), slice(2, 4)]), float(y.max())
    point = np.append(0.3 * rng.standard_normal(6), 0.2)

    def naive(p: NDArray[np.float64]) -> float:
        z = -np.log(best + np.exp(p[-1]) - y)
        even = (z - z.mean()) / z.std()
        return naive_likelihood(p[:-1], x, even) - float(np.log(np.exp(np.unique(z)) / z.std()).sum())

    value, gradient = warped_likelihood(point, data, y, best, matern52)
    assert value == pytest.approx(naive(point), rel=1e-9)
    for i, step in enumerate(1e-5 * np.eye(7)):
        assert gradient[i] == pytest.approx((naive(point + step) - naive(point - step)) / 2e-5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("correlation", [matern32, matern52, gaussian])
def test_a_correlation_is_1_at_no_distance_and_falls_as_its_derivative_says(correlation: Correlation) -> None:
    squared = np.array([0.1, 1.0, 9.0])
    up, down = (correlation(squared + step)[0] for step in (1e-6, -1e-6))
    np.testing.assert_allclose(correlation(squared)[1], (down - up) / 2e-6, rtol=1e-6)
    assert correlation(np.zeros(1))[0] == 1


def test_a_warp_undoes_itself_and_its_slope_is_that_of_finite_differences() -> None:
    y = np.array([60.0, 70.0, 75.0, 76.0])
    warp = Warp.below(79.0, y)
    np.testing.assert_allclose([warp(y).mean(), warp(y).std()], [0, 1], atol=1e-12)
    np.testing.assert_allclose(warp.back(warp(y), np.zeros(4))[0], y)
    slopes = (warp(y + 1e-6) - warp(y - 1e-6)) / 2e-6
    assert warp.log_slope(y) == pytest.approx(np.log(slopes).sum(), rel=1e-6)
    drawn = np.random.default_rng(0).standard_normal(400_000) * 0.3
    mean, std = warp.back(np.zeros(1), np.array([0.3]))
    back = warp.back(drawn, np.zeros(len(drawn)))[0]
    assert mean[0] == pytest.approx(back.mean(), abs=0.02)
    assert std[0] == pytest.approx(back.std(), rel=0.02)


def test_a_target_that_saturates_is_warped_more_than_a_straight_one() -> None:
    x = np.random.default_rng(0).standard_normal((80, 3))
    line = x @ np.array([1.0, 0.5, 0.2])
    straight = WarpedGP([slice(0, 3)]).fit(x, line / line.std())
    bent = -np.exp(-1.5 * line)
    saturating = WarpedGP([slice(0, 3)]).fit(x, (bent - bent.mean()) / bent.std())
    assert np.exp(saturating.point[-1]) < 0.5 < 10 < np.exp(straight.point[-1])


def test_a_rough_target_gets_the_rough_kernel_and_a_smooth_one_the_smooth_kernel() -> None:
    x = np.random.default_rng(0).uniform(-2, 2, (80, 1))
    smooth = AveragedGP([slice(0, 1)]).fit(x, np.sin(3 * x[:, 0]))
    rough = AveragedGP([slice(0, 1)]).fit(x, np.abs(((2 * x[:, 0]) % 1) - 0.5))
    assert [member.correlation for member in smooth.members] == [gaussian]
    assert [member.correlation for member in rough.members] == [matern32]


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
    process = AveragedGP([slice(0, 3)]).fit(x, (y - y.mean()) / y.std())
    mean, _ = process.refit(x, 10 * y + 5).predict(x)  # far above the top of the first fit
    assert rmse(mean, 10 * y + 5) < 0.1 * 10 * y.std()


def test_deviations_grow_where_a_network_is_expected_to_be_better_than_all_measured_ones() -> None:
    calibration = Calibration(within=1.5, beyond=4.0, best=70.0)
    mean, std = np.array([60.0, 70.0, 80.0]), np.full(3, 0.5)
    expected = 0.5 * np.sqrt([1.5**2, (1.5**2 + 4.0**2) / 2, 4.0**2])
    np.testing.assert_allclose(calibration(mean, std), expected)


def test_better_networks_than_the_measured_ones_lie_within_their_intervals(data_folder: Path) -> None:
    frame = pd.read_csv(data_folder / "tables/nas_bench_macro.csv", dtype={"arch": str})
    space, accuracy = load_space("nas_bench_macro"), frame.mean_acc.to_numpy()
    genes = space.encode([Arch(32, op=tuple(map(int, arch))) for arch in frame.arch])
    train, test = later_split(accuracy, 100, np.random.default_rng(0))
    predictor = Accuracy(space, "gp").fit(genes[train], accuracy[train])
    mean, std = predictor.predict(genes[test])
    assert coverage(mean, std, accuracy[test], 0.9) > 0.8
    raw = predictor._fitted.predict(Features(space)(genes[test]))[1]
    assert coverage(mean, raw * predictor._calibration.within, accuracy[test], 0.9) < 0.5


def test_a_network_measured_again_is_no_second_witness() -> None:
    """Twice the same rows: the same predictor, deviations and all; other values of a network count by their mean."""
    space = load_space("cifar_mbv3")
    genes = space.sample(60, np.random.default_rng(0))
    accuracy = np.log(Macs(space)(genes)) + np.random.default_rng(1).normal(0, 0.1, 60)
    once, asked = Accuracy(space, "gp").fit(genes, accuracy), space.sample(50, np.random.default_rng(2))
    again = np.concatenate([accuracy + 0.3, accuracy - 0.3])
    twice = Accuracy(space, "gp").fit(np.concatenate([genes, genes]), again)
    np.testing.assert_allclose(twice.predict(asked), once.predict(asked), rtol=1e-6)
    with pytest.raises(UserError, match="6 measured subnets are too few"):
        Accuracy(space, "gp").fit(genes[:6].repeat(5, axis=0), np.arange(30.0))


@pytest.mark.parametrize("model", [*MODELS, "auto"])
@pytest.mark.filterwarnings("error")
def test_where_all_are_equal_so_is_the_prediction_and_the_deviation_is_finite(model: str) -> None:
    space = load_space("digits_mbv3")
    predictor = Accuracy(space, model).fit(space.sample(30, np.random.default_rng(0)), np.full(30, 0.1))
    mean, std = predictor.predict(space.sample(20, np.random.default_rng(1)))
    np.testing.assert_allclose(mean, 0.1, atol=0.02)
    assert (np.isfinite(std) & (std > 0)).all()


@pytest.mark.parametrize("value", [0.1, 0.5, 71.3])
@pytest.mark.parametrize("n", [10, 12, 20])
def test_equal_accuracies_give_that_accuracy_and_no_spread(value: float, n: int) -> None:
    for name in ("digits_mbv3", "ofa_mbv3_w1.0"):
        space = load_space(name)
        predictor = Accuracy(space, "gp").fit(space.sample(n, np.random.default_rng(0)), np.full(n, value))
        mean, std = predictor.predict(space.sample(50, np.random.default_rng(1)))
        np.testing.assert_allclose(mean, value, atol=1e-3)
        assert std.max() < 1e-3


def test_one_collapsed_network_says_nothing_of_the_others(data_folder: Path) -> None:
    """Deviations stay of the size of the errors, and `mean + std` proposes no networks that are bad."""
    frame = pd.read_csv(data_folder / "tables/nas_bench_macro.csv", dtype={"arch": str})
    space, accuracy = load_space("nas_bench_macro"), frame.mean_acc.to_numpy()
    genes = space.encode([Arch(32, op=tuple(map(int, arch))) for arch in frame.arch])
    covered, better = [], []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(genes))
        train, test = order[:60], order[60:1060]
        measured = accuracy[train].copy()
        measured[measured.argmin()] = 10.0
        mean, std = Accuracy(space, "gp", seed=seed).fit(genes[train], measured).predict(genes[test])
        covered.append(coverage(mean, std, accuracy[test], 0.9))
        proposed = accuracy[test][np.argsort(-mean - std)[:10]]
        better.append(np.mean(accuracy[test][:, None] > proposed))
    assert 0.85 < np.mean(covered) < 0.99
    assert np.mean(better) < 0.6


@pytest.mark.parametrize("at_chance", [0.6, 0.9])  # of 40: the whole worse half, all but 4
def test_deviations_stay_of_the_size_of_the_accuracies_where_most_networks_are_at_chance(at_chance: float) -> None:
    space = load_space("digits_mbv3")
    genes = space.sample(240, np.random.default_rng(40))
    size = np.log(Macs(space)(genes))
    accuracy = 0.1 + 0.2 * np.maximum(size - np.quantile(size, at_chance), 0)
    mean, std = Accuracy(space, "gp").fit(genes[:40], accuracy[:40]).predict(genes[40:])
    assert std.max() < 5 * np.ptp(accuracy)
    assert coverage(mean, std, accuracy[40:], 0.9) > 0.8


@pytest.mark.parametrize(("share", "seed"), [(0.6, 0), (0.6, 1), (0.9, 4)])  # half work; one of a dozen does
def test_a_dozen_networks_that_work_or_fail_give_deviations_of_the_size_of_the_errors(share: float, seed: int) -> None:
    space, rng = load_space("digits_mbv3"), np.random.default_rng((seed, 12))
    genes = space.sample(212, rng)
    size = np.log(Macs(space)(genes))
    works = size + 0.3 * size.std() * rng.normal(size=212) > np.quantile(size, share)
    accuracy = np.where(works, 0.6, 0.1)
    mean, std = Accuracy(space, "gp").fit(genes[:12], accuracy[:12]).predict(genes[12:])
    assert std.max() < 2
    assert coverage(mean, std, accuracy[12:], 0.9) > 0.8


def test_auto_leaves_out_what_takes_minutes_with_many_samples() -> None:
    space = load_space("digits_mbv3")
    genes = np.unique(space.sample(1200, np.random.default_rng(0)), axis=0)
    accuracy = np.log(Macs(space)(genes))
    predictor = Accuracy(space, candidates=("ridge", "svr"))
    assert set(predictor.fit(genes[:40], accuracy[:40]).cross_validation) == {"ridge", "svr"}
    assert set(predictor.fit(genes[:1001], accuracy[:1001]).cross_validation) == {"ridge"}


def test_a_dozen_networks_are_enough_to_fit_and_to_score() -> None:
    space = load_space("digits_mbv3")
    genes = space.sample(12, np.random.default_rng(0))
    accuracy = np.log(Macs(space)(genes))
    make = partial(Accuracy, space, candidates=("ridge",))
    assert fit_accuracy(make, genes, accuracy)[1]["n_heldout"] == 2
    for rows in (range(11), [*range(11), 0, 0]):
        with pytest.raises(UserError, match=r"11 measured subnets are too few .* at least 12 \(measure.subnets\)"):
            fit_accuracy(make, genes[rows], accuracy[rows])
    for share in (0, 1, -0.5, 1.5):
        with pytest.raises(UserError, match=rf"share={share} must be above 0 and below 1, the part of the networks"):
            fit_accuracy(make, genes, accuracy, share=share)


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_an_accuracy_that_is_no_number_is_named(wrong: float) -> None:
    genes = load_space("digits_mbv3").sample(12, np.random.default_rng(0))
    with pytest.raises(UserError, match=rf"for each of 12 .* not \(12,\) numbers, {wrong} among them"):
        Accuracy(load_space("digits_mbv3"), "ridge").fit(genes, np.append(np.ones(11), wrong))


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
    (tmp_path / "broken.json").write_text("[1]")
    with pytest.raises(UserError, match=r"no stored accuracy predictor \(.*; fit and save it again"):
        Accuracy.load(tmp_path / "broken.json")
    with pytest.raises(UserError, match="no candidates to choose from; give some of gp"):
        Accuracy(space, candidates=[])


@pytest.mark.parametrize("make", [Accuracy, LearnedLatency])
@pytest.mark.parametrize(
    "change", [lambda g: g[0], lambda g: g[:, :3], lambda g: g.astype(int) + 256, lambda g: g + 0.3]
)
def test_genes_that_would_be_cut_to_others_are_refused(
    make: Callable[[Space], Accuracy | LearnedLatency], change: Callable[[Genes], NDArray[Any]]
) -> None:
    space = load_space("digits_mbv3")
    with pytest.raises(UserError, match=r"gene"):
        make(space).fit(change(space.sample(12, np.random.default_rng(0))), np.linspace(0.5, 0.9, 12))


def test_rank_correlation_of_one_pair_is_0_without_a_warning() -> None:
    with warnings.catch_warnings(action="error"):
        assert kendall_tau([1.0], [2.0]) == 0
    assert kendall_tau([1.0, 2.0], [3.0, 4.0]) == 1


def test_accuracy_is_learned_where_a_block_can_only_be_skipped() -> None:
    space = load_space("nas_bench_macro")
    space = replace(space, stages=(replace(space.stages[0], op=(0,)), *space.stages[1:]))
    genes = space.sample(20, np.random.default_rng(0))
    assert np.isfinite(Accuracy(space, "gp").fit(genes, Macs(space)(genes) / 1e8)(genes)).all()


def test_networks_recorded_at_chance_do_not_choose_the_model(data_folder: Path) -> None:
    space = load_space("ofa_mbv3_w1.0").restrict(resolution=[224])
    genes, top1 = read_table(data_folder / "tables/ofa_mbv3_w1.0_imagenet_r224.csv", space, "top1")
    order = np.random.default_rng(0).permutation(len(top1))
    train, test = order[:100], order[100:]
    recorded = top1.copy()
    recorded[train[:8]] = 0.1
    found = Accuracy(space).fit(genes[train], recorded[train])
    assert found.chosen in ("gp", "svr"), "ridge has the smallest squared error, and the order reversed"
    assert kendall_tau(found(genes[test]), top1[test]) > 0.5


def test_accuracies_that_are_no_numbers_are_refused_and_a_name_alone_is_a_candidate() -> None:
    space = load_space("digits_mbv3")
    genes = space.sample(12, np.random.default_rng(0))
    with pytest.raises(UserError, match=r"accuracy must hold one number for each network .*'a'"):
        Accuracy(space).fit(genes, ["a"] * 12)
    assert Accuracy(space, candidates="gp").candidates == ("gp",)
