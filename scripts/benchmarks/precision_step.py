"""A training step in float32 against the same one in bfloat16, on this processor, in turns, as ratios.

    python scripts/benchmarks/precision_step.py [--rounds 9] [--spaces cifar_conv:32 ofa_mbv3_w1.0:96] [--out step.json]

For each space, at the pixels behind its name, its largest, a random and its smallest architecture: one thread, a batch
of 64, labels alone, SGD.  Both sides run on the compiled kernels (OFA_KERNELS=0: on PyTorch's own operations).  A row
is the median of the rounds' ratios of CPU times, with quartiles.  bfloat16 pays where the processor multiplies it (AMX,
a GPU); elsewhere a step takes longer.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.distill import label_loss
from ofa.files import write_json
from ofa.kernels import keep_memory
from ofa.precision import Precision
from ofa.space import Arch, load_space
from ofa.supernet import Supernet
from ofa.training.optimizer import make_optimizer
from scripts.benchmarks.about import about
from scripts.benchmarks.train_step import BATCH, SCHEDULE, Row, alternate, architectures, line, timed

SPACES = ("cifar_conv:32", "cifar_mbv3:32", "ofa_mbv3_w1.0:32", "ofa_mbv3_w1.0:96", "ofa_resnet50:128")


class Training:
    """A supernet of a space at one resolution, and one batch for it."""

    def __init__(self, name: str, batch: int = BATCH) -> None:
        space, _, side = name.partition(":")
        self.name, self.space = name, replace(load_space(space), resolution=(int(side),))
        torch.manual_seed(0)
        self.supernet = Supernet(self.space).train()
        self.optimizer = make_optimizer(self.supernet, SCHEDULE)
        x = torch.randn(batch, self.space.in_channels, int(side), int(side))
        self.x, self.y = x.contiguous(memory_format=torch.channels_last), torch.arange(batch) % self.space.classes
        self.precisions = {name: Precision(name, x.device) for name in ("float32", "bfloat16")}

    def step(self, arch: Arch, precision: str) -> None:
        """One step, as Trainer takes it."""
        with self.precisions[precision].cast():
            loss: Tensor = label_loss(self.supernet(self.x, arch), self.y, 0.1)
        loss.backward()
        float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rows(self, rounds: int) -> list[Row]:
        """Float32 over bfloat16 for each architecture."""
        found = []
        for which, genes in architectures(self.space, 1, seed=1).items():
            arch = self.space.decode(genes)[0]
            whole, half = (timed(partial(self.step, arch, precision)) for precision in self.precisions)
            found.append(Row(f"{self.name}, {which.partition('_')[0]}", alternate(whole, half, rounds), 0))
        return found


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--spaces", nargs="+", default=SPACES, help="names, each with its pixels behind a colon")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    options: dict[str, Any] = about() | {"rounds": args.rounds, "batch": BATCH}
    print(options, flush=True)
    rows: list[Row] = []
    for name in args.spaces:
        rows += (done := Training(name).rows(args.rounds))
        print("\n".join(line(row.record()) for row in done), flush=True)
    if args.out:
        write_json(args.out, {"rows": [row.record() for row in rows]} | options)


if __name__ == "__main__":
    main()
