"""Exact counts of 100,000 architectures in one call, and once-for-all's closed form and fvcore beside them.

    pip install --no-deps --target build/once-for-all ofa==0.1.0.post202307202001
    python scripts/benchmarks/counts.py [--ofa build/once-for-all] [--rounds 9]

One thread, process CPU time, the sides in turns: a call of ours, then `--closed` calls of once-for-all's FLOPs model
(`ofa.nas`) and one fvcore analysis in its own process.  Both count the same architecture alike, to 0.1 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.files import write_json
from ofa.space import Genes, load_space
from predictors import Macs, Params, PeakMemory
from predictors.memory import MODELS
from scripts.benchmarks.about import about
from scripts.benchmarks.once_for_all import OnceForAll, add_option, arch_dict

SINGLES = 200  # architectures counted one a call
SPACES = ("ofa_mbv3_w1.0", "ofa_proxyless_w1.3", "ofa_resnet50", "mcunet", "nas_bench_macro")


def rates(n: int, rounds: int) -> list[dict[str, Any]]:
    """Millions of architectures a second of each count of each space: median, lowest and highest round."""
    rows = []
    for name in SPACES:
        space = load_space(name)
        genes = space.sample(n, np.random.default_rng(0))
        costs: dict[str, Any] = {"macs": Macs(space), "params": Params(space)}
        costs |= {f"memory {model}": PeakMemory(space, model) for model in MODELS}
        for cost, count in costs.items():
            count(genes)
            seconds = [_cpu(partial(count, genes)) for _ in range(rounds)]
            speeds = n / np.array(seconds) / 1e6
            rows.append({"space": name, "cost": cost, "median": float(np.median(speeds)), **_ends(speeds)})
    return rows


def against(rival: OnceForAll, n: int, rounds: int, closed: int) -> dict[str, Any]:
    """CPU microseconds an architecture of ours, the closed form and fvcore, and their ratios round by round."""
    space = load_space("ofa_mbv3_w1.0")
    genes, macs = space.sample(n, np.random.default_rng(0)), Macs(space)
    rival("build", net=space.name)
    arch, side = arch_dict(space, genes[:1]), int(space.values(genes[:1], "resolution")[0, 0])
    theirs, ours = rival("flops", arch=arch, resolution=side).value * 1e6, int(macs(genes[:1])[0])
    assert abs(theirs / ours - 1) < 1e-3, (theirs, ours)
    times = []
    rival("extract", arch=arch)  # fvcore counts the extracted net
    for _ in range(rounds + 1):
        mine, single = _cpu(partial(macs, genes)) / n, _cpu(partial(_each, macs, genes[:SINGLES])) / SINGLES
        other = rival("flops", arch=arch, resolution=side, n=closed).cpu_s / closed
        times.append((mine, single, other, rival("fvcore", resolution=side).cpu_s))
    mine_, single_, other_, fvcore = np.array(times[1:]).T * 1e6
    found = {"ours_us": mine_, "ours_one_a_call_us": single_, "closed_form_us": other_, "fvcore_us": fvcore}
    found |= {"closed_form_ratio": other_ / mine_, "fvcore_ratio": fvcore / mine_}
    return {name: {"median": float(np.median(values)), **_ends(values)} for name, values in found.items()}


def _each(count: Any, genes: Genes) -> None:
    for row in range(len(genes)):
        count(genes[row : row + 1])


def _cpu(call: Any) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _ends(values: Any) -> dict[str, float]:
    return {"lowest": float(values.min()), "highest": float(values.max())}


def main() -> None:
    """Print the rates, then the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser)
    parser.add_argument("--n", type=int, default=100_000, help="architectures in one call")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--closed", type=int, default=50, help="calls of the closed form in each round")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    found: dict[str, Any] = {"n": args.n, "rounds": args.rounds, "rates": rates(args.n, args.rounds)}
    print(f"{args.n} architectures a call, {args.rounds} rounds, 1 thread: million architectures/s, median [low, high]")
    for row in found["rates"]:
        print(f"{row['space']:20} {row['cost']:30} {row['median']:6.2f} [{row['lowest']:.2f}, {row['highest']:.2f}]")
    with OnceForAll(args.ofa) as rival:
        found["against"] = against(rival, args.n, args.rounds, args.closed)
    for name, row in found["against"].items():
        print(f"{name:20} {row['median']:12.4g} [{row['lowest']:.4g}, {row['highest']:.4g}]")
    found["about"] = about()
    print(json.dumps(found["about"]))
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
