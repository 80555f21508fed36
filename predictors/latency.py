"""Latency of networks as the sum of their measured operations, with a linear correction.

N architectures, G genes, L layers, S shapes.  Times are milliseconds of wall clock for one batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from ofa.errors import UserError
from ofa.space import Genes, Space
from ofa.table import LayerTable
from predictors.latency_table import LatencyTable
from predictors.lookup import Lookup
from predictors.shapes import code_of, shape_codes, shape_of

Float = NDArray[np.float64]
ROUNDING = 1e-9  # of the times: a correction that makes no more of the sums is none


class Latency:
    """Milliseconds of one forward pass: genes (N, G) to (N,) float64, intercept + slope * sum of the operations.

    `fit` finds intercept and slope from a few whole networks.  Raises UserError for a shape that the table lacks.
    """

    name, unit = "latency_ms", "ms"

    def __init__(self, space: Space, table: LatencyTable, *, intercept: float = 0.0, slope: float = 1.0) -> None:
        self.space, self.table, self.intercept, self.slope = space, table, intercept, slope
        codes = np.array([code_of(shape) for shape in table.times], dtype=np.int64)
        order = np.argsort(codes)
        self._codes = codes[order]
        self._times = np.array([timing["median_ms"] for timing in table.times.values()])[order]
        self._sum = Lookup(space, self._layer_ms)

    def __call__(self, genes: Genes) -> Float:
        """Milliseconds of each architecture, (N,)."""
        return self.intercept + self.slope * self._sum(genes)

    def fit(self, genes: Genes, measured_ms: ArrayLike) -> Latency:
        """Least squares of the relative error on measured networks, genes (N, G) and times (N,), N >= 2.

        Intercept and slope are not negative: no network takes less than no time, or less than a smaller one.
        """
        measured = np.asarray(measured_ms, dtype=np.float64)
        if measured.shape != (len(genes),) or len(measured) < 2 or not np.all(measured > 0):
            raise UserError(
                f"a latency correction needs a time above 0 for each of 2 or more networks, "
                f"not {len(genes)} networks with {measured.tolist()}"
            )
        design = np.stack([np.ones(len(measured)), self._sum(genes)], axis=1)
        relative, ones = design / measured[:, None], np.ones(len(measured))
        self.intercept, self.slope = map(float, nnls(relative, ones)[0])
        if self.slope * np.ptp(design[:, 1]) < ROUNDING * measured.mean():
            # times that do not grow with the sum are noise: the sum ranks networks all the same
            self.intercept, self.slope = 0.0, float(nnls(relative[:, 1:], ones)[0][0])
        return self

    def _layer_ms(self, table: LayerTable) -> Float:
        """Milliseconds of each layer, 0 where it is skipped: (N, L)."""
        codes = shape_codes(table)
        at = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        known = (codes == 0) | (self._codes[at] == codes) if len(self._codes) else codes == 0
        if not known.all():
            shape = shape_of(int(codes[~known][0]))
            raise UserError(f"the latency table lacks {shape}; measure the shapes of space {self.space.name} first")
        return np.where(codes > 0, self._times[at], 0.0)


def latency_from_table(space: Space, table: str) -> Latency:
    """Latency on the device that a table written by ofa-latency is of; nothing of whole networks corrects it."""
    return Latency(space, LatencyTable.load(table))
