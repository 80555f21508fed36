"""ofa-train: what would fail after the training is answered before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from PIL import Image

from ofa.errors import UserError
from scripts.train import main


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("train.rank.nets=2", "2 nets have no rank correlation to speak of; give a whole number, at least 3"),
        ("train.rank.nets=3.5", "3.5 nets have no rank correlation to speak of; give a whole number, at least 3"),
        ("train.rank={nets: 3, lr: 0}", "lr 0, batch_size 64: give"),
        ("train.watch.images=0", "watch.images 0; give .* 1 image or null for all"),
        ("train.watch.random_nets=-1", "watch.random_nets is -1, .* at least 0 nets"),
        ("train.watch.calibration=null", "Watch has calibration=None; give a whole number"),
        ("train.accumulate=1.5", "Scale has accumulate=1.5; give a whole number"),
        ("train.parallel.start=null", "Parallel has start=None; give a whole number"),
        ("train.rollback.attempts=1.5", "Safety has attempts=1.5; give a whole number"),
        ("train.save_seconds=null", "Trainer has save_seconds=None; give a number"),
        ("train.save_seconds=nan", "save_seconds is nan; give seconds between checkpoints"),
        ("train.save_seconds=-1", "save_seconds is -1; give seconds"),
        ("train.average=often", "Trainer has average=often; give a number or null"),
        ("train.loggers=[board]", "logger board is not known; choose from tensorboard, wandb, or .. for none"),
        ("train.loggers=null", "logger None is not known"),
    ],
)
def test_a_mistake_is_answered_before_any_training(tmp_path: Path, option: str, answer: str) -> None:
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("config", [f"run={tmp_path}", "schedule.epochs=0.1", "train.device=cpu", option])
    with pytest.raises(UserError, match=answer):
        main(cfg)
    assert not any((tmp_path / "train").glob("**/checkpoint*")), "nothing was trained"


def test_images_stored_smaller_than_the_space_asks_for_are_refused(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(9):
            Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(tmp_path / f"photos/{name}/{i}.png")
    options = ["experiment=folder", f"data.path={tmp_path / 'photos'}", f"run={tmp_path / 'run'}", "data.size=24"]
    options += ["data.val_size=4", "data.test_size=4"]
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("config", options)
    with pytest.raises(UserError, match=r"data.size=24 stores images below the largest resolution of the space, 32"):
        main(cfg)
    assert not (tmp_path / "run/train").exists()
