"""Batches drawn from images: what training and evaluation get to see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from ofa.data import ImageData, Split, digits
from ofa.data.images import resize
from ofa.errors import UserError


@pytest.fixture(scope="module")
def colour(data: ImageData) -> ImageData:
    """Three digits as the channels of one image, so that channels and mirror images can be told apart."""
    x = data.train.images
    assert isinstance(x, Tensor)
    pixels = torch.cat([x, x.roll(1, 0), x.roll(2, 0)], 1).contiguous(memory_format=torch.channels_last)
    split = Split(pixels, torch.arange(len(pixels)))
    return ImageData("colour", data.classes, split, split, split, (0.3, 0.4, 0.5), (0.2, 0.3, 0.4), flip=True, shift=2)


def pixels_of(data: ImageData, x: Tensor) -> NDArray[np.int64]:
    """Levels from 0 to 255 of normalised images, by the definition of normalisation."""
    mean, std = (np.reshape(v, (1, -1, 1, 1)) for v in (data.mean, data.std))
    levels = (x.numpy().astype(np.float64) * std + mean) * 255
    assert np.allclose(levels, np.rint(levels), atol=1e-3)
    return np.rint(levels).astype(np.int64)


def epoch(data: ImageData, resolution: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """All training images, augmented."""
    batches = list(data.batches("train", 100, resolution, rng=np.random.default_rng(seed)))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_digits_are_scikit_learns_each_in_one_split(data: ImageData) -> None:
    levels, labels = load_digits(return_X_y=True)
    found = [
        (*split.images.flatten(1).tolist()[i], int(split.labels[i]))  # type: ignore[union-attr]
        for split in (data.train, data.val, data.test)
        for i in range(len(split))
    ]
    expected = [(*(int(v / 16 * 255 + 0.5) for v in row), label) for row, label in zip(levels, labels, strict=True)]
    assert sorted(found) == sorted(expected)
    assert (data.size("train"), data.size("val"), data.size("test")) == (1137, 300, 360)
    assert (data.channels, data.side, data.flip) == (1, 8, False)


def test_without_a_generator_images_come_in_order_as_they_are(colour: ImageData) -> None:
    batches = list(colour.batches("val", 100, 8, rng=None))
    assert [len(y) for _, y in batches] == [100] * 11 + [37]
    assert torch.equal(torch.cat([y for _, y in batches]), torch.arange(1137))
    x = torch.cat([x for x, _ in batches])
    assert x.dtype == torch.float32
    assert np.array_equal(pixels_of(colour, x), colour.val.images)  # type: ignore[arg-type]


def test_batches_are_channels_last(colour: ImageData) -> None:
    for resolution in (8, 12):
        x, _ = next(colour.batches("train", 4, resolution, rng=np.random.default_rng(0)))
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_train_images_have_mean_0_and_deviation_1_in_each_channel(data: ImageData) -> None:
    x = torch.cat([x for x, _ in data.batches("train", 256, 8, rng=None)]).double()
    assert float(x.mean()) == pytest.approx(0, abs=1e-6)
    assert float(x.std(correction=0)) == pytest.approx(1, abs=1e-6)
    wrong = replace(data, std=(data.std[0] * 1.01,))
    x = torch.cat([x for x, _ in wrong.batches("train", 256, 8, rng=None)]).double()
    assert float(x.std(correction=0)) != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("side", [5, 8, 13])
def test_resized_images_are_pillows(colour: ImageData, side: int) -> None:
    images = colour.train.images
    assert isinstance(images, Tensor)
    x = resize(images[:20], side)
    for image, ours in zip(images[:20].permute(0, 2, 3, 1).numpy(), x.permute(0, 2, 3, 1), strict=True):
        theirs = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR), np.int16)
        assert np.abs(theirs - ours.numpy()).max() <= 1


def test_training_images_are_shifted_and_half_of_them_mirrored(colour: ImageData) -> None:
    x, y = epoch(colour)
    levels, stored = pixels_of(colour, x), np.asarray(colour.train.images)
    assert sorted(y.tolist()) == list(range(1137))
    seen = []
    for image, original in zip(levels, stored[y], strict=True):
        framed = np.pad(original, ((0, 0), (2, 2), (2, 2)), mode="symmetric")
        crops = {(i, j): framed[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)}
        found = [
            (*at, flip) for at, c in crops.items() for flip in (0, 1) if np.array_equal(image, c[:, :, :: 1 - 2 * flip])
        ]
        assert len(found) == 1
        seen += found
    assert set(seen) == {(i, j, flip) for i in range(5) for j in range(5) for flip in (0, 1)}
    assert np.mean([flip for _, _, flip in seen]) == pytest.approx(0.5, abs=0.05)  # 3 standard deviations


def test_an_image_is_mirrored_in_every_other_epoch(colour: ImageData) -> None:
    def images(number: int) -> dict[int, np.ndarray]:
        still, rng = replace(colour, shift=0), np.random.default_rng(number)
        batches = still.batches("train", 100, 8, rng=rng, epoch=number)
        return {int(y): x for xs, ys in batches for x, y in zip(pixels_of(still, xs), ys, strict=True)}

    first, second, third = (images(number) for number in range(3))
    mirrored = 0
    for label, image in first.items():
        assert np.array_equal(image, second[label][:, :, ::-1])
        assert np.array_equal(image, third[label])
        mirrored += not np.array_equal(image, np.asarray(colour.train.images)[label])
    assert mirrored == pytest.approx(len(first) / 2, rel=0.1)


def test_the_same_generator_gives_the_same_batches(colour: ImageData) -> None:
    x, y = epoch(colour, 12)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    again, labels = epoch(colour, 12)
    torch.set_num_threads(threads)
    assert torch.equal(x, again)
    assert torch.equal(y, labels)
    assert not torch.equal(y, epoch(colour, 12, seed=1)[1])


def test_batches_leave_the_global_random_state_alone(colour: ImageData) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    epoch(colour)
    assert torch.equal(state, torch.get_rng_state())


def test_an_epoch_can_be_continued_at_any_batch(colour: ImageData) -> None:
    whole = list(colour.batches("train", 100, 8, rng=np.random.default_rng(3)))
    rest = list(colour.batches("train", 100, 8, rng=np.random.default_rng(3), start=7))
    assert len(rest) == 5
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[7:], rest, strict=True))


def test_resolution_may_change_from_batch_to_batch(colour: ImageData) -> None:
    batches = colour.batches("train", 300, lambda i: 8 + 4 * i, rng=np.random.default_rng(0), start=1)
    assert [x.shape[-1] for x, _ in batches] == [12, 16, 20]


def test_a_limit_without_a_generator_spreads_over_the_split(colour: ImageData) -> None:
    labels = torch.cat([y for _, y in colour.batches("val", 4, 8, rng=None, limit=10)])
    assert labels.tolist() == [1137 * i // 10 for i in range(10)]
    assert sum(len(y) for _, y in colour.batches("val", 100, 8, rng=None, limit=5000)) == 1137
    x = torch.cat(list(colour.calibration("val", 10, 8)))
    assert np.array_equal(pixels_of(colour, x), np.asarray(colour.val.images)[labels])


def test_a_limit_with_a_generator_draws_anew_each_time(colour: ImageData) -> None:
    drawn = [next(colour.batches("train", 50, 8, rng=np.random.default_rng(i), limit=50))[1] for i in (0, 1)]
    assert [len(set(y.tolist())) for y in drawn] == [50, 50]
    assert set(drawn[0].tolist()) != set(drawn[1].tolist())


def test_drop_last_leaves_out_the_batch_that_is_not_full(colour: ImageData) -> None:
    batches = colour.batches("train", 100, 8, rng=np.random.default_rng(0), drop_last=True)
    assert [len(y) for _, y in batches] == [100] * 11


def test_impossible_batches_are_refused(data: ImageData) -> None:
    with pytest.raises(UserError, match=r"batches of 2000 cannot be drawn from 1137 images"):
        data.batches("train", 2000, 8, rng=None, drop_last=True)
    with pytest.raises(UserError, match=r"batches of 0"):
        data.batches("train", 0, 8, rng=None)
    with pytest.raises(UserError, match=r"'validation' is not known; choose from train, val, test"):
        data.size("validation")


def test_a_card_says_what_the_data_was(data: ImageData) -> None:
    about = data.describe()
    assert about["images"] == {"train": 1137, "val": 300, "test": 360}
    assert about["classes"] == list("0123456789")
    assert about["mean"] == list(data.mean)


@pytest.mark.parametrize("images", [1, 255, 256, 257, 300])
def test_calibration_has_no_short_last_batch(images: int) -> None:
    """Statistics are means over batches: a last batch of one image counted as much as one of 256."""
    sizes = [len(x) for x in digits().calibration("val", images, 8)]
    assert sum(sizes) == min(images, digits().size("val"))
    assert max(sizes) <= 256 and max(sizes) - min(sizes) <= len(sizes) - 1


def test_calibration_images_are_the_same_each_time_and_augmented_on_demand() -> None:
    data = digits()
    plain, again = (torch.cat(list(data.calibration("val", 100, 8))) for _ in range(2))
    moved, again_moved = (torch.cat(list(data.calibration("val", 100, 8, augment=True))) for _ in range(2))
    assert torch.equal(plain, again)
    assert torch.equal(moved, again_moved)
    assert moved.shape == plain.shape
    assert not torch.equal(moved, plain)


def test_images_are_not_moved_out_of_sight(colour: ImageData) -> None:
    assert len(epoch(replace(colour, shift=8))[0]) == 1137
    with pytest.raises(UserError, match=r"data.shift is 9; give at most 8, the side of the stored images"):
        replace(colour, shift=9)
