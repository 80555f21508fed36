"""Latency summed from once-for-all's look-up tables beside the latency published for networks of that device.

    OFA_DATA=<folder> python scripts/benchmarks/predictors_lut.py [--tables FOLDER] [--device note10] [--space NAME]

Then for random networks of the space: the sum for all at once, how well a line through the MACs of 200 others tells it
(the rival), and architectures a second.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.errors import UserError
from ofa.files import read_json, write_json
from ofa.published import read_network
from predictors.costs import Macs
from predictors.lut import BlockTables, LutLatency, spec_latency
from predictors.scores import score
from scripts.benchmarks.about import about, run_main, space_of

FITTED = 200  # random networks that the rival's line is fitted on


def main() -> None:
    """Print the networks with their two latencies, and the scores on random networks."""
    data = Path(os.environ.get("OFA_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=data / "tables/note10_lut")
    parser.add_argument("--published", type=Path, default=data / "tables/published_subnets.json")
    parser.add_argument("--device", default="note10")
    parser.add_argument("--space", default="ofa_mbv3_w1.2")
    parser.add_argument("--networks", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    if args.networks < FITTED + 2:
        raise UserError(f"--networks {args.networks} must be at least {FITTED + 2}, as {FITTED} fit the rival's line")
    tables = BlockTables.load(args.tables)
    rows = list(published(args.published, args.device, tables))
    priced = [row for row in rows if "predicted_ms" in row]
    errors = [abs(row["predicted_ms"] / row["published_ms"] - 1) for row in priced]
    found: dict[str, Any] = {"networks": rows, "space": random_networks(args, tables), "about": about()}
    if priced:
        print(f"{len(priced)} of {len(rows)} priced, largest error {max(errors):.2%}")
    print("space:", found["space"])
    print(found["about"])
    if args.out:
        write_json(args.out, found)


def published(path: Path, device: str, tables: BlockTables) -> Iterator[dict[str, Any]]:
    """Networks of the device with the latency that their authors published, and what the tables say or lack."""
    content = read_json(path)
    nets = content.get("ofa_specialized", {}).get("nets", []) if isinstance(content, dict) else []
    timed = [net for net in nets if net["published"].get("latency_ms") is not None]
    if not any(net["published"]["device"] == device for net in timed):
        known = sorted({net["published"]["device"] for net in timed})
        print(f"{path} has no latency of {device}; it has those of {', '.join(known) or 'no device'}")
    for net in timed:
        if net["published"]["device"] != device:
            continue
        row = {"network": net["net_id"], "published_ms": net["published"]["latency_ms"]}
        try:
            row["predicted_ms"] = spec_latency(read_network(net)[0], tables)
            print(f"{row['network']:42} predicted {row['predicted_ms']:6.2f} ms, published {row['published_ms']} ms")
        except UserError as error:
            row["error"] = str(error)
            print(f"{row['network']:42} published {row['published_ms']} ms, not priced: {error}")
        yield row


def random_networks(args: argparse.Namespace, tables: BlockTables) -> dict[str, Any]:
    """The sums of random networks, MACs as a rival for them, and speed."""
    space = space_of(args.space)
    space = replace(space, resolution=tuple(sorted(tables.times)))
    latency, genes = LutLatency(space, args.tables), space.sample(args.networks, np.random.default_rng(args.seed))
    start = perf_counter()
    ms = latency(genes)
    seconds = perf_counter() - start
    macs = Macs(space)(genes)
    line = np.polyfit(macs[:FITTED], ms[:FITTED], 1)
    return {
        "ms": [float(value) for value in np.quantile(ms, [0, 0.5, 1])],
        "line through MACs": score(np.polyval(line, macs[FITTED:]), ms[FITTED:]),
        "architectures_per_second": round(args.networks / seconds),
    }


if __name__ == "__main__":
    run_main(main)
