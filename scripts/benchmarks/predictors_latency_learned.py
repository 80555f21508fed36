"""Latency learned from whole measured networks: order and error on networks that no fit saw, alone and with donors.

    OFA_DATA=<folder> python scripts/benchmarks/predictors_latency_learned.py own
    OFA_DATA=<folder> python scripts/benchmarks/predictors_latency_learned.py transfer

own: --samples networks of each column, against the rivals: scikit-learn's Gaussian process and ridge on one-hot genes
and stage sums, total depth, MACs.  The rivals that are fitted learn log latency too.  transfer: --few networks of the
column with another column as donor (all rows of it, the tested networks' among them; the same device at another batch
size is another column), with all other columns and with none, against --samples networks alone; both are tested on the
same networks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.errors import UserError
from ofa.files import write_json
from ofa.space import Genes, Space
from predictors.costs import Macs
from predictors.features import Features
from predictors.learned_latency import LearnedLatency, read_latencies
from predictors.scores import kendall_tau, score
from predictors.tables import distinct, read_frame, resolutions
from scripts.benchmarks.about import about, run_main, space_of
from scripts.benchmarks.accuracy_rivals import PlainGP

Float = NDArray[np.float64]
Rows = list[dict[str, Any]]
Fit = Callable[[Genes, Float], Callable[[Genes], Float]]
SCORES = ("kendall_tau", "mape", "within_10_percent")
TABLE = "tables/ofa_mbv3_w1.0_latency.csv"


def main() -> None:
    """Print a row for each column and model, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["own", "transfer"])
    parser.add_argument("--table", type=Path, help=f"CSV file (default: {TABLE} in OFA_DATA)")
    parser.add_argument("--columns", nargs="+", help="columns in ms (default: every one called latency_ms...)")
    parser.add_argument("--space", default="ofa_mbv3_w1.0")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--few", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    path = args.table or Path(os.environ.get("OFA_DATA", "../shared/data")) / TABLE
    if args.what == "transfer" and args.few > args.samples:
        raise UserError(f"--few {args.few} are more than --samples {args.samples}; give fewer")
    frame, space = read_frame(path), space_of(args.space)
    space, names = replace(space, resolution=tuple(resolutions(frame)) or space.resolution), list(frame.columns)
    columns = args.columns or [name for name in names if name.startswith("latency_ms")]
    if not columns:
        raise UserError(f"{path} has no column latency_ms...; name one of {', '.join(names)} by --columns")
    tables = {column: distinct(*read_latencies(path, space, column)) for column in columns}
    if args.what == "transfer" and len(tables) < 2:
        raise UserError(f"{path} has {columns[0]} alone; a transfer needs the column of another device")
    print(f"{'column':24} {'model':26} {'tau':>14} {'error':>7} {'within 10 %':>12}   n = {args.repeats} splits")
    rows = (own if args.what == "own" else transfer)(space, tables, args)
    found = {"rows": rows, "table": path.name, "options": vars(args) | {"table": path.name}, "about": about()}
    print(found["about"])
    if args.out:
        write_json(args.out, found)


def own(space: Space, tables: Mapping[str, tuple[Genes, Float]], args: argparse.Namespace) -> Rows:
    """Scores of this project's predictor and of the rivals on each column."""
    rows: Rows = []
    for column, (genes, ms) in tables.items():
        makers = _makers(space)
        kept: dict[str, Rows] = {name: [] for name in makers}
        for train, test in _splits(len(ms), args):
            for name, make in makers.items():
                predicted = make(genes[train], ms[train])(genes[test])
                kept[name].append(_score(name, predicted, ms[test]))
                if name == "learned":
                    shown = predicted, ms[test]
        rows += [_row(column, name, found) for name, found in kept.items()]
        _beside(*shown)
    return rows


def transfer(space: Space, tables: Mapping[str, tuple[Genes, Float]], args: argparse.Namespace) -> Rows:
    """Scores with a few networks of each column and each other column as donor, all of them, or none."""
    donors: dict[str, Any] = {column: Fixed(LearnedLatency(space).fit(*pair)) for column, pair in tables.items()}
    rows: Rows = []
    for column, (genes, ms) in tables.items():
        others = {f"{args.few} + {_short(name)}": [donor] for name, donor in donors.items() if name != column}
        others |= {f"{args.few} + all others": [donors[name] for name in donors if name != column]}
        others |= {f"{args.few} alone": []}
        kept: dict[str, Rows] = {name: [] for name in (f"{args.samples} alone", *others)}
        for train, test in _splits(len(ms), args):
            alone = LearnedLatency(space).fit(genes[train], ms[train])
            kept[f"{args.samples} alone"].append(score(alone(genes[test]), ms[test], SCORES))
            few = train[: args.few]
            for name, given in others.items():
                made = LearnedLatency(space, given).fit(genes[few], ms[few])
                kept[name].append(score(made(genes[test]), ms[test], SCORES))
        rows += [_row(column, name, found) for name, found in kept.items()]
        _beside(made(genes[test]), ms[test])
    return rows


def _makers(space: Space) -> dict[str, Fit]:
    features, macs = Features(space), Macs(space)

    def plain_gp(genes: Genes, ms: Float) -> Callable[[Genes], Float]:
        model = PlainGP(space).fit(genes, np.log(ms))
        return lambda queries: np.exp(model(queries))

    def ridge(genes: Genes, ms: Float) -> Callable[[Genes], Float]:
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 25))).fit(features(genes), np.log(ms))
        return lambda queries: np.exp(model.predict(features(queries)))

    return {
        "learned": lambda genes, ms: LearnedLatency(space).fit(genes, ms),
        "plain gp": plain_gp,
        "ridge": ridge,
        "total depth": lambda genes, ms: lambda queries: space.values(queries, "depth").sum(axis=1),
        "MACs": lambda genes, ms: lambda queries: macs(queries).astype(np.float64),
    }


class Fixed:
    """A donor that answers each array of genes once: many fits ask for the same."""

    def __init__(self, donor: LearnedLatency) -> None:
        self.space, self._donor = donor.space, donor
        self._known: dict[bytes, Float] = {}

    def __call__(self, genes: Genes) -> Float:
        """Milliseconds (N,) of genes (N, G)."""
        raw = genes.tobytes()
        if raw not in self._known:
            self._known[raw] = self._donor(genes)
        return self._known[raw]


def _splits(rows: int, args: argparse.Namespace) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    if not 0 < args.samples <= rows - 2:
        raise UserError(f"--samples {args.samples} must leave at least 2 of {rows} networks to test on")
    orders = [np.random.default_rng((args.seed, repeat)).permutation(rows) for repeat in range(args.repeats)]
    return [(order[: args.samples], order[args.samples :]) for order in orders]


def _score(name: str, predicted: Float, ms: Float) -> dict[str, float]:
    """All scores of a latency; the order alone of what is not in milliseconds."""
    if name in ("total depth", "MACs"):
        return {"kendall_tau": kendall_tau(predicted, ms), "mape": np.nan, "within_10_percent": np.nan}
    return score(predicted, ms, SCORES)


def _row(column: str, name: str, found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    mean = {key: float(np.mean([row[key] for row in found])) for key in SCORES}
    std = float(np.std([row["kendall_tau"] for row in found]))
    text = f"{mean['mape']:7.1%} {mean['within_10_percent']:12.1%}" if np.isfinite(mean["mape"]) else ""
    print(f"{_short(column):24} {name:26} {mean['kendall_tau']:.3f} ± {std:.3f}  {text}", flush=True)
    return {"column": column, "model": name, "kendall_tau_std": std, "splits": len(found)} | mean


def _beside(predicted: Float, measured: Float) -> None:
    """Seven networks of the last split, from the fastest to the slowest as predicted."""
    some = np.argsort(predicted)[np.linspace(0, len(predicted) - 1, 7).astype(int)]
    pairs = [f"{predicted[i]:.2f} / {measured[i]:.2f}" for i in some]
    print(f"{'':24} predicted / measured ms: {', '.join(pairs)}", flush=True)


def _short(column: str) -> str:
    return column.removeprefix("latency_ms_")


if __name__ == "__main__":
    run_main(main)
