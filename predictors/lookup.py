"""Costs of whole networks from a table with one row for each form that a unit can take.

N architectures, G genes, B elastic blocks, R forms, U units, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.space import Genes, Space
from ofa.table import LayerTable, layer_table

LayerCost = Callable[[LayerTable], NDArray[Any]]


def forms(space: Space) -> Genes:
    """Architectures (R, G) among which every unit of the space occurs in every form it can take.

    What a unit costs depends on the resolution, the width and its own kernel and expand ratio, on nothing else: one
    full-depth architecture for each combination of the four, with the same kernel and expand choice in every block.
    """
    kernel, expand = space.columns("kernel"), space.columns("expand")
    counts = [space.counts[0], space.counts[1], space.counts[kernel].max(), space.counts[expand].max()]
    genes = np.repeat(space.largest(), np.prod(counts), axis=0)
    choices = np.array(list(product(*map(range, counts))), dtype=np.int8)
    genes[:, :2] = choices[:, :2]
    genes[:, kernel] = np.minimum(choices[:, 2:3], space.counts[kernel] - 1)
    genes[:, expand] = np.minimum(choices[:, 3:4], space.counts[expand] - 1)
    return genes


class Lookup:
    """A cost that combines costs of layers, `np.add` or `np.maximum`, looked up for many architectures at once."""

    def __init__(self, space: Space, cost: LayerCost, combine: np.ufunc = np.add) -> None:
        table = layer_table(space, forms(space))
        units, starts = np.unique(table.block, return_index=True)
        by_unit = combine.reduceat(cost(table), starts, axis=1)
        elastic = np.isin(units, len(space.stem) + np.arange(len(space.blocks)))
        self.space, self.combine = space, combine
        self.fixed = combine.reduce(by_unit[:, ~elastic], axis=1)
        self.blocks = np.ascontiguousarray(by_unit[:, elastic])
        self.choices = [int(space.counts[space.columns(name)].max()) for name in ("width", "kernel", "expand")]

    def __call__(self, genes: Genes) -> NDArray[Any]:
        """Cost of each architecture: genes (N, G) to (N,); raises UserError for genes that are not of the space."""
        self.space.validate(genes)
        width, kernel, expand = self.choices
        image = (genes[:, 0].astype(np.int32) * width + genes[:, 1]) * (kernel * expand)
        kernels, expands = (genes[:, self.space.columns(name)].astype(np.int32) for name in ("kernel", "expand"))
        form = image[:, None] + kernels * expand + expands
        used = self.space.active(genes)[:, self.space.columns("kernel")]
        blocks = self.blocks.ravel()[form * self.blocks.shape[1] + np.arange(self.blocks.shape[1])]
        return self.combine(self.fixed[image], self.combine.reduce(np.where(used, blocks, 0), axis=1))
