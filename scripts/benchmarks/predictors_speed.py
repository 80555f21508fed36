"""Architectures per second of the accuracy predictors, features included, in batches of 20,000 on one thread.

    OMP_NUM_THREADS=1 python scripts/benchmarks/predictors_speed.py [--models ofa_mlp gp]

Fitted on 100 random networks of the ofa_mbv3_w1.0 space; CPU time of this process, median and range of the repeats.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import process_time

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.space import load_space
from predictors import Accuracy, Macs
from predictors.models import MODELS
from scripts.benchmarks.about import about

BATCH = 20_000


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["ofa_mlp", "gp", "ridge"])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    space = load_space("ofa_mbv3_w1.0")
    genes = space.sample(BATCH, np.random.default_rng(0))
    print(f"batches of {BATCH}, {args.repeats} repeats, {about()}")
    for model in args.models:
        predictor = Accuracy(space, model).fit(genes[:100], np.log(Macs(space)(genes[:100])))
        rates = []
        for _ in range(args.repeats):
            start = process_time()
            predictor(genes)
            rates.append(BATCH / (process_time() - start))
        print(f"{model:10} {np.median(rates):9,.0f} /s  ({min(rates):,.0f} to {max(rates):,.0f})")


if __name__ == "__main__":
    main()
