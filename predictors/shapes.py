"""The operations that a network's latency is the sum of.  N architectures, L layers.  Needs no torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Space
from ofa.table import POOLS, LayerTable, layer_table
from predictors.lookup import forms

OPS = ("none", "conv", "depthwise", "linear", "squeeze_excite")
ACTS = ("none", "relu", "relu6", "h_swish", "h_sigmoid")
LIMITS = (len(OPS), len(ACTS), 2**15, 2**15, 2**5, 2**3, 2**12)


class Shape(NamedTuple):
    """One operation with its activation; size: side of its input in pixels.  Squeeze-excite reduces cin to cout."""

    op: str
    act: str
    cin: int
    cout: int
    kernel: int
    stride: int
    size: int


def shape_codes(table: LayerTable) -> NDArray[np.int64]:
    """The shape of each layer as one integer, 0 where there is none: (N, L).

    Squeeze-excite, from its pool to its product, is one operation, in the column of its first convolution.
    """
    op = np.where((table.groups == table.cin) & (table.cin > 1), OPS.index("depthwise"), OPS.index("conv"))
    op = np.where(np.array(table.op) == "linear", OPS.index("linear"), op)
    act = np.broadcast_to([ACTS.index(name) for name in table.act], op.shape)
    columns = np.stack([op, act, table.cin, table.cout, table.kernel, table.stride, table.size_in], axis=-1)
    for layer, name in enumerate(table.names):
        if name.endswith(".se.reduce"):
            columns[:, layer, 0], columns[:, layer, 6] = OPS.index("squeeze_excite"), table.size_out[:, layer - 1]
        elif name.endswith(".se.expand"):
            columns[:, layer] = 0
    columns[:, np.isin(table.op, POOLS)] = 0  # next to nothing; what they take is in the correction
    return _pack(columns * table.active[:, :, None])


def shape_of(code: int) -> Shape:
    """The shape that a code stands for."""
    values = []
    for limit in reversed(LIMITS):
        code, value = divmod(int(code), limit)
        values.append(value)
    op, act, *sizes = reversed(values)
    return Shape(OPS[op], ACTS[act], *sizes)


def code_of(shape: Shape) -> int:
    """The code of a shape; raises UserError for an operation or activation that no layer has."""
    for value, known in ((shape.op, OPS), (shape.act, ACTS)):
        if value not in known:
            raise UserError(f"{shape} has {value}; choose from {', '.join(known)}")
    return int(_pack(np.array([OPS.index(shape.op), ACTS.index(shape.act), *shape[2:]])))


def _pack(columns: NDArray[np.int64]) -> NDArray[np.int64]:
    if np.any(columns >= LIMITS):
        raise UserError(f"a layer is too large for the latency table; channels below {2**15}, sides below {2**12}")
    return np.ravel_multi_index(tuple(np.moveaxis(columns, -1, 0)), LIMITS)


def space_shapes(space: Space) -> list[Shape]:
    """Every shape that occurs in some network of the space."""
    codes = np.unique(shape_codes(layer_table(space, forms(space))))
    return [shape_of(code) for code in codes if code]
