"""The first convolution that whitens: against the covariance of patches that numpy cuts out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from ofa.data import ImageData
from ofa.errors import UserError
from ofa.schedule import Phase, Schedule
from ofa.space import Layer, Space
from ofa.supernet import Supernet
from ofa.train import Trainer
from ofa.training.whiten import whiten
from tests.ofa.test_schedules import WATCH


def filters(net: Supernet) -> np.ndarray:
    """Those of the first convolution as rows."""
    return net.units[0].conv.weight.detach().flatten(1).double().numpy()  # type: ignore[union-attr,operator]


def correlations(rows: np.ndarray, data: ImageData, side: int) -> np.ndarray:
    """Second moments of what filters (F, 9) answer to all 3x3 patches of the training images of one channel."""
    x = torch.cat([x for x, _ in data.batches("train", 500, side, rng=None)])[:, 0].double().numpy()
    answers = sliding_window_view(x, (3, 3), axis=(1, 2)).reshape(-1, 9) @ rows.T
    return answers.T @ answers / len(answers)


def test_whitened_filters_come_in_pairs_whose_answers_are_decorrelated(data: ImageData, space: Space) -> None:
    net = Supernet(space)
    side, fresh = max(space.resolution), filters(net)[:5]
    whiten(net, data)
    own = filters(net)
    np.testing.assert_array_equal(own[1::2], -own[::2])
    assert np.abs(correlations(own[::2][:5], data, side) - np.eye(5)).max() < 0.25
    scale = np.sqrt(np.diag(found := correlations(fresh, data, side)))
    assert np.abs(found / np.outer(scale, scale) - np.eye(5)).max() > 0.5


def test_the_first_directions_have_the_most_variance_and_spare_filters_stay(data: ImageData, space: Space) -> None:
    wide = replace(space, stem=(replace(space.stem[0], channels=40), *space.stem[1:]), width=(1.0,))
    net = Supernet(wide)
    before = filters(net)
    whiten(net, data)
    lengths = np.linalg.norm(filters(net), axis=1)
    assert (np.diff(lengths[:18:2]) >= 0).all()  # over its deviation, a direction of less variance is longer
    np.testing.assert_array_equal(filters(net)[18:], before[18:])


def test_training_whitens_at_its_start_where_the_schedule_says_so(
    tmp_path: Path, data: ImageData, space: Space
) -> None:
    schedule = Schedule((Phase("one", 0.1, 0.05),), batch_size=32, whiten=True)
    reference = Supernet(space)
    whiten(reference, data)
    for asked in (True, False):
        run = Trainer(space, data, replace(schedule, whiten=asked), tmp_path / str(asked), watch=WATCH)
        assert np.array_equal(filters(run.supernet), filters(reference)) == asked


def test_a_space_without_a_first_convolution_is_explained(data: ImageData, space: Space) -> None:
    pooled = replace(space, stem=(Layer("maxpool"), *space.stem))
    with pytest.raises(UserError, match=r"whiten needs a stem that starts with a conv, not \['maxpool', .*=false"):
        whiten(Supernet(pooled), data)
