"""Time of one augmented, normalised training image: batches from memory against a DataLoader of PIL images.

python scripts/benchmarks/data_loading.py [--path <folder of CIFAR-10's Parquet files>]   (without: the digits)

Both shift, mirror, resize and normalise the same images with one thread in one process.  Rounds alternate between the
two; CPU time of the process is counted, so that other programs on the machine matter little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from ofa.data import ImageData, digits, parquet
from scripts.benchmarks.about import about

BATCH = 128


class Pictures(Dataset[tuple[Tensor, int]]):
    """Training images as most tutorials load them: PIL images, transformed one by one."""

    def __init__(self, data: ImageData, n: int, resolution: int) -> None:
        images = data.train.images
        assert isinstance(images, Tensor)
        self.pixels = images[:n].permute(0, 2, 3, 1).numpy()
        self.labels = data.train.labels[:n].tolist()
        steps = [T.RandomCrop(data.side, padding=data.shift)] + [T.RandomHorizontalFlip()] * data.flip
        steps += [T.Resize(resolution)] * (resolution != data.side)
        self.transform = T.Compose([*steps, T.ToTensor(), T.Normalize(data.mean, data.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[i].squeeze())), self.labels[i]


def microseconds(batches: Callable[[], Iterable[Any]], n: int) -> float:
    """CPU time of one image."""
    start = time.process_time()
    assert sum(len(y) for _, y in batches()) == n
    return (time.process_time() - start) / n * 1e6


def compare(data: ImageData, n: int, resolution: int, rounds: int) -> str:
    """One line: medians of both and of their ratio, with the lowest and highest of the rounds."""
    loader = DataLoader(Pictures(data, n, resolution), BATCH, shuffle=True)
    rng = np.random.default_rng(0)
    times = [
        (
            microseconds(lambda: loader, n),
            microseconds(lambda: data.batches("train", BATCH, resolution, rng=rng, limit=n), n),
        )
        for _ in range(rounds + 1)
    ][1:]  # the first round warms up
    pil, memory = np.array(times).T
    return f"{resolution:4} px  {_spread(pil)}  {_spread(memory)}  {_spread(pil / memory)}"


def _spread(values: Any) -> str:
    return f"{np.median(values):7.1f} [{values.min():6.1f}, {values.max():6.1f}]"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="folder of Parquet files; without it, the digits of scikit-learn")
    parser.add_argument("--images", type=int, default=2560, help="images a round")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = parquet(options.path) if options.path else digits()
    n = min(options.images, data.size("train"))
    print(f"{data.name}, {data.side} px, {n} images a round, {options.rounds} rounds, batch {BATCH}, 1 thread")
    print("resolution  PIL, us/image            in memory, us/image      ratio")
    for resolution in (data.side, data.side * 3 // 4, data.side * 3 // 2):
        print(compare(data, n, resolution, options.rounds))
    print(json.dumps(about()))


if __name__ == "__main__":
    main()
