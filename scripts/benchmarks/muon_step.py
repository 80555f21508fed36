"""A training step by Muon against the same one by SGD alone, on this processor, in turns, as ratios.

    python scripts/benchmarks/muon_step.py [--rounds 9] [--batch 256] [--spaces cifar_conv:32:bfloat16]

For each space, at the pixels and in the precision behind its name, its largest, a random and its smallest
architecture: one thread, labels alone.  A row is the median of the rounds' ratios of CPU times, Muon's over SGD's, with
quartiles.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.files import versions, write_json
from ofa.kernels import keep_memory
from ofa.space import Arch
from ofa.training.optimizer import make_optimizer
from scripts.benchmarks.precision_step import Training
from scripts.benchmarks.train_step import SCHEDULE, Row, alternate, architectures, line, machine, timed

SPACES = ("cifar_mbv3:32:float32", "cifar_conv:32:bfloat16")


def rows(name: str, batch: int, rounds: int) -> list[Row]:
    """Muon over SGD for each architecture of a space."""
    place, _, precision = name.rpartition(":")
    training = Training(place, batch)
    optimizers = [make_optimizer(training.supernet, replace(SCHEDULE, muon=share)) for share in (0.1, 0.0)]

    def step(optimizer: torch.optim.SGD, arch: Arch) -> None:
        training.optimizer = optimizer
        training.step(arch, precision)

    found = []
    for which, genes in architectures(training.space, 1, seed=1).items():
        arch = training.space.decode(genes)[0]
        turning, plain = (timed(partial(step, optimizer, arch)) for optimizer in optimizers)
        found.append(Row(f"{name}, {which.partition('_')[0]}", alternate(turning, plain, rounds), 0))
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
    about: dict[str, Any] = {"machine": machine(), "versions": versions(), "rounds": args.rounds, "batch": args.batch}
    print(about, flush=True)
    found: list[Row] = []
    for name in args.spaces:
        found += (done := rows(name, args.batch, args.rounds))
        print("\n".join(line(row.record()) for row in done), flush=True)
    if args.out:
        write_json(args.out, {"rows": [row.record() for row in found]} | about)


if __name__ == "__main__":
    main()
