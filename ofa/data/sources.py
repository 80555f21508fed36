"""Where images come from: scikit-learn's digits, Parquet files, folders, CIFAR-10.  N images.

Each function finds the splits that the data has; the others are cut from train, seeded, with the same share of every
class.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofa.data.decode import ENDINGS, MODES, Encoded, Source, decode_all, form_of
from ofa.data.images import SPLITS, ImageData, Split, statistics
from ofa.data.rows import read_table
from ofa.errors import UserError

FILES = {"train": ("train", "training"), "val": ("validation", "val", "valid"), "test": ("test", "testing")}
LAYOUT = "data.path holds <class>/<image>, or train/<class>/<image>"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """What every source of files understands.

    val_size, test_size: images cut from train where the data has no such split: a number, or a share below 1.
    seed: of that cut.  size: height and width of the stored images in pixels; channels: 1 or 3; None: as the images
    are.  flip, shift: see ImageData.  memory_limit: bytes of pixels above which images are decoded anew each time they
    are read, by `workers` processes; the largest splits first.  buffer: row groups that are held in memory of Parquet
    files above it; None: an unpacked copy on disk.
    """

    val_size: float = 0.1
    test_size: float = 0.2
    seed: int = 0
    size: int | None = None
    channels: int | None = None
    flip: bool = True
    shift: int = 4
    memory_limit: float = 4e9
    workers: int = 2
    buffer: int | None = None

    def __post_init__(self) -> None:
        for name, least in {"seed": 0, "size": 1, "shift": 0, "memory_limit": 0, "workers": 0, "buffer": 1}.items():
            value = getattr(self, name)
            whole = isinstance(value, int) or (name == "memory_limit" and isinstance(value, float))
            if not (value is None and name in ("size", "buffer")) and not (whole and value >= least):
                raise UserError(f"data.{name} is {value}; give a whole number, at least {least}")
        for name in ("val_size", "test_size"):
            if not isinstance(getattr(self, name), int | float):
                raise UserError(f"data.{name} is {getattr(self, name)}; give a number of images, or a share below 1")
        if self.channels not in (None, *MODES):
            raise UserError(f"data.channels is {self.channels}; give 1 (grey), 3 (RGB) or null (as the images are)")


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """Images, decoded or not, and the numbers of their classes (N,)."""

    images: Tensor | Source
    labels: NDArray[np.int64]

    def __getitem__(self, index: NDArray[np.int64]) -> Labelled:
        return Labelled(self.images[index], self.labels[index])


@dataclass(frozen=True, slots=True, eq=False)
class Files:
    """Image files (N,): a `Source`."""

    paths: NDArray[np.bytes_]  # not a million strings, which each process that decodes would copy when it counts them
    windows: None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: NDArray[np.int64]) -> Files:
        return Files(self.paths[index])

    def read(self, i: int) -> bytes:
        """Image `i`, encoded."""
        try:
            return Path(self.name(i)).read_bytes()
        except OSError as error:
            raise UserError(f"{self.name(i)} cannot be read ({error.strerror}); mend or remove it") from None

    def name(self, i: int) -> str:
        """Path of image `i`."""
        return os.fsdecode(self.paths[i])


def digits(*, val_size: float = 300, test_size: float = 360, seed: int = 0, shift: int = 1) -> ImageData:
    """The 1,797 handwritten digits of scikit-learn: grey, 8 x 8 pixels; never mirrored."""
    from sklearn.datasets import load_digits

    levels, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(np.rint(levels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    options = Options(val_size=val_size, test_size=test_size, seed=seed, shift=shift, flip=False)
    return assemble("digits", {"train": Labelled(pixels, labels.astype(np.int64))}, tuple("0123456789"), options)


def parquet(path: str | Path, *, image: str | None = None, label: str = "label", **options: Any) -> ImageData:
    """Parquet files in the Hugging Face image schema.

    path: a folder (or one with a folder `data`) of `train.parquet` or shards `train-*.parquet`; test and validation
    likewise, where the data has them.  image: column {bytes, path}, by default img or image.  options: see Options.
    """
    settings = Options(**options)
    root = existing(path)
    files = _parquet_files(root)
    if "train" not in files:
        raise UserError(f"{root} has no train.parquet and no train-*.parquet; set data.path to the folder that has it")
    tables = {
        split: read_table(files[split], image, label, settings.memory_limit, buffer=settings.buffer) for split in files
    }
    names = tables["train"].classes
    values = np.arange(len(names)) if names else np.unique(tables["train"].labels)
    parts = {split: Labelled(t.images, _numbered(t.labels, values, files[split])) for split, t in tables.items()}
    return assemble(root.resolve().name, parts, names or tuple(map(str, values.tolist())), settings)


def folder(path: str | Path, **options: Any) -> ImageData:
    """Image files in torchvision's layout: `<path>/train/<class>/...`, or `<path>/<class>/...` without splits.

    Validation and test folders are used where they exist, by any name of `FILES`, in any case.  options: see Options.
    """
    settings, root = Options(**options), existing(path)
    entries = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    named = {split: [entries[name] for name in names if name in entries] for split, names in FILES.items()}
    folders = {split: found[0] for split, found in named.items() if found}
    if "train" not in folders:  # a class may be called valid
        folders = {split: root / split for split in SPLITS if (root / split).is_dir()} or {"train": root}
    if "train" not in folders:
        raise UserError(f"{root} has {', '.join(folders)} but no folder train; put the training images there")
    classes, train = training_folder(folders["train"])
    parts = {"train": train} | {split: image_folder(folders[split], classes) for split in folders if split != "train"}
    if len(classes) == 1:
        raise UserError(f"{folders['train']} has one class, {classes[0]}; give images of at least 2 ({LAYOUT})")
    return assemble(root.resolve().name, parts, classes, settings)


def cifar10(
    path: str | Path,
    *,
    download: bool = False,
    val_size: float = 5000,
    seed: int = 0,
    flip: bool = True,
    shift: int = 4,
) -> ImageData:
    """CIFAR-10 (Krizhevsky 2009): Parquet files in `path`, else torchvision's files there, downloaded if asked."""
    path = Path(path).expanduser()
    if "train" in _parquet_files(path):
        return parquet(path, val_size=val_size, seed=seed, flip=flip, shift=shift)
    from torchvision.datasets import CIFAR10

    try:
        with warnings.catch_warnings(action="ignore"):  # numpy 2.4 warns of the old pickles
            sets = {split: CIFAR10(path, train=split == "train", download=download) for split in ("train", "test")}
    except (RuntimeError, OSError) as error:
        ways = "set data.path to the folder of its Parquet files, or data.download=true to download it there"
        raise UserError(f"CIFAR-10 is not in {path} ({str(error).split('.')[0]}); {ways}") from None
    pixels = {split: torch.from_numpy(found.data).permute(0, 3, 1, 2) for split, found in sets.items()}
    parts = {split: Labelled(x, np.array(sets[split].targets)) for split, x in pixels.items()}
    options = Options(val_size=val_size, seed=seed, flip=flip, shift=shift)
    return assemble("cifar10", parts, tuple(sets["train"].classes), options)


def cut(
    labels: NDArray[np.int64], size: float, rng: np.random.Generator, name: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices kept and indices cut off, each in order: `size` images (a number, or a share below 1) of labels (N,).

    Every class gives its share of what is cut, to within an image or so, and keeps at least one image.
    """
    n, counts = len(labels), np.bincount(labels)
    most = n - np.count_nonzero(counts)
    if most < 1:
        raise UserError(f"of {n} images, one a class, none can be cut for {name}; add images, or a split {name}")
    count = round(size * n if size < 1 else size) if math.isfinite(size) else 0
    if 0 < size < 1 and count < 1:
        raise UserError(f"data.{name}_size is {size}, no whole one of {n} images; give more images, or {1 / n:.2g}")
    if (size >= 1 and size != count) or not 1 <= count <= most:
        range_of = f"a whole number from 1 to {most} of the {n} images (each class keeps one), or a share below 1"
        raise UserError(f"data.{name}_size is {size}; give {range_of}")
    shuffled = rng.permutation(n)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    of_class = labels[by_class]
    rank = np.arange(n) - (np.cumsum(counts) - counts)[of_class]
    quantile = np.where(rank + 1 < counts[of_class], (rank + 0.5) / counts[of_class], np.inf)
    taken = np.zeros(n, bool)
    taken[by_class[np.argsort(quantile, kind="stable")[:count]]] = True
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def assemble(name: str, parts: dict[str, Labelled], classes: Sequence[str], options: Options) -> ImageData:
    """Cut the splits that are missing, decode what fits in memory, and take the statistics of train."""
    if len(classes) < 2:
        raise UserError(f"{name} has {len(classes)} classes ({', '.join(classes)}); give images of at least 2")
    if empty := [split for split, part in parts.items() if not len(part.labels)]:
        raise UserError(f"{empty[0]} of {name} holds no images; add some or remove it")
    for i, (split, size) in enumerate({"test": options.test_size, "val": options.val_size}.items()):
        if split not in parts:
            kept, taken = cut(parts["train"].labels, size, np.random.default_rng((options.seed, i)), split)
            parts = parts | {"train": parts["train"][kept], split: parts["train"][taken]}
    for split, part in parts.items():
        absent = np.flatnonzero(np.bincount(part.labels, minlength=len(classes)) == 0)
        if absent.size:
            some = ", ".join(classes[i] for i in absent[:3]) + f" and {len(absent) - 3} others" * (len(absent) > 3)
            log.warning("%s: %s has no image of %s, so that it says nothing of them", name, split, some)
    images = _load([parts[split].images for split in SPLITS], options)
    splits = {split: Split(x, torch.from_numpy(parts[split].labels)) for split, x in zip(SPLITS, images, strict=True)}
    train, val, test = (splits[split] for split in SPLITS)
    mean, std = statistics(train)
    return ImageData(name, tuple(classes), train, val, test, mean, std, options.flip, options.shift)


def _load(images: list[Tensor | Source], options: Options) -> list[Tensor | Encoded]:
    """Pixels in memory, channels_last, of the splits that fit; images of the others are decoded when they are read."""
    sources = [x for x in images if not isinstance(x, Tensor)]
    if not sources:
        return [x.contiguous(memory_format=torch.channels_last) for x in images if isinstance(x, Tensor)]
    form = form_of(sources[0], options.size, options.channels)
    loaded: dict[int, Tensor | Encoded] = {}
    left = options.memory_limit
    for i in sorted(range(len(sources)), key=lambda i: len(sources[i])):
        left -= len(sources[i]) * form.image_bytes
        loaded[i] = decode_all(sources[i], form) if left >= 0 else Encoded(sources[i], form, options.workers)
    return [loaded[i] for i in range(len(sources))]


def existing(path: str | Path) -> Path:
    """The folder of that name, `~` expanded; raises UserError where there is none."""
    root = Path(path).expanduser()  # a shell leaves the ~ of data.path=~/images
    if not root.is_dir():
        raise UserError(f"data.path {path} is not a folder; set it to the folder that holds the images")
    return root


def _parquet_files(path: Path) -> dict[str, list[Path]]:
    """Files of each split that is there; shards in order."""
    found: dict[str, list[Path]] = {}
    for split, names in FILES.items():
        patterns = [f"{place}{name}{end}.parquet" for place in ("", "data/") for name in names for end in ("", "-*")]
        groups = (sorted(path.glob(pattern)) for pattern in patterns)
        if files := next(filter(None, groups), None):
            found[split] = files
    return found


def _numbered(labels: NDArray[np.int64], values: NDArray[np.int64], files: list[Path]) -> NDArray[np.int64]:
    """Position of each label (N,) among the values that have a class."""
    numbers = np.searchsorted(values, labels).clip(max=len(values) - 1)
    if (wrong := labels[values[numbers] != labels]).size:
        raise UserError(f"{files[0]} has label {wrong[0]}, which is no class of train ({len(values)} classes); mend it")
    return numbers


def training_folder(where: Path) -> tuple[tuple[str, ...], Labelled]:
    """The classes that a folder has, each the name of a folder in it, and its images; none may lack images."""
    classes = tuple(
        sorted(entry.name for entry in where.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    )
    found = image_folder(where, classes)
    if (empty := np.flatnonzero(np.bincount(found.labels, minlength=len(classes)) == 0)).size:
        some = f"add some ({', '.join(ENDINGS)}) or remove the folder"
        raise UserError(f"{where / classes[empty[0]]} holds no images; {some} ({LAYOUT})")
    return classes, found


def image_folder(where: Path, classes: tuple[str, ...]) -> Labelled:
    """Images of a folder, labelled by the position of their folder's name in `classes`; hidden ones are left out."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(where, is_valid_file=lambda name: name.lower().endswith(ENDINGS), allow_empty=True)
    except FileNotFoundError:
        raise UserError(f"{where} has no folders; put the images of each class in a folder of its name") from None
    shown = [(path, found.classes[n]) for path, n in found.samples if "/." not in path[len(str(where)) :]]
    if unknown := sorted({name for name in found.classes if not name.startswith(".")} - set(classes)):
        raise UserError(f"{where} has class {unknown[0]!r}, which train lacks; add images to train or remove it")
    number = {name: i for i, name in enumerate(classes)}
    paths = np.array([os.fsencode(path) for path, _ in shown], np.bytes_)
    return Labelled(Files(paths), np.array([number[name] for _, name in shown], np.int64))
