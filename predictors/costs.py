"""Multiply-accumulates, parameters and weight bytes, exact, of many architectures at once.

N architectures, G genes, L layers.  All are for one image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes, Space
from ofa.table import LayerTable, layer_macs, layer_weights
from predictors.lookup import Lookup


def layer_params(table: LayerTable) -> NDArray[np.int64]:
    """Parameters of each layer with its bias and the weight and bias of its batch norm.  Returns: (N, L)."""
    biases = table.bias + 2 * table.bn.astype(np.int64)
    return layer_weights(table) + biases * table.cout


def check_bits(bits: int) -> None:
    """Raise UserError for a width that no number has."""
    if bits not in range(1, 65):
        raise UserError(f"bits {bits} must be 1 to 64, the width of one number; int8 is 8, float is 32")


class Macs:
    """Multiply-accumulates of one forward pass: genes (N, G) to (N,) int64."""

    name, unit = "macs", "MACs"

    def __init__(self, space: Space) -> None:
        self._lookup = Lookup(space, layer_macs)

    def __call__(self, genes: Genes) -> NDArray[np.int64]:
        """Exact count of each architecture, (N,)."""
        return self._lookup(genes)


class Params:
    """Parameters, batch norm's weight and bias among them, its statistics not: genes (N, G) to (N,) int64."""

    name, unit = "params", "parameters"

    def __init__(self, space: Space) -> None:
        self._lookup = Lookup(space, layer_params)

    def __call__(self, genes: Genes) -> NDArray[np.int64]:
        """Exact count of each architecture, (N,)."""
        return self._lookup(genes)


class WeightBytes:
    """Bytes that all parameters take at `bits` each, rounded up: genes (N, G) to (N,) int64."""

    name, unit = "weight_bytes", "bytes"

    def __init__(self, space: Space, bits: int = 32) -> None:
        check_bits(bits)
        self.bits = bits
        self._params = Params(space)

    def __call__(self, genes: Genes) -> NDArray[np.int64]:
        """Bytes of each architecture, (N,)."""
        return -(-self._params(genes) * self.bits // 8)
