"""Kill a stage at random moments, start it again, and compare its result with that of an undisturbed run.

    python scripts/benchmarks/kill_and_resume.py --kills 5

The digits job, with a short schedule.  A stage is killed (SIGKILL) `kills` times, each at a random moment of the time
that it takes undisturbed unless it has ended by then, and run to its end; every weight, log line and evaluation must
then equal the undisturbed run's.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from ofa.files import read_jsonl
from ofa.weights import load_tensors
from scripts.benchmarks.about import about

OPTIONS = ("schedule.epochs=20", "measure.subnets=14", "measure.latency_nets=6", "fit.repeats=1", "threads=1")


def main() -> None:
    """Print a line for each stage; exit status 1 where a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    print(json.dumps(about()))
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        same = [disturb("train", whole, killed, args.kills, trained)]
        for stage in ("measure", "fit"):
            finish(stage, whole)
        subprocess.run(["cp", "-r", str(whole), str(Path(folder, "copy"))], check=True)
        same.append(disturb("search", whole, Path(folder, "copy"), args.kills, searched))
    sys.exit(0 if all(same) else 1)


def disturb(stage: str, whole: Path, killed: Path, kills: int, result: Any) -> bool:
    """Run a stage undisturbed in one folder and killed in another; whether both end alike."""
    seconds = finish(stage, whole)
    moments = []
    for _ in range(kills):
        process = start(stage, killed)
        moment = random.uniform(0, seconds)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            moments.append(moment)
    finish(stage, killed)
    same = bool(result(whole) == result(killed))
    times = ", ".join(f"{moment:.1f}" for moment in moments)
    print(f"{stage}: {seconds:.1f} s undisturbed; killed after {times} s; {'same result' if same else 'DIFFERS'}")
    return same


def start(stage: str, run: Path) -> subprocess.Popen[bytes]:
    """A stage as a process of its own."""
    code = f"from scripts.{stage} import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, f"run={run}", *OPTIONS], stdout=subprocess.DEVNULL)


def finish(stage: str, run: Path) -> float:
    """Run a stage to its end; its seconds."""
    begun = time.monotonic()
    if start(stage, run).wait():
        raise SystemExit(f"{stage} failed")
    return time.monotonic() - begun


def trained(run: Path) -> tuple[Any, ...]:
    """Bytes of every weight, and the log without its times."""
    tensors = load_tensors(run / "train/supernet.safetensors")[0]
    lines = [(line["epoch"], line["loss"], line["val"]) for line in read_jsonl(run / "train/log.jsonl")]
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, lines


def searched(run: Path) -> dict[str, str]:
    """Every evaluation of every agent and device, and the chosen networks."""
    files = sorted((run / "search").rglob("evaluations.parquet"))
    found = {str(path.relative_to(run)): pd.read_parquet(path).to_json() for path in files}
    return found | {str(p.relative_to(run)): p.read_text() for p in sorted((run / "search").glob("*/chosen.json"))}


if __name__ == "__main__":
    main()
