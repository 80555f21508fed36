"""Measurements that are made once: each is on disk before the next one begins.  N networks, G genes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.files import append_jsonl, read_jsonl
from ofa.space import Genes
from search.agents import keys


class Measured:
    """A predictor that measures: genes (N, G) to (N,), one network at a time, none twice.

    measure: what one call costs much: genes (1, G) to (1,).
    path: JSON lines of the measurements; what is there is not measured again, by any search that shares the file.
    Raises UserError where a measurement is no finite number.
    """

    def __init__(self, measure: Callable[[Genes], NDArray[Any]], path: str | Path) -> None:
        self._measure, self._path = measure, Path(path)
        self._known: dict[bytes, float] = {}
        for line in read_jsonl(self._path):
            self._known[keys(np.array([line["genes"]], dtype=np.int8))[0]] = line["value"]

    def __len__(self) -> int:
        """How many networks were measured."""
        return len(self._known)

    def __call__(self, genes: Genes) -> NDArray[np.float64]:
        """The measurements, (N,)."""
        keyed = keys(genes)
        for row, key in enumerate(keyed):
            if key not in self._known:
                self._known[key] = self._one(genes[row : row + 1])
        return np.array([self._known[key] for key in keyed])

    def _one(self, genes: Genes) -> float:
        value = float(np.asarray(self._measure(genes)).reshape(-1)[0])
        if not np.isfinite(value):
            raise UserError(f"network {genes[0].tolist()} was measured as {value}; a number is needed")
        append_jsonl(self._path, {"genes": genes[0].tolist(), "value": value})
        return value
