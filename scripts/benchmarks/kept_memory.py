"""What `ofa.kernels.keep_memory` is worth: CPU time of work that gives memory back over that of work that keeps it.

    python scripts/benchmarks/kept_memory.py [--rounds 9] [--spaces ofa_mbv3_w1.0:128 cifar_mbv3:32]

For each space, at the pixels behind its name, a random architecture: extracted and recalibrated on 256 images,
evaluated on 512, fine-tuned by 8 steps of 64 images with itself as teacher; and 512 images moved, mirrored and changed
by two operations of RandAugment; then the most memory that the process held.  One thread; a round is a process of each
kind, in turns, as nothing can undo the choice.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.data import Augment
from ofa.evaluate import accuracy, specialise
from ofa.files import write_json
from ofa.finetune import Finetuning, finetune
from ofa.space import load_space
from ofa.supernet import Supernet
from scripts.benchmarks.about import about
from scripts.benchmarks.finetune_views import images
from scripts.benchmarks.train_step import Row, line

SPACES = ("ofa_mbv3_w1.0:128", "cifar_mbv3:32")
IMAGES = 512
WORK = ("extracting and recalibrating", "evaluating", "fine-tuning", "RandAugment")


def seconds(name: str) -> list[tuple[float, float]]:
    """Wall and CPU seconds of each of WORK in this process, the second time it is done."""
    place, side = name.split(":")
    space = replace(load_space(place), resolution=(int(side),))
    data = images(IMAGES, int(side), space.classes)
    torch.manual_seed(0)
    supernet = Supernet(space).eval()
    arch = space.decode(space.sample(1, np.random.default_rng(1)))[0]
    net = specialise(supernet, arch, data, images=64)
    changed = replace(data, augment=Augment(operations=2))
    jobs: list[Callable[[], Any]] = [
        lambda: specialise(supernet, arch, data, images=256),
        lambda: accuracy(net, data, "val", resolution=int(side)),
        lambda: finetune(net, data, Finetuning(epochs=1, batch_size=64, lr=1e-3), teacher=net),
        lambda: list(changed.batches("train", 64, int(side), rng=np.random.default_rng(0))),
    ]
    return [[_timed(job) for _ in range(2)][-1] for job in jobs]


def _timed(job: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - wall, time.process_time() - cpu


def rows(name: str, rounds: int) -> list[Row]:
    """Given back over kept for each of WORK; prints the memory of both."""
    found, held = [], []
    for _ in range(rounds):
        done = [json.loads(_arm(name, kept)) for kept in ("0", "1")]
        found.append([arm["seconds"] for arm in done])
        held.append([arm["mb"] for arm in done])
    freed, kept = np.median(held, axis=0)
    print(f"{name}, most memory held: {freed:.0f} MB given back, {kept:.0f} MB kept")
    return [Row(f"{name}, {what}", np.array(found)[:, :, i], 0) for i, what in enumerate(WORK)]


def _arm(name: str, kept: str) -> str:
    """What a process of its own prints."""
    line, env = [sys.executable, __file__, "--spaces", name, "--arm"], os.environ | {"OFA_KEEP_MEMORY": kept}
    return subprocess.run(line, env=env, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--spaces", nargs="+", default=SPACES, help="names, with pixels after a colon")
    parser.add_argument("--arm", action="store_true", help="one process's seconds and memory, as JSON")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.arm:
        taken = seconds(args.spaces[0])
        print(json.dumps({"seconds": taken, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    options: dict[str, Any] = about() | {"rounds": args.rounds}
    print(options, flush=True)
    found: list[Row] = []
    for name in args.spaces:
        found += (done := rows(name, args.rounds))
        print("\n".join(line(row.record()) for row in done), flush=True)
    if args.out:
        write_json(args.out, {"rows": [row.record() for row in found]} | options)


if __name__ == "__main__":
    main()
