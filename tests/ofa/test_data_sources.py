"""Where images come from: folders, Parquet files and CIFAR-10 in every form that they are found in."""

from __future__ import annotations

import io
import math
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from ofa.data import ImageData, cifar10, digits, folder, parquet
from ofa.data.images import Split
from ofa.data.sources import cut
from ofa.errors import UserError
from ofa.extraction import recalibrate
from ofa.training.watch import Watch
from tests.ofa.nets import SPEC, random_net

CIFAR = Path(os.environ.get("OFA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "cifar10" / "test.parquet"
SPLITS = ("train", "val", "test")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """`train/<digit>/<i>.png` of the first 200 digits and `test/...` of 40 more."""
    images = load_digits().images.astype(np.uint8) * 15
    for i, label in enumerate(load_digits().target[:240]):
        path = tmp_path / "pictures" / ("train" if i < 200 else "test") / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """`train.parquet` of 300 and `test.parquet` of 100 real photographs."""
    if not CIFAR.exists():
        pytest.skip(f"{CIFAR} is absent; set OFA_DATA to the folder of the development data")
    table = pq.ParquetFile(CIFAR).read_row_group(0).slice(0, 400)
    (tmp_path / "photos").mkdir()
    pq.write_table(table.slice(0, 300), tmp_path / "photos" / "train.parquet", row_group_size=70)
    pq.write_table(table.slice(300), tmp_path / "photos" / "test.parquet")
    return tmp_path / "photos"


def stored(data: ImageData, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images = data.split(split).images
    assert isinstance(images, Tensor)
    return images.permute(0, 2, 3, 1).numpy(), data.split(split).labels.numpy()


def decoded(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels of a Parquet file, read the straightforward way."""
    records = pq.read_table(file).to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(record["img"]["bytes"]))) for record in records]
    return np.stack(images), np.array([record["label"] for record in records])


def as_set(*parts: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> list[tuple[bytes, int]]:
    return sorted(
        (image.tobytes(), int(label)) for images, labels in parts for image, label in zip(images, labels, strict=True)
    )


# -- splits ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=2, max_size=200), st.integers(1, 200), st.integers(0, 9))
def test_a_cut_has_the_size_asked_for_and_the_same_share_of_each_class(values: list[int], size: int, seed: int) -> None:
    labels = np.array(values)
    most = len(labels) - len(set(values))
    if size > most:
        rule = f"data.val_size is {size}; give a whole number from 1 to {most} of" if most else "one a class, none can"
        with pytest.raises(UserError, match=rule):
            cut(labels, size, np.random.default_rng(seed), "val")
        return
    kept, taken = cut(labels, size, np.random.default_rng(seed), "val")
    assert len(taken) == size
    assert sorted([*kept, *taken]) == list(range(len(labels)))
    assert set(labels[kept]) == set(values)
    if size <= most // 2 and np.bincount(labels)[list(set(values))].min() > 10:
        share = np.bincount(labels) * size / len(labels)
        assert np.abs(np.bincount(labels[taken], minlength=len(share)) - share).max() <= 2


def test_a_share_that_is_less_than_an_image_is_answered() -> None:
    with pytest.raises(
        UserError, match=r"data\.val_size is 0\.1, no whole one of 5 images; give more images, or 0\.2$"
    ):
        cut(np.array([0, 0, 1, 1, 1]), 0.1, np.random.default_rng(0), "val")


def test_splits_of_one_image_are_refused_and_two_calibrate_maps_of_one_pixel() -> None:
    with pytest.raises(UserError, match=r"val of digits has 1 of the 2 images .* change data\.val_size"):
        digits(val_size=1)
    data = digits(val_size=2)
    with pytest.raises(UserError, match="train of digits has 1 of the 2 images"):
        replace(data, train=Split(data.train.images[:1], data.train.labels[:1]))
    with pytest.raises(UserError, match=r"watch\.calibration is 1; give at least 2"):
        Watch(calibration=1)
    recalibrate(random_net(replace(SPEC, resolution=8)), data.calibration("val", 256, 8))


@given(st.floats(0.01, 0.5), st.integers(100, 400))
def test_a_size_below_one_is_a_share(share: float, n: int) -> None:
    _, taken = cut(np.arange(n) % 3, share, np.random.default_rng(0), "val")
    assert len(taken) == round(share * n)


def test_the_seed_decides_the_splits() -> None:
    one, same, other = digits(), digits(), digits(seed=1)
    for split in SPLITS:
        assert np.array_equal(stored(one, split)[0], stored(same, split)[0])
    assert as_set(stored(one, "val")) != as_set(stored(other, "val"))
    assert as_set(stored(one, "test")) != as_set(stored(other, "test"))


@pytest.mark.parametrize("size", [0, -1, 2.5, 1788, 1.0e9, math.nan, math.inf])
def test_sizes_that_cannot_be_cut_are_refused(size: float) -> None:
    with pytest.raises(UserError, match=r"data.test_size is .*; give a whole number from 1 to 1787 of the 1797 images"):
        digits(test_size=size)


def test_one_image_a_class_cannot_be_cut() -> None:
    words = "of 3 images, one a class, none can be cut for val; add images, or a split val"
    with pytest.raises(UserError, match=words):
        cut(np.arange(3), 0.5, np.random.default_rng(0), "val")


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_as_it_is(pictures: Path) -> None:
    data = folder(pictures, val_size=30, flip=False)
    images, labels = load_digits().images.astype(np.uint8)[..., None] * 15, load_digits().target
    assert as_set(stored(data, "train"), stored(data, "val")) == as_set((images[:200], labels[:200]))
    assert as_set(stored(data, "test")) == as_set((images[200:240], labels[200:240]))
    assert (data.name, data.classes, data.size("val"), data.side) == ("pictures", tuple("0123456789"), 30, 8)


@pytest.mark.parametrize("ending", ["GIF", "avif", "jfif", "webp", "bmp", "tiff"])
def test_every_kind_of_image_counts(pictures: Path, ending: str) -> None:
    kind = {"jfif": "jpeg"}.get(ending, ending)
    Image.new("L", (8, 8), 200).save(pictures / f"train/0/200.{ending}", format=kind)
    assert folder(pictures, val_size=30, channels=1).size("train") == 201 - 30


def test_an_image_that_pillow_cannot_read_is_named_and_not_passed_over(pictures: Path) -> None:
    (pictures / "train/0/photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UserError, match=r"photo\.HEIC cannot be read as an image .*; mend or remove it"):
        folder(pictures, val_size=30)


def test_missing_splits_are_cut_from_train(pictures: Path) -> None:
    (pictures / "test").rename(pictures / "val")
    data = folder(pictures)
    assert [data.size(split) for split in SPLITS] == [160, 40, 40]  # val is the folder's, test a fifth of 200
    plain = folder(pictures / "train")
    assert [plain.size(split) for split in SPLITS] == [144, 16, 40]


def test_images_of_several_sizes_need_a_size(pictures: Path) -> None:
    wide = Image.new("L", (40, 20), 200)
    wide.paste(90, (10, 0, 30, 20))
    wide.save(pictures / "train" / "3" / "wide.png")
    with pytest.raises(
        UserError, match=r"3/wide.png has 40x20 pixels where the first image has 8x8 pixels; set data.size"
    ):
        folder(pictures)
    images = [image for split in SPLITS for image in stored(folder(pictures, size=10), split)[0]]
    assert {image.shape for image in images} == {(10, 10, 1)}
    assert any((image[:, 1:-1] == 90).all() for image in images)  # the middle of the wide one


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (7, 7, 7))])
def test_a_colour_that_a_png_calls_transparent_is_white(pictures: Path, mode: str, colour: int) -> None:
    image = Image.new(mode, (8, 8), colour)
    image.paste(Image.new(mode, (4, 4), "#464646"))
    image.save(pictures / "train" / "0" / "keyed.png", transparency=colour)
    found = [image for split in SPLITS for image in stored(folder(pictures, channels=len(mode)), split)[0]]
    assert sum(bool((image[:4, :4] == 70).all() and (image[4:] == 255).all()) for image in found) == 1


def test_images_of_several_modes_need_channels(pictures: Path) -> None:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(pictures / "train" / "0" / "red.png")
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.save(pictures / "train" / "0" / "clear.png")
    clear.convert("P").save(pictures / "train" / "0" / "palette.png", transparency=0)
    with pytest.raises(
        UserError, match=r"\.png has mode \w+ where the first image has L; set data.channels=1 \(grey\)"
    ):
        folder(pictures)
    found = [image for split in SPLITS for image in stored(folder(pictures, channels=3), split)[0]]
    assert sum((image == (255, 0, 0)).all() for image in found) == 1
    assert sum((image == 255).all() for image in found) == 2
    assert folder(pictures, channels=1).channels == 1


def test_the_first_image_must_be_grey_or_rgb(pictures: Path) -> None:
    for path in pictures.rglob("*.png"):
        Image.open(path).convert("RGBA").save(path)
    with pytest.raises(UserError, match=r"has mode RGBA, neither grey \(L\) nor RGB; set data.channels=1"):
        folder(pictures)


def test_more_than_8_bits_are_refused(pictures: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(pictures / "train" / "0" / "deep.png")
    for channels in (1, None):
        with pytest.raises(UserError, match=r"deep.png has more than 8 bits a channel \(mode I;16\)"):
            folder(pictures, channels=channels)
    for path in (pictures / "train").rglob("*.png"):
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path)
    with pytest.raises(UserError, match=r"png has more than 8 bits a channel \(mode I;16\); save it with 8"):
        folder(pictures)


def test_photographs_are_turned_upright(pictures: Path) -> None:
    image = Image.fromarray(np.repeat(np.arange(0, 256, 32, dtype=np.uint8)[:, None], 8, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(pictures / "test" / "0" / "turned.jpg", exif=exif, quality=100)
    found = stored(folder(pictures), "test")[0][..., 0].astype(int)
    assert any(np.abs(x - np.arange(224, -1, -32)).max() < 8 for x in found)


def test_a_broken_image_is_named(pictures: Path) -> None:
    broken = pictures / "train" / "7" / "broken.png"
    broken.write_bytes(next((pictures / "train" / "7").glob("*.png")).read_bytes()[:60])
    with pytest.raises(UserError, match=r"7/broken.png cannot be read as an image \(.+\); mend or remove it$") as error:
        folder(pictures)
    assert "\n" not in str(error.value)
    broken.write_text("not an image")
    with pytest.raises(UserError, match=r"7/broken.png cannot be read"):
        folder(pictures)


def _empty_class(root: Path) -> None:
    (root / "train" / "new").mkdir()


def _unknown_class(root: Path) -> None:
    (root / "test" / "3").rename(root / "test" / "three")


@pytest.mark.parametrize(("train", "test"), [("training", "testing"), ("Train", "Test"), ("TRAINING", "test")])
def test_split_folders_go_by_their_usual_names_in_any_case(pictures: Path, train: str, test: str) -> None:
    before = folder(pictures)
    (pictures / "train").rename(pictures / train)
    (pictures / "test").rename(pictures / test)
    (pictures / "valid").mkdir()
    for name in before.classes:
        shutil.copytree(pictures / test / name, pictures / "valid" / name)
    found = folder(pictures)
    assert found.classes == before.classes
    assert found.size("val") == found.size("test") == before.size("test")


def _no_train(root: Path) -> None:
    (root / "train").rename(root / "learning")


def _one_class(root: Path) -> None:
    (root / "train").rename(root / "all")
    (root / "test").rename(root / "all" / "test")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_empty_class, r"train/new holds no images; add some \(\.jpg, .*\) or remove the folder"),
        (_unknown_class, r"test has class 'three', which train lacks"),
        (_no_train, r"has test but no folder train"),
        (_one_class, r"pictures has one class, all; give images of at least 2"),
    ],
)
def test_folders_that_make_no_sense_are_refused(pictures: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(pictures)
    with pytest.raises(UserError, match=message):
        folder(pictures)


def test_hidden_files_and_folders_are_left_out(pictures: Path) -> None:
    before = folder(pictures, size=8, channels=3)
    some = next((pictures / "train").rglob("*.*"))
    for place in (pictures / "train/.thumbnails", some.parent / ".cache", some.parent):
        place.mkdir(exist_ok=True)
        shutil.copy(some, place / f"._{some.name}")
    after = folder(pictures, size=8, channels=3)
    assert after.classes == before.classes and after.digest() == before.digest()


def test_folders_at_another_depth_are_refused_with_the_layout(tmp_path: Path) -> None:
    (tmp_path / "bare/a/inner").mkdir(parents=True)
    (tmp_path / "bare/b/inner").mkdir(parents=True)
    with pytest.raises(UserError, match=r"bare/a holds no images; .*\(data\.path holds <class>/<image>, or train/"):
        folder(tmp_path / "bare")
    for name in ("a", "b"):
        (tmp_path / "outer/images" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "outer/images" / name / "0.png")
    with pytest.raises(UserError, match=r"outer has one class, images; .*\(data\.path holds <class>/<image>"):
        folder(tmp_path / "outer")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no folders; put the images of each class in a folder of its name"):
        folder(tmp_path)
    for source in (folder, parquet):
        with pytest.raises(UserError, match=r"data.path .*absent is not a folder"):
            source(tmp_path / "absent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, r"data.channels is 2; give 1 \(grey\), 3 \(RGB\) or null"),
        ({"size": 0}, r"data.size is 0; give a whole number, at least 1"),
        ({"size": "big"}, r"data.size is big; give a whole number"),
        ({"shift": None}, r"data.shift is None; give a whole number, at least 0"),
        ({"memory_limit": None}, r"data.memory_limit is None; give a whole number, at least 0"),
        ({"test_size": None}, r"data.test_size is None; give a number of images, or a share below 1"),
        ({"shift": -1}, r"data.shift is -1; give a whole number, at least 0"),
        ({"workers": 1.5}, r"data.workers is 1.5"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        folder(tmp_path, **options)


# -- Parquet -----------------------------------------------------------------------------------------------------------


def test_parquet_images_and_labels_are_those_of_the_files(photos: Path) -> None:
    data = parquet(photos, val_size=50)
    assert as_set(stored(data, "train"), stored(data, "val")) == as_set(decoded(photos / "train.parquet"))
    (images, labels), (expected, classes) = stored(data, "test"), decoded(photos / "test.parquet")
    assert np.array_equal(images, expected)
    assert np.array_equal(labels, classes)
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert (data.size("train"), data.size("val"), data.channels, data.side) == (250, 50, 3, 32)


def test_shards_are_one_data_set(photos: Path) -> None:
    whole = parquet(photos)
    table = pq.read_table(photos / "train.parquet")
    (photos / "train.parquet").unlink()
    (photos / "data").mkdir()
    (photos / "test.parquet").rename(photos / "data" / "test-00000-of-00001.parquet")
    for i in range(3):
        pq.write_table(table.slice(100 * i, 100), photos / "data" / f"train-0000{i}-of-00003.parquet")
    assert np.array_equal(stored(parquet(photos), "train")[0], stored(whole, "train")[0])


def test_a_class_that_a_split_lacks_is_named(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(pictures)
    assert not caplog.messages
    shutil.rmtree(pictures / "test" / "3")
    assert folder(pictures).size("test") < 40
    assert caplog.messages == ["pictures: test has no image of 3, so that it says nothing of them"]


def test_classes_without_names_are_numbers(photos: Path) -> None:
    for split in ("train", "test"):
        table = pq.read_table(photos / f"{split}.parquet").replace_schema_metadata()
        labels = pa.array(table["label"].to_numpy() * 10)
        pq.write_table(table.set_column(1, "fine", labels), photos / f"{split}.parquet")
    data = parquet(photos, label="fine")
    assert data.classes == tuple(str(10 * i) for i in range(10))
    assert np.array_equal(stored(data, "test")[1], decoded_labels(photos / "test.parquet", "fine") // 10)


def decoded_labels(file: Path, column: str) -> NDArray[np.int64]:
    return pq.read_table(file)[column].to_numpy()


@pytest.mark.parametrize("workers", [0, 2])
def test_data_above_the_memory_limit_gives_the_same_batches(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    held, streamed = parquet(photos, size=24), parquet(photos, size=24, memory_limit=1000, workers=workers)
    assert isinstance(held.train.images, Tensor)
    assert not isinstance(streamed.train.images, Tensor)
    assert held.describe() == streamed.describe()
    state = torch.get_rng_state()
    for split in SPLITS:
        ours, theirs = (d.batches(split, 64, 20, rng=np.random.default_rng(0)) for d in (streamed, held))
        assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(ours, theirs, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert len(list((tmp_path / "ofa-nas").glob("*.arrow"))) == 2  # train and test, nothing half-written


def test_a_broken_row_is_named_when_it_is_read(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = pq.read_table(photos / "test.parquet")
    records = table["img"].to_pylist()
    records[17]["bytes"] = records[17]["bytes"][:50]
    records[30]["bytes"] = None
    pq.write_table(table.set_column(0, "img", pa.array(records)), photos / "test.parquet")
    with pytest.raises(UserError, match=r"test.parquet row 17 cannot be read as an image"):
        parquet(photos)
    data = parquet(photos, memory_limit=1000, workers=1)
    with pytest.raises(
        UserError, match=r"^\S*test.parquet row 17 cannot be read as an image \(.*\); mend or remove it$"
    ):
        list(data.batches("test", 20, 32, rng=None))
    with pytest.raises(UserError, match=r"row 30 has no bytes"):
        list(data.batches("test", 20, 32, rng=None, start=1))


def _renamed(table: pa.Table) -> pa.Table:
    return table.rename_columns({"img": "photo"})


def _flat(table: pa.Table) -> pa.Table:
    return table.set_column(0, "img", pa.array(["x"] * len(table)))


def _worded(table: pa.Table) -> pa.Table:
    return table.set_column(1, "label", pa.array(["x"] * len(table)))


def _hidden(table: pa.Table) -> pa.Table:
    return table.set_column(1, "label", pa.array([-1] * len(table)))


@pytest.mark.parametrize(
    ("spoil", "splits", "message"),
    [
        (_renamed, SPLITS, r"train.parquet has no column 'image' but \['photo', 'label'\]; set data.image"),
        (_flat, SPLITS, r"column 'img' must be \{bytes, path\}, not string"),
        (_worded, SPLITS, r"column 'label' must be integers, none missing, not string"),
        (_hidden, ("test",), r"test.parquet has label -1, which is no class of train"),
    ],
)
def test_tables_that_make_no_sense_are_refused(
    photos: Path, spoil: Callable[[pa.Table], pa.Table], splits: tuple[str, ...], message: str
) -> None:
    for file in photos.glob("*.parquet"):
        if file.stem in splits:
            pq.write_table(spoil(pq.read_table(file)), file)
    with pytest.raises(UserError, match=message):
        parquet(photos)


def test_broken_and_missing_files_are_refused(photos: Path) -> None:
    (photos / "test.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match=r"test.parquet is not a Parquet file"):
        parquet(photos)
    (photos / "train.parquet").unlink()
    with pytest.raises(UserError, match=r"has no train.parquet and no train-\*.parquet"):
        parquet(photos)


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------


def test_cifar10_takes_parquet_files_or_torchvisions(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    monkeypatch.setattr("torchvision.datasets.CIFAR10.train_list", [["batch", ""]])
    monkeypatch.setattr("torchvision.datasets.CIFAR10.test_list", [["test", ""]])
    base = tmp_path / "original" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    for name, split in (("batch", "train"), ("test", "test")):
        images, labels = decoded(photos / f"{split}.parquet")
        content = {"data": images.transpose(0, 3, 1, 2).reshape(-1, 3072), "labels": labels.tolist()}
        (base / name).write_bytes(pickle.dumps(content))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list(parquet(photos).classes)}))
    ours, theirs = cifar10(photos, val_size=50), cifar10(tmp_path / "original", val_size=50)
    assert (ours.classes, ours.mean, ours.std) == (theirs.classes, theirs.mean, theirs.std)
    for split in SPLITS:
        assert np.array_equal(stored(ours, split)[0], stored(theirs, split)[0])
        assert np.array_equal(stored(ours, split)[1], stored(theirs, split)[1])


def test_cifar10_that_is_absent_tells_both_ways(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.path to the folder of its Parquet files, or data.download=true"
    ) as error:
        cifar10(tmp_path / "absent")
    assert "\n" not in str(error.value)
