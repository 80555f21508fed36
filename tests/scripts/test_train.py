"""ofa-train: what would fail after the training is answered before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from ofa.errors import UserError
from scripts.train import main


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("train.rank.nets=2", "2 nets have no rank correlation to speak of; give at least 3"),
        ("train.rank={nets: 3, lr: 0}", "lr 0, batch_size 64: give"),
        ("train.watch.images=0", "watch.images 0; give .* 1 image or null for all"),
        ("train.watch.random_nets=-1", "watch.random_nets is -1, .* at least 0 nets"),
    ],
)
def test_a_mistake_is_answered_before_any_training(tmp_path: Path, option: str, answer: str) -> None:
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("config", [f"run={tmp_path}", "schedule.epochs=0.1", "train.device=cpu", option])
    with pytest.raises(UserError, match=answer):
        main(cfg)
    assert not any((tmp_path / "train").glob("**/checkpoint*")), "nothing was trained"
