"""Accuracy after compression, learned from a few networks, against losses that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes, load_space
from predictors import Macs
from predictors.choose import choose_spread
from predictors.transfer import TransferredAccuracy

SPACE = load_space("digits_mbv3")
GENES = SPACE.sample(200, np.random.default_rng(0))
MACS = Macs(SPACE)


def base(genes: Genes) -> NDArray[np.float64]:
    return 0.5 + 0.05 * np.log(MACS(genes) / 1e5)


def test_a_constant_loss_is_learned_exactly() -> None:
    learned = TransferredAccuracy(SPACE, base).fit(GENES[:8], base(GENES[:8]) - 0.03)
    np.testing.assert_allclose(learned(GENES), base(GENES) - 0.03, atol=1e-9)
    assert learned.scores["rmse"] < 1e-9 < 0.029 < learned.scores["float_rmse"]


def test_a_loss_that_grows_with_size_is_followed_and_changes_the_ranking() -> None:
    def quantized(genes: Genes) -> NDArray[np.float64]:
        return base(genes) - 0.08 * np.log(MACS(genes) / 1e5)

    few = choose_spread(GENES, base(GENES), 12)
    learned = TransferredAccuracy(SPACE, base).fit(few, quantized(few))
    assert learned.scores["line"]
    error = np.sqrt(np.square(learned(GENES) - quantized(GENES)).mean())
    assert error < 0.2 * np.sqrt(np.square(base(GENES) - quantized(GENES)).mean())
    assert np.corrcoef(learned(GENES), base(GENES))[0, 1] < -0.9


def test_noise_alone_does_not_tilt_the_line() -> None:
    noise = np.random.default_rng(3).normal(0, 0.01, len(GENES))
    learned = TransferredAccuracy(SPACE, base).fit(GENES[:10], base(GENES[:10]) - 0.02 + noise[:10])
    assert np.abs(learned(GENES) - base(GENES) + 0.02).max() < 0.02


def test_what_was_saved_predicts_the_same(tmp_path: Path) -> None:
    learned = TransferredAccuracy(SPACE, base).fit(GENES[:8], base(GENES[:8]) * 0.9)
    learned.save(tmp_path / "t.json")
    again = TransferredAccuracy(SPACE, base).load(tmp_path / "t.json")
    np.testing.assert_array_equal(again(GENES), learned(GENES))


def test_spread_networks_reach_from_the_worst_to_the_best() -> None:
    few = base(choose_spread(GENES, base(GENES), 5))
    assert (few.min(), few.max()) == (base(GENES).min(), base(GENES).max())


def test_mistakes_are_answered() -> None:
    with pytest.raises(UserError, match="at least 5"):
        TransferredAccuracy(SPACE, base).fit(GENES[:4], np.ones(4))
    with pytest.raises(UserError, match="finite"):
        TransferredAccuracy(SPACE, base).fit(GENES[:6], np.full(6, np.nan))
    with pytest.raises(UserError, match="learned nothing"):
        TransferredAccuracy(SPACE, base)(GENES)
