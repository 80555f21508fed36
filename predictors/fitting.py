"""Fit the learned predictors and score them honestly: on networks that the fit never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes
from predictors import transfer
from predictors.accuracy import FEWEST
from predictors.latency import Latency
from predictors.scores import held_out, require_splits, sample_curve, score
from predictors.tables import distinct

Float = NDArray[np.float64]
LEAST = {"subnets": FEWEST + 2, "int8_subnets": transfer.FEWEST, "latency_nets": 3}  # to learn from and to test on


def fit_accuracy(
    make: Callable[..., Any],
    genes: Genes,
    accuracy: Float,
    *,
    share: float = 0.25,
    repeats: int = 5,
    seed: int = 0,
) -> tuple[Any, dict[str, Any], pd.DataFrame]:
    """The predictor fitted on all networks (N, G), its scores, and its predictions for one held-out part.

    make: builds an unfitted predictor, `make(seed=...)`.  Of one that chooses a model (`chosen`) the sample curve and
    the predictions are by that model, `make(model=chosen, seed=...)`.  share: of the networks held out in each of
    `repeats` random splits; every split chooses its model anew.  Raises UserError for too few networks, no split, or a
    share that is none.
    """
    require_scored(share=share, repeats=repeats)
    genes, accuracy = distinct(genes, accuracy)
    if len(genes) < LEAST["subnets"]:
        raise UserError(
            f"{len(genes)} measured subnets are too few to learn from and to test on; measure at least "
            f"{LEAST['subnets']} (measure.subnets)"
        )
    fit_on = min(len(genes) - 2, max(FEWEST, round(len(genes) * (1 - share))))
    split = held_out(lambda s: make(seed=s), genes, accuracy, fit_on=fit_on, repeats=repeats, seed=seed)
    predictor = make(seed=seed).fit(genes, accuracy)
    sizes = [n for n in np.unique(np.linspace(FEWEST, fit_on, 4).astype(int)) if n < len(genes) - 1]
    chosen = getattr(predictor, "chosen", None)
    again = partial(make, model=chosen) if chosen else make
    curve = sample_curve(lambda s: again(seed=s), genes, accuracy, sizes=sizes, repeats=repeats, seed=seed)
    report = {
        "model": chosen or type(predictor).__name__,
        "n_fit": fit_on,
        "n_heldout": split["held_out"],
        "repeats": repeats,
        "tau": {"mean": split["kendall_tau"], "std": split["kendall_tau_std"]},
        "rmse": {"mean": split["rmse"], "std": split["rmse_std"]},
        "regret": {"mean": split["regret"], "std": split["regret_std"], "top": split["top"]},
        **{name: split[name] for name in ("coverage_50", "coverage_90", "log_loss")},
        "curve": [_curve_row(row) for row in curve],
        "cross_validation": getattr(predictor, "cross_validation", {}),
    }
    order = np.random.default_rng((seed, 0)).permutation(len(genes))
    train, test = order[:fit_on], order[fit_on:]
    tested = again(seed=0).fit(genes[train], accuracy[train])
    return predictor, report, _frame("accuracy", tested, genes[test], accuracy[test])


def require_scored(*, share: float, repeats: int) -> None:
    """Raise UserError for a share to hold out that is none, or no split."""
    if not isinstance(share, (int, float)) or not 0 < share < 1:
        raise UserError(f"fit.share={share} must be above 0 and below 1, the part of the networks held out")
    require_splits(repeats)


def _curve_row(row: dict[str, Any]) -> dict[str, Any]:
    found = {"n": row["fit_on"], "n_heldout": row["held_out"], "tau": row["kendall_tau"]}
    return found | {"tau_std": row["kendall_tau_std"], "rmse": row["rmse"], "rmse_std": row["rmse_std"]}


def fit_latency(latency: Latency, genes: Genes, measured: Float) -> tuple[Latency, dict[str, Any], pd.DataFrame]:
    """The look-up with its correction fitted on all networks (N, G), its scores, and predictions for the held-out half.

    The scores hold for a correction fitted on every other network and tested on the rest.
    """
    latency.fit(genes[::2], measured[::2])
    predictions = _frame("latency", latency, genes[1::2], measured[1::2])
    found = score(predictions["predicted"], predictions["measured"])
    latency.fit(genes, measured)
    report = {
        "tau": found["kendall_tau"],
        "mape": found["mape"],
        "within_10_percent": found["within_10_percent"],
        "n_heldout": found["n"],
        "shapes": len(latency.table.times),
        "intercept_ms": latency.intercept,
        "slope": latency.slope,
        "device": latency.table.device,
    }
    return latency, report, predictions


def join(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Predictions of several predictors in one table."""
    return pd.concat(frames, ignore_index=True)


def _frame(kind: str, predictor: Callable[[Genes], Float], genes: Genes, measured: Float) -> pd.DataFrame:
    return pd.DataFrame({"kind": kind, "predicted": predictor(genes), "measured": measured})
