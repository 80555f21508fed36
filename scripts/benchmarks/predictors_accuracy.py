"""Accuracy predictors on once-for-all's measured ImageNet subnets: tau and RMSE on subnets that no fit saw.

    OFA_DATA=<folder> python scripts/benchmarks/predictors_accuracy.py [--models gp ridge] [--sizes 50 100]

"plain gp" is the rival: scikit-learn's Gaussian process on the same features, one length scale for all.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.files import versions, write_json
from ofa.space import Arch, Genes, Space, load_space
from predictors.accuracy import Accuracy
from predictors.features import Features
from predictors.models import MODELS
from predictors.scores import Learned, held_out

TABLE = "tables/ofa_mbv3_w1.0_imagenet_r224.csv"


class PlainGP:
    """A Gaussian process with one length scale on the standardised features."""

    def __init__(self, space: Space) -> None:
        self.features = Features(space)

    def fit(self, genes: Genes, values: ArrayLike) -> PlainGP:
        """Learn from genes (N, G) and values (N,)."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        kernel = ConstantKernel(1, (1e-3, 1e4)) * RBF(10, (0.1, 1e4)) + WhiteKernel(0.01, (1e-6, 1))
        process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
        self.model = make_pipeline(StandardScaler(), process)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a noise at its lower bound
            self.model.fit(self.features(genes), values)
        return self

    def __call__(self, genes: Genes) -> NDArray[np.float64]:
        """Predicted values, (N,)."""
        return np.asarray(self.model.predict(self.features(genes)))


def read_table(folder: Path, space: Space) -> tuple[Genes, NDArray[np.float64]]:
    """Genes (N, G) and top-1 in percent (N,) of the published subnets."""
    frame = pd.read_csv(folder / TABLE)
    columns = (frame[name].str.split("-").map(lambda row: tuple(map(int, row))) for name in ("d", "ks", "e"))
    archs = [Arch(int(r), *rest) for r, *rest in zip(frame.r, *columns, strict=True)]
    return space.encode(archs), frame.top1.to_numpy()


def main() -> None:
    """Print a row for each model and sample size, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["plain gp", *MODELS, "auto"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 100, 250, 500])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    space = load_space("ofa_mbv3_w1.0")
    genes, top1 = read_table(Path(os.environ.get("OFA_DATA", "../shared/data")), space)
    makers: dict[str, Callable[[int], Learned]] = {"plain gp": lambda seed: PlainGP(space)}
    makers |= {name: partial(_accuracy, space, name) for name in (*MODELS, "auto")}
    rows: list[dict[str, Any]] = []
    print(f"{'model':10} {'n':>5} {'tau':>15} {'RMSE, points':>17} {'s/fit':>7}")
    for name in args.models:
        for size in args.sizes:
            start = perf_counter()
            found = held_out(makers[name], genes, top1, fit_on=size, repeats=args.repeats)
            found |= {"model": name, "seconds": (perf_counter() - start) / args.repeats}
            rows.append(found)
            tau, error = (f"{found[k]:.3f} ± {found[f'{k}_std']:.3f}" for k in ("kendall_tau", "rmse"))
            print(f"{name:10} {size:5} {tau:>15} {error:>17} {found['seconds']:7.2f}", flush=True)
    if args.out:
        write_json(args.out, {"rows": rows, "table": TABLE, "versions": versions()})


def _accuracy(space: Space, name: str, seed: int) -> Learned:
    return Accuracy(space, name, seed=seed)


if __name__ == "__main__":
    main()
