"""Scores against values worked out by hand, and the honesty of held-out scoring."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from ofa.errors import UserError
from ofa.space import Genes
from predictors.scores import (
    coverage,
    held_out,
    kendall_tau,
    later_split,
    log_loss,
    mape,
    regret,
    rmse,
    sample_curve,
    score,
    top,
    within,
)


def test_scores_of_a_worked_example() -> None:
    predicted, measured = [1.0, 2.0, 4.0, 3.0], [1.0, 2.5, 3.0, 4.0]
    assert kendall_tau(predicted, measured) == pytest.approx(4 / 6)  # 5 pairs in order, 1 reversed
    assert rmse(predicted, measured) == pytest.approx(np.sqrt((0.25 + 1 + 1) / 4))
    assert mape(predicted, measured) == pytest.approx((0.2 + 1 / 3 + 0.25) / 4)
    assert within(predicted, measured) == 0.25
    assert within(predicted, measured, 0.25) == 0.75
    assert score(predicted, measured)["n"] == 4


def test_regret_of_the_top_k_is_what_its_best_lacks() -> None:
    predicted, measured = [0.9, 0.8, 0.7, 0.1], [1.0, 3.0, 2.0, 7.0]
    assert [regret(predicted, measured, k) for k in (1, 2, 3, 4)] == [6, 4, 4, 0]
    assert [top(n) for n in (2, 4, 12, 40, 1000)] == [1, 1, 3, 10, 10]


def test_coverage_and_log_loss_of_errors_that_are_normal_and_of_errors_twice_as_large() -> None:
    error = np.random.default_rng(0).standard_normal(100_000)
    zero, one = np.zeros_like(error), np.ones_like(error)
    assert coverage(zero, one, error, 0.5) == pytest.approx(0.5, abs=0.005)
    assert coverage(zero, one, error, 0.9) == pytest.approx(0.9, abs=0.005)
    assert coverage(zero, one, 2 * error, 0.9) == pytest.approx(0.589, abs=0.005)  # P(|N| < 1.645 / 2)
    assert log_loss(zero, one, error) == pytest.approx(0.5 * np.log(2 * np.pi * np.e), abs=0.01)
    assert log_loss(zero, one, 2 * error) > log_loss(zero, 2 * one, 2 * error)


def test_a_later_split_fits_on_the_worse_half_and_tests_on_the_better() -> None:
    values = np.random.default_rng(0).permutation(40).astype(float)
    train, test = later_split(values, 12, np.random.default_rng(1))
    assert len(train) == 12
    assert sorted(values[test]) == list(range(20, 40))
    assert values[train].max() < 20
    with pytest.raises(UserError, match="fit_on 21 exceeds the worse half of 40"):
        later_split(values, 21, np.random.default_rng(1))


def test_a_constant_prediction_ranks_nothing() -> None:
    assert kendall_tau([1, 1, 1], [1, 2, 3]) == 0.0


def test_arrays_of_two_lengths_are_an_error() -> None:
    with pytest.raises(UserError, match="two arrays of one length"):
        rmse([1, 2], [1, 2, 3])
    genes = np.arange(6, dtype=np.int8)[:, None]
    for values in (np.arange(5), np.arange(7), np.zeros((6, 1))):
        with pytest.raises(UserError, match=r"each of 6 networks needs one value, not an array of \("):
            held_out(lambda seed: Memory(), genes, values, fit_on=3)


@pytest.mark.parametrize("name", ["kendall_tau", "rmse", "mape", "within", "regret"])
def test_what_is_no_number_has_no_score(name: str) -> None:
    """A regret and a tau of 0 would hide it."""
    fn = {"kendall_tau": kendall_tau, "rmse": rmse, "mape": mape, "within": within, "regret": partial(regret, k=1)}[
        name
    ]
    for pair in (([1, np.nan, 2], [1, 2, 3]), ([1, 2, 3], [np.nan, 1, 2])):
        with pytest.raises(UserError, match=r"scores compare numbers; 1 of 3 pairs hold none \(nan\)"):
            fn(*pair)


def test_scores_are_of_one_split_at_least() -> None:
    with pytest.raises(UserError, match=r"repeats=0 must be a whole number, 1 or more"):
        held_out(lambda seed: Memory(), np.arange(6, dtype=np.int8)[:, None], np.arange(6.0), fit_on=3, repeats=0)


class Memory:
    """Knows what it was fitted on, and nothing else: perfect unless the split is honest."""

    def fit(self, genes: Genes, values: ArrayLike) -> Memory:
        self.known = {row.tobytes(): value for row, value in zip(genes, np.asarray(values), strict=True)}
        return self

    def __call__(self, genes: Genes) -> NDArray[np.float64]:
        return np.array([self.known.get(row.tobytes(), 0.0) for row in genes])


def test_held_out_architectures_were_never_fitted_on() -> None:
    genes = np.arange(40, dtype=np.int8)[:, None]
    found: dict[str, Any] = held_out(lambda seed: Memory(), genes, np.arange(1.0, 41.0), fit_on=30, repeats=3)
    assert found["kendall_tau"] == 0.0
    assert found["rmse"] > 10
    assert (found["fit_on"], found["held_out"], found["repeats"]) == (30, 10, 3)
    assert found["rmse_std"] > 0


def test_a_network_measured_several_times_is_not_on_both_sides_of_a_split() -> None:
    genes = np.arange(40, dtype=np.int8)[:, None].repeat(3, axis=0)
    found: dict[str, Any] = held_out(lambda seed: Memory(), genes, np.arange(1.0, 121.0), fit_on=30, repeats=3)
    assert found["kendall_tau"] == 0.0
    assert found["held_out"] == 10


def test_the_sample_curve_has_a_row_for_each_size() -> None:
    genes = np.arange(20, dtype=np.int8)[:, None]
    curve = sample_curve(lambda seed: Memory(), genes, np.arange(20.0), sizes=(5, 10), repeats=2)
    assert [row["fit_on"] for row in curve] == [5, 10]
    with pytest.raises(UserError, match="fit_on 19 must leave at least 2 of 20"):
        sample_curve(lambda seed: Memory(), genes, np.arange(20.0), sizes=(19,))
