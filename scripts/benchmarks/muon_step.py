"""A training step by Muon against the same one by SGD alone, on this processor, in turns, as ratios.

    python scripts/benchmarks/muon_step.py [--rounds 9] [--batch 256] [--spaces cifar_conv:32:bfloat16]
    torchrun --nproc-per-node 2 -m scripts.benchmarks.muon_step   # each process turns all weights, against its part

For each space, at the pixels and in the precision behind its name, its largest, a random and its smallest
architecture: one thread, labels alone.  A row is the median of the rounds' ratios of CPU times, Muon's over SGD's, with
quartiles; of several processes, which do not average gradients here, those of the first one that turns all weights by
itself over those of one that turns its part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.files import write_json
from ofa.kernels import keep_memory
from ofa.parallel import World, processes
from ofa.space import Arch
from ofa.training.optimizer import make_optimizer
from scripts.benchmarks.about import about
from scripts.benchmarks.precision_step import Training
from scripts.benchmarks.train_step import SCHEDULE, Row, alternate, architectures, line, timed

SPACES = ("cifar_mbv3:32:float32", "cifar_conv:32:bfloat16")


def rows(name: str, batch: int, rounds: int, world: World) -> list[Row]:
    """Muon over SGD, or alone over shared, for each architecture of a space."""
    place, _, precision = name.rpartition(":")
    training = Training(place, batch)
    muon = replace(SCHEDULE, muon=0.1)
    other = (SCHEDULE, World()) if world.size == 1 else (muon, world)
    optimizers = [make_optimizer(training.supernet, *settings) for settings in ((muon, World()), other)]

    def step(optimizer: torch.optim.SGD, arch: Arch) -> None:
        training.optimizer = optimizer
        training.step(arch, precision)

    found = []
    for which, genes in architectures(training.space, 1, seed=1).items():
        arch = training.space.decode(genes)[0]
        turning, less = (timed(partial(step, optimizer, arch)) for optimizer in optimizers)
        found.append(Row(f"{name}, {which.partition('_')[0]}", alternate(turning, less, rounds), 0))
    return found


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=256, help="images")
    parser.add_argument(
        "--spaces", nargs="+", default=SPACES, help="names, each with pixels and precision after colons"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    options: dict[str, Any] = about() | {"rounds": args.rounds, "batch": args.batch}
    with processes("cpu") as (world, _):
        say: Callable[[Any], None] = partial(print, flush=True) if world.first else lambda text: None
        say(options | {"processes": world.size})
        found: list[Row] = []
        for name in args.spaces:
            found += (done := rows(name, args.batch, args.rounds, world))
            say("\n".join(line(row.record()) for row in done))
        if args.out and world.first:
            write_json(args.out, {"rows": [row.record() for row in found]} | options)


if __name__ == "__main__":
    main()
