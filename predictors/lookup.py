"""Costs of whole networks from a table with one row for each form that a unit can take.

N architectures, G genes, B elastic blocks, R forms, U units, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import OF_BLOCKS, Genes, Space
from ofa.table import LayerTable, layer_table
from ofa.units import FIXED, UnitTable

LayerCost = Callable[[LayerTable], NDArray[Any]]
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
    """A cost that combines costs of layers, `np.add` or `np.maximum`, looked up for many architectures at once.

    What is always there, by the width multipliers it depends on, and every elastic block has a table of its own, whose
    row is the number of the form, plus, for each choice of the depth that can skip a block, a table's length.
    """

    def __init__(self, space: Space, cost: LayerCost, combine: np.ufunc = np.add) -> None:
        if not isinstance(space, Space):
            raise UserError(f"{space!r} is no space; give load_space(<name>), or a Space")
        self.space, self.combine = space, combine
        table = layer_table(space, forms(space))
        starts = np.unique(table.block, return_index=True)[1]
        by_unit = combine.reduceat(cost(table), starts, axis=1)
        units, strides = table.units, np.cumprod([1, *_radix(space)[:0:-1]])[::-1]
        pairs = [_pair(units, u) for u in range(len(units.kind))]
        at = {gene.name: column for column, gene in enumerate(space.genes)}
        tables, digits = [], []
        for block, pair in dict.fromkeys(zip(units.block.tolist(), pairs, strict=True)):
            own = [u for u in range(len(pairs)) if (units.block[u], pairs[u]) == (block, pair)]
            costs, columns = combine.reduce(by_unit[:, own], axis=1), {0: int(strides[0])}
            columns |= {1 + w: int(d) for w, d in zip(pair, strides[1:3], strict=True) if w != FIXED}
            if block != FIXED:
                stage, position = space.blocks[block]
                names = {f"{name}.{stage}.{position}": int(d) for name, d in zip(OF_BLOCKS, strides[3:], strict=True)}
                columns |= {at[name]: d for name, d in names.items() if name in at}
                if (depth := at.get(f"depth.{stage}")) is not None:
                    columns |= {depth: len(costs)}
                    kept = np.array(space.stages[stage].blocks) > position
                    costs = np.where(kept[:, None], costs, 0).ravel()
            tables.append(costs)
            digits.append({column: stride for column, stride in columns.items() if space.counts[column] > 1})
        self._table, self._first = np.concatenate(tables), np.cumsum([0, *map(len, tables[:-1])])[:, None]
        self._type: Any = np.int16 if max(map(len, tables)) < 2**15 else np.int32
        self._terms = _terms(digits)

    def __call__(self, genes: Genes) -> NDArray[Any]:
        """Cost of each architecture: genes (N, G) to (N,); raises UserError for genes that are not of the space."""
        self.space.validate(genes)
        if len(genes) <= CHUNK:
            return self._chunk(genes)
        return np.concatenate([self._chunk(genes[start : start + CHUNK]) for start in range(0, len(genes), CHUNK)])

    def _chunk(self, genes: Genes) -> NDArray[Any]:
        columns = genes.T.astype(self._type, order="C")
        rows = np.zeros((len(self._first), len(genes)), dtype=self._type)
        for tables, own, stride in self._terms:
            rows[tables] += columns[own] * self._type(stride)
        return self.combine.reduce(self._table.take(rows + self._first), axis=0)


def _terms(digits: list[dict[int, int]]) -> list[tuple[slice, slice, int]]:
    """(tables, columns, stride) such that each table's row is the sum of its columns times their strides.

    Neighbouring tables with the same column, or with neighbouring ones, are one term.
    """
    singles = [(stride, table, column) for table, columns in enumerate(digits) for column, stride in columns.items()]
    terms: list[tuple[slice, slice, int]] = []
    for stride, table, column in sorted(singles):
        tables, own, last = terms[-1] if terms else (slice(0, 0), slice(0, 0), 0)
        shared = own == slice(column, column + 1)
        beside = own.stop == column and own.stop - own.start == tables.stop - tables.start
        if last == stride and tables.stop == table and (shared or beside):
            terms[-1] = slice(tables.start, table + 1), slice(own.start, column + 1), stride
        else:
            terms.append((slice(table, table + 1), slice(column, column + 1), stride))
    return terms


def _pair(units: UnitTable, unit: int) -> tuple[int, int]:
    """The width multipliers at an even and at an odd position that a unit depends on."""
    pair = [FIXED, FIXED]
    for width in (int(units.width_in[unit]), int(units.width_out[unit])):
        if width != FIXED:
            pair[width % 2] = width  # the only one there: a Space refuses others, but where they have no choice
    return pair[0], pair[1]
