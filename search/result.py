"""What a search found: every evaluation, the Pareto front, the hypervolume, the chosen network; saved and loaded.

N evaluated networks in the order of evaluation, G genes, M objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ofa.files import read_json, versions, write_json, write_parquet
from ofa.space import Genes, Space, load_space
from search.pareto import front, hypervolume
from search.problem import Evaluation

EVALUATIONS, RESULT = "evaluations.parquet", "result.json"
CURVE_POINTS = 50
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SearchResult:
    """One finished search; at least one of its networks is feasible, as `run_search` starts from one.

    agent: its settings, as `repr` shows them.
    evaluations: one row for each different network: a column for each gene (choice index), one for each predictor,
        `violation` (0 where all limits are met) and `front` (feasible and dominated by no other).
    reference: the point (M,), in costs, up to which hypervolume is counted.
    seconds: wall time of asking, evaluating and telling, over all runs if the search was resumed.
    measured: names of the values that were measured; the others were computed or predicted.
    """

    space: Space
    agent: str
    seed: int
    objectives: dict[str, int]
    limits: dict[str, float]
    evaluations: pd.DataFrame
    reference: tuple[float, ...]
    seconds: float
    measured: tuple[str, ...] = ()

    @property
    def genes(self) -> Genes:
        """Genes of all evaluated networks (N, G)."""
        return self.evaluations[[gene.name for gene in self.space.genes]].to_numpy(np.int8)

    @property
    def cost(self) -> Floats:
        """Objectives of all evaluated networks as costs, lower is better (N, M)."""
        return self.evaluations[list(self.objectives)].to_numpy(float) * list(self.objectives.values())

    def values(self, rows: slice = slice(None)) -> dict[str, Floats]:
        """What each predictor said of the evaluated networks, (N,) each."""
        columns = self.evaluations.columns[len(self.space.genes) : -2]
        return {name: self.evaluations[name].to_numpy(float)[rows] for name in columns}

    @property
    def front(self) -> pd.DataFrame:
        """The rows of `evaluations` on the Pareto front, the best in the first objective first."""
        rows = self.evaluations[self.evaluations["front"]]
        order = np.lexsort(self.cost[rows.index].T[::-1])
        return rows.iloc[order]

    @property
    def chosen(self) -> int:
        """Row of the feasible network that is best in the first objective, then in the next."""
        return int(self.front.index[0])

    def hypervolume(self, evaluations: int | None = None) -> float:
        """Volume of costs that the feasible networks dominate, of the first `evaluations` of them or of all."""
        part = slice(None, evaluations)
        feasible = self.evaluations["violation"].to_numpy()[part] <= 0
        return hypervolume(self.cost[part][feasible], np.array(self.reference))

    def curve(self) -> list[tuple[int, float]]:
        """Hypervolume after some numbers of evaluations, at most 50 of them."""
        total = len(self.evaluations)
        steps = np.unique(np.linspace(1, total, min(CURVE_POINTS, total)).round().astype(int))
        return [(int(n), self.hypervolume(n)) for n in steps]

    def describe(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Networks as plain values: `row`, `arch`, and what was predicted of them, `values`."""
        values = self.values()
        archs = self.space.decode(self.genes[list(rows)])
        return [
            {"row": int(row), "arch": arch.to_dict(), "values": {name: float(values[name][row]) for name in values}}
            for row, arch in zip(rows, archs, strict=True)
        ]

    def save(self, folder: str | Path) -> None:
        """Write evaluations.parquet (the same for the same seed) and result.json (which holds the time, too)."""
        (Path(folder) / RESULT).unlink(missing_ok=True)  # its presence says that the evaluations are whole
        write_parquet(Path(folder) / EVALUATIONS, self.evaluations)
        write_json(Path(folder) / RESULT, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the evaluations outside the front."""
        front = self.describe(list(self.front.index))
        return {
            "agent": self.agent,
            "seed": self.seed,
            "objectives": self.objectives,
            "limits": self.limits,
            "measured": list(self.measured),
            "evaluations": len(self.evaluations),
            "feasible": int((self.evaluations["violation"] <= 0).sum()),
            "hypervolume": self.hypervolume(),
            "reference": list(self.reference),
            "curve": self.curve(),
            "chosen": front[0],
            "front": front,
            "seconds": round(self.seconds, 3),
            "space": self.space.to_dict(),
            "versions": versions(),
        }


def load_result(folder: str | Path) -> SearchResult:
    """Read what `SearchResult.save` wrote."""
    card = read_json(Path(folder) / RESULT)
    return SearchResult(
        space=load_space(card["space"]),
        evaluations=pd.read_parquet(Path(folder) / EVALUATIONS),
        reference=tuple(card["reference"]),
        measured=tuple(card.get("measured", ())),
        **{name: card[name] for name in ("agent", "seed", "objectives", "limits", "seconds")},
    )


def best_result(results: Sequence[SearchResult]) -> int:
    """Which of several searches of one problem chose the best network, the first of equals."""
    costs = [tuple(result.cost[result.chosen]) for result in results]
    return costs.index(min(costs))


def evaluation_frame(space: Space, evaluation: Evaluation) -> pd.DataFrame:
    """Evaluations as a data frame with the columns that SearchResult describes."""
    columns: dict[str, NDArray[Any]] = dict(zip((gene.name for gene in space.genes), evaluation.genes.T, strict=True))
    columns |= evaluation.values
    columns |= {"violation": evaluation.violation, "front": front(evaluation.cost, evaluation.violation)}
    return pd.DataFrame(columns)
