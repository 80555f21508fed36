"""Latency predicted from measured operations against whole networks measured in ONNX Runtime on this machine.

    python scripts/benchmarks/predictors_latency.py --space digits_mbv3 --networks 40 --threads 1

Half of the networks fit the linear correction, the scores are those of the other half.  "macs" is the rival: a line
through the multiply-accumulates, fitted on the same networks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.export.latency import measure_networks
from ofa.files import write_json
from predictors.costs import Macs
from predictors.latency import Latency
from predictors.latency_table import measure_table
from predictors.scores import score
from predictors.shapes import space_shapes
from scripts.benchmarks.about import about, run_main, space_of


def main() -> None:
    """Print and write the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="digits_mbv3")
    parser.add_argument("--resolution", nargs="+", type=int, help="only these image sides, in pixels")
    parser.add_argument("--networks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="Parquet file of the table, kept and continued")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    space = space_of(args.space)
    if args.resolution:
        space = space.restrict(resolution=args.resolution)
    shapes, start = space_shapes(space), perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        table = measure_table(shapes, args.table or Path(folder, "latency.parquet"), threads=args.threads)
    seconds = perf_counter() - start
    genes = space.sample(args.networks, np.random.default_rng(args.seed))
    rows = measure_networks(space, genes, threads=args.threads, repeats=args.repeats)
    measured = np.array([row["median_ms"] for row in rows])
    half = args.networks // 2
    latency, macs = Latency(space, table), Macs(space)(genes)
    found: dict[str, Any] = {"sum of operations": score(latency(genes[half:]), measured[half:])}
    found["corrected"] = score(latency.fit(genes[:half], measured[:half])(genes[half:]), measured[half:])
    line = np.polyfit(macs[:half], measured[:half], 1)
    found["macs"] = score(np.polyval(line, macs[half:]), measured[half:])
    spread = float(np.median([(row["p90_ms"] - row["p10_ms"]) / row["median_ms"] for row in rows]))
    found |= {
        "space": args.space,
        "device": table.device,
        "shapes": len(shapes),
        "ms_per_shape": 1e3 * seconds / len(shapes),
        "network_ms": [float(measured.min()), float(np.median(measured)), float(measured.max())],
        "network_spread": spread,
        "correction": {"intercept_ms": latency.intercept, "slope": latency.slope},
        "about": about(),
    }
    print(json.dumps(found, indent=2))
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    run_main(main)
