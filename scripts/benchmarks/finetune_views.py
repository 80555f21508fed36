"""Steps of fine-tuning whose teacher runs against steps that read what it said, on this processor, in turns, as ratios.

    python scripts/benchmarks/finetune_views.py [--rounds 9] [--batch 128] [--spaces cifar_pool:32:bfloat16]

For each space, at the pixels and in the precision behind its name: the largest architecture teaches a random and the
smallest one, on images that are moved and mirrored, one thread.  A round is two epochs of four batches with `views=1`:
the teacher runs in the first one alone.  A row is the median of the rounds' ratios, with quartiles.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.data import ImageData, Split
from ofa.files import write_json
from ofa.finetune import Finetuning, finetune
from ofa.kernels import keep_memory
from ofa.space import load_space
from ofa.static import StaticNet, build
from scripts.benchmarks.about import about
from scripts.benchmarks.train_step import Row, architectures, line

SPACES = ("cifar_pool:32:bfloat16", "cifar_mbv3:32:float32", "ofa_mbv3_w1.0:128:float32")
BATCHES = 4  # of an epoch


def images(n: int, side: int, classes: int) -> ImageData:
    """Random images, in memory."""
    pixels = torch.randint(256, (n, 3, side, side), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    split = Split(pixels, torch.arange(n) % classes)
    names = tuple(map(str, range(classes)))
    return ImageData("random", names, split, split, split, (0.5,) * 3, (0.25,) * 3, flip=True, shift=side // 8)


def rows(name: str, batch: int, rounds: int) -> list[Row]:
    """Asked over read for each student of a space."""
    place, side, precision = name.split(":")
    space = replace(load_space(place), resolution=(int(side),))
    data = images(BATCHES * batch, int(side), space.classes)
    genes = architectures(space, 1, seed=1)
    teacher = build(space, space.decode(space.largest())[0])
    settings = Finetuning(epochs=2, views=1, batch_size=batch, precision=precision, lr=1e-3)
    found = []
    for which in [which for which in genes if which != "largest"]:
        student = build(space, space.decode(genes[which])[0])
        seconds = [_round(student, teacher, data, settings) for _ in range(rounds + 1)][1:]
        found.append(Row(f"{name}, {which.partition('_')[0]}", np.array(seconds), 0))
    return found


def _round(student: StaticNet, teacher: StaticNet, data: ImageData, settings: Finetuning) -> list[NDArray[np.float64]]:
    """Wall and CPU seconds of a step that asks and of one that reads: medians over an epoch."""
    stamps: list[tuple[float, float]] = []

    def stamp(values: dict[str, Any]) -> None:
        stamps.append((time.perf_counter(), time.process_time()))

    finetune(student, data, settings, teacher=teacher, report=stamp)
    steps = [np.subtract(after, before) for before, after in pairwise(stamps)]
    return [np.median(part, axis=0) for part in (steps[: BATCHES - 1], steps[BATCHES - 1 :])]


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--spaces", nargs="+", default=SPACES, help="names, with pixels and precision after colons")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_memory()
    options: dict[str, Any] = about() | {"rounds": args.rounds, "batch": args.batch}
    print(options, flush=True)
    found: list[Row] = []
    for name in args.spaces:
        found += (done := rows(name, args.batch, args.rounds))
        print("\n".join(line(row.record()) for row in done), flush=True)
    if args.out:
        write_json(args.out, {"rows": [row.record() for row in found]} | options)


if __name__ == "__main__":
    main()
