"""ofa-import: what is in the run folder is what the command names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from PIL import Image

from ofa.errors import UserError
from ofa.files import read_json
from ofa.space import load_space
from ofa.supernet import Supernet
from scripts.import_ import main
from scripts.parts import TRAIN
from scripts.stage import open_stage
from tests.ofa.test_published import theirs


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_module("conf", version_base="1.3"):
        yield


def save(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    torch.save(theirs(Supernet(load_space("digits_mbv3")), old=False), path)
    return path


def run(folder: Path, *options: str) -> None:
    main(compose("config", [f"run={folder}/run", *options]))


def test_another_checkpoint_is_not_taken_for_the_one_that_was_imported(tmp_path: Path) -> None:
    first, second = save(tmp_path / "first.pth", 0), save(tmp_path / "second.pth", 1)
    run(tmp_path, f"checkpoint={first}")
    digest = read_json(tmp_path / "run/train/import.json")["sha256"]
    run(tmp_path, f"checkpoint={first.rename(tmp_path / 'moved.pth')}", f"sha256={digest.upper()}")
    with pytest.raises(UserError, match=rf"holds weights of {first}, SHA-256 {digest}, not of this.*restart=true"):
        run(tmp_path, f"checkpoint={second}")
    with pytest.raises(UserError, match="not of this checkpoint"):
        run(tmp_path, f"checkpoint={first}", "sha256=abc")
    run(tmp_path, f"checkpoint={second}", "restart=true")
    assert read_json(tmp_path / "run/train/import.json")["checkpoint"] == str(second)


def test_a_checkpoint_that_was_replaced_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    file = save(tmp_path / "net.pth", 0)
    run(tmp_path, f"checkpoint={file}")
    run(tmp_path, f"checkpoint={file}")
    save(file, 1)
    with pytest.raises(UserError, match="not of this checkpoint; give another run"):
        run(tmp_path, f"checkpoint={file}")
    file.unlink()
    run(tmp_path, f"checkpoint={file}")


def test_a_trained_supernet_is_not_taken_for_an_imported_one(tmp_path: Path) -> None:
    with open_stage(compose("config", [f"run={tmp_path}/run"]), "train", TRAIN):
        pass
    with pytest.raises(UserError, match="holds weights of training, SHA-256 None, not of this checkpoint"):
        run(tmp_path, f"checkpoint={save(tmp_path / 'net.pth', 0)}")


def test_data_of_other_classes_are_refused_before_and_asked_for_after(tmp_path: Path) -> None:
    torch.save(theirs(Supernet(load_space("mcunet")), old=False), tmp_path / "net.pth")
    options = ["space=mcunet", f"checkpoint={tmp_path}/net.pth"]
    assert main(compose("config", [f"run={tmp_path}/run", *options])) == ["data=folder", "data.path=<folder>"]
    for split in ("cat", "cow", "dog"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "photos" / split / f"{i}.png")
    with pytest.raises(
        UserError, match=r"mcunet is for images of 3 channels in 2 classes, photos has 3 in 3; import w"
    ):
        run(
            tmp_path / "other",
            *options,
            "data=folder",
            f"data.path={tmp_path}/photos",
            "data.test_size=2",
            "data.val_size=2",
        )
    assert not (tmp_path / "other/run").exists()
