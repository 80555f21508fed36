"""Accuracy predictors on measured subnets: order, error, regret and calibration on subnets that no fit saw.

    OFA_DATA=<folder> python scripts/benchmarks/predictors_accuracy.py [--models auto gp] [--sizes 50 100]
    ... --table peak --sizes 50 100        the noisy table with three resolutions
    ... --table macro --sizes 50 100 250   NAS-Bench-Macro, 8 blocks with 3 choices
    ... --table FILE.csv --space ofa_resnet50 --column top1   any table that `predictors.tables.read_table` reads
    ... --split later --sizes 100          the shift of a search: fitted on 100 random rows of the worse half by
                                           accuracy, tested on the whole better half
    ... --split first --sizes 100          fitted on the first 100 rows of the file, tested on the later ones; whether
                                           that is the order in which a search met them, the tables do not say

Rivals in the same run, on the same splits: scikit-learn's models and once-for-all's network (`accuracy_rivals.py`).
Printed: mean and standard deviation over splits.  regret: how far the best of the 10 predicted best is behind the best.
50 %, 90 %: share of the measured values inside those intervals.  log loss: mean of -log density, lower is better.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.files import write_json
from ofa.space import Genes, Space
from predictors.accuracy import Accuracy
from predictors.costs import Macs, Params
from predictors.models import MODELS
from predictors.scores import Learned, first_split, held_out, later_split, random_split
from predictors.tables import read_frame, read_table, resolutions
from scripts.benchmarks.about import about, run_main, space_of
from scripts.benchmarks.accuracy_rivals import RIVALS

Table = tuple[Space, Genes, NDArray[np.float64]]
SPLITS = {"random": random_split, "later": later_split, "first": first_split}


def read_measured(path: Path, space: str, column: str) -> Table:
    """A space with the resolutions of a table, genes (N, G) and accuracy in percent (N,); counts are compared."""
    frame, known = read_frame(path), space_of(space)
    known = replace(known, resolution=tuple(resolutions(frame)) or known.resolution)
    genes, top1 = read_table(path, known, column)
    for name, count in (("macs", Macs), ("flops", Macs), ("params", Params)):
        if name in frame:
            same = int((count(known)(genes) == frame[name][frame[column].notna()]).sum())
            print(f"{name}: as counted here in {same} of {len(genes)} rows")
    return known, genes, top1 if top1.max() > 1 else 100 * top1


TABLES: dict[str, tuple[str, str, str]] = {
    "r224": ("tables/ofa_mbv3_w1.0_imagenet_r224.csv", "ofa_mbv3_w1.0", "top1"),
    "peak": ("tables/ofa_mbv3_w1.0_imagenet_peak.csv", "ofa_mbv3_w1.0", "top1"),
    "macro": ("tables/nas_bench_macro.csv", "nas_bench_macro", "mean_acc"),
}  # file in OFA_DATA, space, column


def main() -> None:
    """Print a row for each model and sample size, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*RIVALS, *MODELS, "auto"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 100, 250, 500])
    parser.add_argument("--table", default="r224", help=f"{', '.join(TABLES)}, or a CSV file")
    parser.add_argument("--space", default="ofa_mbv3_w1.0", help="of a CSV file")
    parser.add_argument("--column", default="top1", help="of a CSV file: accuracy, in percent or as a share")
    parser.add_argument("--split", choices=SPLITS, default="random")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the splits")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    name, *of = TABLES.get(args.table, (args.table, args.space, args.column))
    folder = Path(os.environ.get("OFA_DATA", "../shared/data")) if args.table in TABLES else Path()
    space, genes, top1 = read_measured(folder / name, *of)
    makers: dict[str, Callable[[int], Learned]] = {name: partial(make, space) for name, make in RIVALS.items()}
    makers |= {name: partial(_accuracy, space, name) for name in (*MODELS, "auto")}
    options = {"repeats": args.repeats, "seed": args.seed, "split": SPLITS[args.split]}
    print(f"{name}, {len(top1)} rows, {args.split} splits: {args.repeats}, {about()}")
    print(f"{'model':18} {'n':>4} {'tau':>13} {'RMSE, points':>15} {'regret':>7} 50 % 90 %  log loss   CPU s")
    rows: list[dict[str, Any]] = []
    sizes = [size for size in args.sizes if size <= len(top1) - 2]
    if len(sizes) < len(args.sizes):
        print(f"left out, as at least 2 networks are to be tested on: {sorted(set(args.sizes) - set(sizes))}")
    for size in sizes:
        for model in args.models:
            start = process_time()
            found = held_out(makers[model], genes, top1, fit_on=size, **options)
            found |= {"model": model, "cpu_seconds": (process_time() - start) / args.repeats}
            rows.append(found)
            print(_line(found), flush=True)
    if args.out:
        write_json(args.out, {"rows": rows, "table": name, "split": args.split, "about": about()})


def _line(found: dict[str, Any]) -> str:
    tau, error = (f"{found[k]:.3f} ± {found[f'{k}_std']:.3f}" for k in ("kendall_tau", "rmse"))
    line = f"{found['model']:18} {found['fit_on']:4} {tau:>13} {error:>15} {found['regret']:7.3f} "
    if "log_loss" in found:
        line += f"{found['coverage_50']:4.2f} {found['coverage_90']:4.2f} {found['log_loss']:9.2f}"
    else:
        line += f"{'–':>4} {'–':>4} {'–':>9}"
    return f"{line} {found['cpu_seconds']:7.2f}"


def _accuracy(space: Space, name: str, seed: int) -> Learned:
    return Accuracy(space, name, seed=seed)


if __name__ == "__main__":
    run_main(main)
