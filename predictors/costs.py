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

INT8 = 8  # bits
CHANNEL_BYTES, LAYER_BYTES = 17, 10  # in an int8 ONNX file, besides a layer's weights


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
    """Bytes that all parameters take at `bits` each, rounded up: genes (N, G) to (N,) int64.

    quantized: as ONNX Runtime's static quantization by channels stores them, with batch norms folded: the weights at
    `bits` each, 17 bytes for each channel that a layer writes (int32 bias, float scales and zero points of both) and 10
    for each layer (scales and zero points of two activations; most layers have one or two).  Above 8 bits it changes
    nothing.
    """

    name, unit = "weight_bytes", "bytes"

    def __init__(self, space: Space, bits: int = 32, quantized: bool = False) -> None:
        check_bits(bits)
        self.bits, self.quantized = bits, quantized and bits <= INT8
        self._bits = Lookup(space, self._of_layers)

    def __call__(self, genes: Genes) -> NDArray[np.int64]:
        """Bytes of each architecture, (N,)."""
        return -(-self._bits(genes) // 8)

    def _of_layers(self, table: LayerTable) -> NDArray[np.int64]:
        """Bits of each layer, (N, L)."""
        if not self.quantized:
            return layer_params(table) * self.bits
        weights = layer_weights(table)
        return weights * self.bits + 8 * np.where(weights > 0, CHANNEL_BYTES * table.cout + LAYER_BYTES, 0)
