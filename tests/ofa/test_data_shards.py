"""Data larger than memory: ImageNet's layout, row groups read in windows, bounded memory."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ofa.data import ImageData, imagenet, parquet
from ofa.data.decode import Encoded
from ofa.data.rows import Rows
from ofa.data.shards import GroupColumn, Windows
from ofa.errors import UserError
from scripts.benchmarks import data_larger_than_memory as photos


@pytest.fixture(scope="module")
def folder(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 real photographs of many sizes in ImageNet's layout, and as Parquet files with row groups of 25."""
    path = tmp_path_factory.mktemp("photographs")
    photos.write(path, photos.photographs(data_folder / "cifar10", 200), group=25)
    return path


def test_imagenets_layout_is_read_and_its_val_is_for_the_final_report(folder: Path) -> None:
    data = imagenet(folder / "files", size=64, val_size=30)
    assert data.classes == tuple(sorted(photos.WORDNET))
    assert [data.size(split) for split in ("train", "val", "test")] == [150, 30, 20]
    assert data.channels == 3 and data.side == 64


def flatten(root: Path, flat: Path) -> dict[str, str]:
    """A copy whose val is one folder; the class of each of its images."""
    flat.mkdir()
    (flat / "train").symlink_to(root / "train")
    (flat / "val").mkdir()
    named = {path.name: path.parent.name for path in (root / "val").rglob("*.JPEG")}
    for path in (root / "val").rglob("*.JPEG"):
        (flat / "val" / path.name).symlink_to(path)
    return named


def test_a_flat_val_folder_has_the_labels_of_its_file(folder: Path, tmp_path: Path) -> None:
    named = flatten(folder / "files", tmp_path / "flat")
    expected = imagenet(folder / "files", size=16, val_size=30).classes
    numbers = [expected.index(named[name]) for name in sorted(named)]
    csv = "ImageId,PredictionString\n" + "".join(f"{Path(n).stem},{c} 1 2 3 4\n" for n, c in reversed(named.items()))
    (tmp_path / "flat/LOC_val_solution.csv").write_text(csv)
    assert imagenet(tmp_path / "flat", size=16, val_size=30).test.labels.tolist() == numbers
    (tmp_path / "flat/mine.txt").write_text("\n".join(named[name] for name in sorted(named)))
    assert imagenet(tmp_path / "flat", size=16, val_size=30, labels="mine.txt").test.labels.tolist() == numbers


def test_a_flat_val_folder_may_have_hidden_entries(folder: Path, tmp_path: Path) -> None:
    named = flatten(folder / "files", tmp_path / "flat")
    (tmp_path / "flat/val_labels.txt").write_text("\n".join(named[name] for name in sorted(named)))
    (tmp_path / "flat/val/.cache").mkdir()
    (tmp_path / f"flat/val/._{min(named)}").write_bytes(b"a resource fork")
    assert imagenet(tmp_path / "flat", size=16, val_size=30).size("test") == len(named)


def test_a_flat_val_folder_takes_the_same_kinds_of_files_as_folders_of_classes(folder: Path, tmp_path: Path) -> None:
    named = flatten(folder / "files", tmp_path / "flat")
    first = min((tmp_path / "flat/val").iterdir())
    first.rename(first.with_suffix(".webp"))
    (tmp_path / "flat/val_labels.txt").write_text("\n".join(named[name] for name in sorted(named)))
    assert imagenet(tmp_path / "flat", size=16, val_size=30).size("test") == len(named)


def test_mistakes_in_the_layout_are_explained(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder train"):
        imagenet(tmp_path)
    shutil.copytree(folder / "files", tmp_path / "files")
    (tmp_path / "files/train/n02").mkdir()
    with pytest.raises(UserError, match=r"train/n02 holds no images; add some \(\.jpg, .*\) or remove the folder"):
        imagenet(tmp_path / "files")
    named = flatten(folder / "files", tmp_path / "flat")
    with pytest.raises(UserError, match=r"no LOC_val_solution\.csv or"):
        imagenet(tmp_path / "flat")
    file = tmp_path / "flat/val_labels.txt"
    file.write_text("n01440764\n")
    with pytest.raises(UserError, match="1 labels for the 20 images"):
        imagenet(tmp_path / "flat")
    file.write_text("\n".join(["n9"] * len(named)))
    with pytest.raises(UserError, match="'n9', which is no folder of train"):
        imagenet(tmp_path / "flat")
    file.write_text("other.JPEG n01440764\n")
    with pytest.raises(UserError, match="no label for val_0"):
        imagenet(tmp_path / "flat")


def test_windows_hold_every_image_once_and_few_groups_at_a_time() -> None:
    groups = np.repeat(np.arange(10), [5, 9, 7, 3, 8, 6, 5, 9, 4, 4])
    windows, rng = Windows(groups, 3), np.random.default_rng(0)
    order = windows.gather(rng.permutation(60), rng)
    assert sorted(order) == list(range(60))
    visited = groups[order]
    runs = [0] + [i for i in range(1, 60) if not set(visited[:i]) & set(visited[i:])] + [60]
    parts = [set(visited[a:b].tolist()) for a, b in pairwise(runs)]
    assert [len(part) for part in parts] == [3, 3, 3, 1]
    assert any(np.diff(visited[: runs[1]]) < 0) and any(np.diff(visited[: runs[1]]) > 0), "images of a window mix"


def streamed(folder: Path, workers: int = 0) -> ImageData:
    return parquet(folder / "parquet", size=32, channels=3, val_size=20, memory_limit=2e5, workers=workers, buffer=2)


def test_row_groups_give_the_images_that_memory_gives(folder: Path) -> None:
    held, few = parquet(folder / "parquet", size=32, channels=3, val_size=20), streamed(folder)
    assert isinstance(few.train.images, Encoded) and isinstance(few.val.images, torch.Tensor), "small splits are held"
    a, b = (next(data.batches("train", 160, 32, rng=None)) for data in (held, few))
    assert torch.equal(a[1], b[1])
    assert torch.allclose(a[0], b[0], atol=0.05), "mean and deviation are of the same images"


def test_an_epoch_is_shuffled_repeatable_and_resumable_and_reads_each_group_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, loads = streamed(folder), list[int]()
    source = data.train.images.source
    assert isinstance(source, Rows) and isinstance(source.column, GroupColumn)
    load = GroupColumn._load

    def counted(column: GroupColumn, file: int, group: int) -> object:
        loads.append(group)
        assert len(column.held) < column.buffer
        return load(column, file, group)

    source.column.held.clear()
    monkeypatch.setattr(GroupColumn, "_load", counted)
    whole = [y for _, y in data.batches("train", 16, 32, rng=np.random.default_rng(3))]
    count = pq.ParquetFile(folder / "parquet/train.parquet").num_row_groups
    assert len(loads) <= count + 1 and set(loads) == set(range(count)), "the first is read to look at an image"
    again = [y for _, y in data.batches("train", 16, 32, rng=np.random.default_rng(3), start=4)]
    assert torch.equal(torch.cat(whole[4:]), torch.cat(again))
    assert sorted(torch.cat(whole).tolist()) == sorted(data.train.labels.tolist())
    other = torch.cat([y for _, y in data.batches("train", 16, 32, rng=np.random.default_rng(4))])
    assert not torch.equal(torch.cat(whole), other)


def test_worker_processes_give_the_same_batches(folder: Path) -> None:
    alone, helped = (
        [x for x, _ in streamed(folder, workers).batches("train", 40, 32, rng=np.random.default_rng(0))]
        for workers in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(data_folder: Path, tmp_path: Path) -> None:
    photos.write(tmp_path, photos.photographs(data_folder / "cifar10", 6000))  # far more than what a process varies by
    held, files, groups = (photos.measure(mode, tmp_path, 1) for mode in ("held", "files", "row groups"))
    decoded = 5400 * 256 * 256 * 3 / 2**20
    for few in (files, groups):
        assert few["peak_mb"] < held["peak_mb"] - 0.7 * decoded
        assert few["worker_mb"] < few["peak_mb"] + 100
