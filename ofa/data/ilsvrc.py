"""ImageNet (Russakovsky et al. 2015) as its archives unpack, or any data set of this layout:

    <path>/train/n01440764/n01440764_10026.JPEG ...    1,281,167 images in 1,000 folders of their classes
    <path>/val/n01440764/ILSVRC2012_val_00000293.JPEG  50,000 images in folders of their classes, or else
    <path>/val/ILSVRC2012_val_00000001.JPEG ...        all in one folder, and a file of labels in <path>

The labelled test images of a run are ImageNet's validation images; those that choose networks are cut from train, as
once-for-all does (Cai et al. 2020, sec. 4).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from ofa.data.decode import ENDINGS
from ofa.data.images import ImageData
from ofa.data.sources import Files, Labelled, Options, assemble, existing, image_folder, training_folder
from ofa.errors import UserError

LABELS = ("LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt", "val_labels.txt")


def imagenet(path: str | Path, *, labels: str | None = None, size: int = 256, **options: Any) -> ImageData:
    """Images of ImageNet's layout, cropped to the square in their middle, of `size` pixels, RGB.

    labels: file, in `path`, of a flat val folder: a line for each image, in the order of their names, that names its
    class (n01440764), or lines that name the image first, as in LOC_val_solution.csv; None: the first of LABELS that is
    there.  options: see Options.
    """
    settings, root = Options(**{"size": size, "channels": 3, **options}), existing(path)
    if missing := [name for name in ("train", "val") if not (root / name).is_dir()]:
        raise UserError(f"{root} has no folder {missing[0]}; unpack ImageNet's {missing[0]} archive there")
    (classes, train), val = training_folder(root / "train"), root / "val"
    flat = not any(entry.is_dir() and not entry.name.startswith(".") for entry in val.iterdir())
    test = _flat(val, _label_file(root, labels), classes) if flat else image_folder(val, classes)
    return assemble(root.resolve().name, {"train": train, "test": test}, classes, settings)


def _label_file(root: Path, name: str | None) -> Path:
    names = (name,) if name else LABELS
    for each in names:
        if (root / each).is_file():
            return root / each
    raise UserError(
        f"{root / 'val'} has no folders of classes and {root} no {' or '.join(names)}; put the labels there, "
        "or set data.labels"
    )


def _flat(where: Path, file: Path, classes: tuple[str, ...]) -> Labelled:
    """Images of one folder, labelled by a file; raises UserError where the two do not fit."""
    shown = (entry.name for entry in os.scandir(where) if not entry.name.startswith("."))
    images = sorted(name for name in shown if name.lower().endswith(ENDINGS))
    lines = [re.split(r"[,\s]+", line.strip()) for line in file.read_text().splitlines() if line.strip()]
    if all(len(line) == 1 for line in lines):
        if len(lines) != len(images):
            raise UserError(f"{file} has {len(lines)} labels for the {len(images)} images of {where}; give one each")
        named = dict(zip(images, (line[0] for line in lines), strict=True))
    else:
        known = {Path(line[0]).stem: line[1] for line in lines if len(line) > 1}
        named = {name: known.get(Path(name).stem, "") for name in images}
    number = {name: i for i, name in enumerate(classes)}
    for name, label in named.items():
        if label not in number:
            what = f"label {label!r}, which is no folder of train" if label else "no label"
            raise UserError(f"{file} has {what} for {name}; mend it")
    paths = np.array([os.fsencode(where / name) for name in images], np.bytes_)
    return Labelled(Files(paths), np.array([number[named[name]] for name in images], np.int64))
