"""Time `ofa-search` of MCUNet's space (3e20 networks) for four devices in one command, once the predictors are fitted.

    python scripts/benchmarks/search_devices.py [--rounds 5] [--workers 2] [--folder runs/devices] [OPTION=VALUE ...]

The predictors are fitted on 30 subnets of a supernet trained on digits for an epoch: what is timed depends on their
number, not on what they say.  Wall seconds are of the whole process, start and imports among them; CPU seconds are of
its workers too.  What is fitted in `--folder` serves later calls.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from scripts.benchmarks.about import about

OPTIONS = (
    *("space=mcunet", "device=[stm32f746,stm32h743,phone,server]", "schedule.epochs=1", "schedule.batch_size=64"),
    *("train.watch.images=64", "train.watch.calibration=64", "train.watch.random_nets=1"),
    *("measure.subnets=30", "measure.images=64", "measure.latency_nets=6"),
)


def main() -> None:
    """Print seconds of each round, then their median, lowest and highest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="the run folder (default: one that is deleted)")
    args, more = parser.parse_known_args()
    print(json.dumps(about()))
    with tempfile.TemporaryDirectory() as folder:
        run = args.folder or Path(folder)
        for stage in ("train", "measure", "fit"):
            finish(stage, run)
        rounds = []
        for _ in range(args.rounds):
            rounds.append(finish("search", run, f"workers={args.workers}", "restart=true", *more))
            print("{:.1f} s by the clock, {:.1f} CPU s".format(*rounds[-1]), flush=True)
    wall, cpu = np.array(rounds).T
    for name, seconds in (("clock", wall), ("CPU", cpu)):
        print(f"{name}: {np.median(seconds):.1f} [{seconds.min():.1f}, {seconds.max():.1f}] s, n={len(seconds)}")


def finish(stage: str, run: Path, *more: str) -> tuple[float, float]:
    """Run a stage to its end; its seconds by the clock and of all its processes."""
    code = f"from scripts.{stage} import main; main()"
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code, f"run={run}", *OPTIONS, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{stage} failed: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
