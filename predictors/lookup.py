"""Costs of whole networks from a table with one row for each form that a unit can take.

N architectures, G genes, B elastic blocks, R forms, U units, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.space import OF_BLOCKS, Genes, Space
from ofa.table import LayerTable, layer_table
from ofa.units import FIXED, UnitTable

LayerCost = Callable[[LayerTable], NDArray[Any]]
Index = NDArray[np.intp]
CHUNK = 8192  # architectures at a time, so that the rows in work stay in the cache


def forms(space: Space) -> Genes:
    """Architectures (R, G) among which every unit of the space occurs in every form it can take.

    What a unit costs depends on the resolution, the width multipliers of its input and output, and its own kernel,
    expand ratio and operation, on nothing else: one full-depth architecture for each combination of these, with the
    same choice in every block.  Where there are several width multipliers, one choice for those at even positions and
    one for those at odd ones: input and output of a unit follow the same one or two neighbours.
    """
    genes = np.repeat(space.largest(), np.prod(_radix(space)), axis=0)
    choices = np.array(list(product(*map(range, _radix(space)))), dtype=np.int8)
    genes[:, 0] = choices[:, 0]
    widths = space.columns("width")
    for i, column in enumerate(range(widths.start, widths.stop)):
        genes[:, column] = choices[:, 1 + i % 2]
    for i, name in enumerate(OF_BLOCKS):
        columns = space.columns(name)
        genes[:, columns] = np.minimum(choices[:, 3 + i, None], space.counts[columns] - 1)
    return genes


def _radix(space: Space) -> list[int]:
    """Choices of resolution, even width, odd width, kernel, expand, op; a form is a number in this mixed radix."""
    width = len(space.width)
    blocks = [int(space.counts[space.columns(name)].max(initial=1)) for name in OF_BLOCKS]
    return [len(space.resolution), width, width if space.widths > 1 else 1, *blocks]


class Lookup:
    """A cost that combines costs of layers, `np.add` or `np.maximum`, looked up for many architectures at once."""

    def __init__(self, space: Space, cost: LayerCost, combine: np.ufunc = np.add) -> None:
        self.space, self.combine = space, combine
        table = layer_table(space, forms(space))
        starts = np.unique(table.block, return_index=True)[1]
        by_unit = combine.reduceat(cost(table), starts, axis=1)
        units = table.units
        self._strides = np.cumprod([1, *_radix(space)[:0:-1]])[::-1]
        pairs = [_pair(units, u) for u in range(len(units.kind))]
        fixed = np.flatnonzero(units.block == FIXED)
        self._fixed = {
            pair: combine.reduce(by_unit[:, [u for u in fixed if pairs[u] == pair]], axis=1)
            for pair in dict.fromkeys(pairs[u] for u in fixed)
        }
        self._blocks = []
        for block, (s, position) in enumerate(space.blocks):
            own = np.flatnonzero(units.block == block)
            if len(own):
                costs = combine.reduce(by_unit[:, own], axis=1)
                costs = np.append(costs, np.zeros_like(costs))  # the second half: the block is skipped
                self._blocks.append((pairs[own[0]], self._columns(block), costs, self._skips(int(s), int(position))))

    def __call__(self, genes: Genes) -> NDArray[Any]:
        """Cost of each architecture: genes (N, G) to (N,); raises UserError for genes that are not of the space."""
        self.space.validate(genes)
        chunks = [self._chunk(genes[start : start + CHUNK]) for start in range(0, max(len(genes), 1), CHUNK)]
        return np.concatenate(chunks)

    def _chunk(self, genes: Genes) -> NDArray[Any]:
        columns = np.ascontiguousarray(genes.T, dtype=np.intp)
        images = {pair: self._image(columns, pair) for pair in {*self._fixed, *(block[0] for block in self._blocks)}}
        total = reduce(self.combine, (costs.take(images[pair]) for pair, costs in self._fixed.items()))
        for pair, own, costs, skips in self._blocks:
            form = images[pair]
            for column, stride in own:
                form = form + columns[column] * stride
            if skips is not None:
                depth, half = skips
                form = form + half.take(columns[depth])
            total = self.combine(total, costs.take(form))
        return total

    def _image(self, columns: Index, pair: tuple[int, int]) -> Index:
        """The part of a form that resolution and width make, (N,)."""
        form = columns[0] * self._strides[0]
        for width, stride in zip(pair, self._strides[1:3], strict=True):
            form = form + columns[1 + width] * stride if width != FIXED else form
        return form

    def _columns(self, block: int) -> list[tuple[int, int]]:
        """Column and stride of each gene of a block."""
        names = [f"{name}.{self.space.blocks[block, 0]}.{self.space.blocks[block, 1]}" for name in OF_BLOCKS]
        at = {gene.name: column for column, gene in enumerate(self.space.genes)}
        pairs = zip(names, self._strides[3:], strict=True)
        return [(at[name], int(stride)) for name, stride in pairs if name in at]

    def _skips(self, stage: int, position: int) -> tuple[int, Index] | None:
        """The column of the depth that can skip a block, and how far each of its choices moves the form."""
        absent = np.array(self.space.stages[stage].blocks) <= position
        names = [gene.name for gene in self.space.genes]
        return (names.index(f"depth.{stage}"), absent * np.prod(_radix(self.space))) if absent.any() else None


def _pair(units: UnitTable, unit: int) -> tuple[int, int]:
    """The width multipliers at an even and at an odd position that a unit depends on."""
    pair = [FIXED, FIXED]
    for width in (int(units.width_in[unit]), int(units.width_out[unit])):
        if width != FIXED:
            assert pair[width % 2] in (FIXED, width), "neighbouring units follow neighbouring width multipliers"
            pair[width % 2] = width
    return pair[0], pair[1]
