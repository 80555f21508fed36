"""Augmentation of batches: each operation as torchvision does it image by image, mixtures by their formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from ofa.data import Augment, digits
from ofa.data.augment import OPERATIONS, SIGNED
from ofa.errors import UserError

IMAGES = torch.randint(0, 256, (40, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
NAMES = {  # torchvision's names of RandAugment's operations
    "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX", "translate_y": "TranslateY",
    "rotate": "Rotate", "brightness": "Brightness", "color": "Color", "contrast": "Contrast",
    "sharpness": "Sharpness", "identity": "Identity", "posterize": "Posterize", "solarize": "Solarize",
    "autocontrast": "AutoContrast", "equalize": "Equalize",
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_torchvisions_on_each_image(name: str) -> None:
    reference = v2.RandAugment(num_ops=1, magnitude=9, num_magnitude_bins=31)
    magnitudes, signed = reference._AUGMENTATION_SPACE[NAMES[name]]
    values = magnitudes(31, 24, 24)
    for sign in (1, -1) if name in SIGNED else (1,):
        found = OPERATIONS[name](IMAGES[:4], sign * 9 / 30)
        magnitude = 0.0 if values is None else sign * float(values[9])
        assert signed == (name in SIGNED)
        for image, own in zip(IMAGES[:4], found, strict=True):
            expected = reference._apply_image_or_video_transform(
                image, NAMES[name], magnitude, interpolation=reference.interpolation, fill=reference._fill
            )
            assert (own.int() - expected.int()).abs().max() <= 1, "a rounding apart"


def test_randaugment_gives_every_image_some_operation_and_keeps_its_form() -> None:
    augment = Augment(operations=2)
    out = augment.pixels(IMAGES, np.random.default_rng(0))
    assert out.shape == IMAGES.shape and out.dtype == torch.uint8
    assert torch.equal(out, augment.pixels(IMAGES, np.random.default_rng(0)))
    assert not torch.equal(out, augment.pixels(IMAGES, np.random.default_rng(1)))
    changed = (out != IMAGES).flatten(1).any(1).float().mean()
    assert 0.8 < changed <= 1, "both operations are the identity for one image in 196"


def test_erasing_takes_one_rectangle_of_a_share_of_the_images() -> None:
    x = torch.rand(400, 3, 32, 32) + 1
    out = Augment(erase=0.25).erased(x, np.random.default_rng(0))
    gone = out == 0
    assert torch.equal(gone.any(1), gone.all(1)) and torch.equal(out[~gone], x[~gone])
    touched = gone[:, 0].flatten(1).any(1)
    assert 0.17 < touched.float().mean() < 0.33
    for mask in gone[touched, 0][:20]:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns and 0.01 < mask.float().mean() < 0.4
    assert torch.equal(Augment().erased(x, np.random.default_rng(0)), x)


def test_mixup_adds_the_image_before_in_the_share_of_its_label() -> None:
    x, labels = torch.rand(8, 3, 6, 6), torch.arange(8)
    out, target = Augment(mixup=0.4).mixed(x, labels, 8, np.random.default_rng(3))
    share = target[0, 0]
    assert 0 < share < 1
    torch.testing.assert_close(out, share * x + (1 - share) * x.roll(1, 0))
    torch.testing.assert_close(target, share * torch.eye(8) + (1 - share) * torch.eye(8).roll(1, 0))


def test_cutmix_pastes_a_box_whose_area_is_the_share_of_the_other_label() -> None:
    x, labels = torch.rand(8, 3, 10, 10), torch.arange(8)
    for seed in range(10):
        out, target = Augment(cutmix=1.0).mixed(x, labels, 8, np.random.default_rng(seed))
        pasted = (out != x).all(1)
        assert torch.equal(out.permute(0, 2, 3, 1)[pasted], x.roll(1, 0).permute(0, 2, 3, 1)[pasted])
        assert target[3, 2].item() == pytest.approx(pasted[3].float().mean().item())
        assert target.sum(1).tolist() == pytest.approx([1.0] * 8)


def test_training_batches_are_augmented_the_same_way_wherever_they_start_and_others_not() -> None:
    data = replace(digits(), augment=Augment(operations=1, erase=0.5))

    def batches(start: int) -> list[torch.Tensor]:
        rng = np.random.default_rng(0)
        return [x for x, _ in data.batches("train", 64, 16, rng=rng, limit=256, start=start)]

    whole = batches(0)
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], batches(2), strict=True))
    plain = [x for x, _ in digits().batches("train", 64, 16, rng=np.random.default_rng(0), limit=256)]
    assert not torch.equal(whole[0], plain[0])
    pair = [next(d.batches("val", 32, 16, rng=None))[0] for d in (data, digits())]
    assert torch.equal(*pair)


@pytest.mark.parametrize("wrong", [{"operations": 1.5}, {"magnitude": 31}, {"erase": -0.1}, {"mixup": float("nan")}])
def test_a_wrong_augmentation_is_explained(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Augment(**wrong)  # type: ignore[arg-type]
