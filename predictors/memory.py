"""Peak activation memory of many architectures at once, under a named memory model.

N architectures, G genes, L layers.  For one image; in, out: elements of a layer's input and output, held: elements of
a block's input kept for its shortcut while the layer runs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes, Space
from ofa.table import LayerTable, layer_weights
from predictors.lookup import Lookup

Elements = NDArray[np.int64]


def mcunet(table: LayerTable) -> Elements:
    """in + out + held of each convolution (Lin et al. 2020, MCUNet).  Returns: (N, L) elements."""
    return _convolutions(table) * (_input(table) + _output(table) + table.held)


def inplace(table: LayerTable) -> Elements:
    """As `mcunet`, but a depthwise convolution overwrites its input and needs one channel more: in + out / cout + held.

    Lin et al. 2021, MCUNetV2 and TinyEngine.  Returns: (N, L) elements.
    """
    output = np.where(table.groups > 1, table.size_out**2, _output(table))
    return _convolutions(table) * (_input(table) + output + table.held)


def elements_plus_weights(table: LayerTable) -> Elements:
    """in + out + weights of each convolution with batch norm, and the block input at a shortcut block's depthwise one.

    The rule of memory-optimized once-for-all (MOOFA), elements of any width.  Returns: (N, L) elements.
    """
    _, starts, unit = np.unique(table.block, return_index=True, return_inverse=True)
    block_input = np.maximum.reduceat(table.held, starts, axis=1)[:, unit]
    held = np.where(table.groups > 1, block_input, 0)
    return _convolutions(table) * table.bn * (_input(table) + _output(table) + layer_weights(table) + held)


MODELS: dict[str, Callable[[LayerTable], Elements]] = {
    "mcunet": mcunet,
    "inplace": inplace,
    "elements_plus_weights": elements_plus_weights,
}


def peak_memory(table: LayerTable, *, model: str = "mcunet", bits: int = 8) -> NDArray[np.int64]:
    """Peak bytes of each network in a layer table at `bits` an element, rounded up.  Returns: (N,)."""
    return _bytes(_model(model)(table).max(axis=1), bits)


class PeakMemory:
    """Bytes of activations at the fullest moment of a forward pass: genes (N, G) to (N,) int64.

    model: "mcunet" (default), "inplace" or "elements_plus_weights", the functions above; bits: width of one element.
    With bits=8 the bytes are also the elements.
    """

    name, unit = "peak_memory_bytes", "bytes"

    def __init__(self, space: Space, model: str = "mcunet", bits: int = 8) -> None:
        self.model, self.bits = model, bits
        self._elements = Lookup(space, _model(model), np.maximum)

    def __call__(self, genes: Genes) -> NDArray[np.int64]:
        """Peak bytes of each architecture, (N,)."""
        return _bytes(self._elements(genes), self.bits)


def _model(name: str) -> Callable[[LayerTable], Elements]:
    if name not in MODELS:
        raise UserError(f"memory model {name!r} is not known; choose from {', '.join(MODELS)}")
    return MODELS[name]


def _bytes(elements: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    return -(-elements * bits // 8)


def _convolutions(table: LayerTable) -> NDArray[np.bool_]:
    return np.array([op == "conv" for op in table.op])


def _input(table: LayerTable) -> Elements:
    return table.cin * table.size_in**2


def _output(table: LayerTable) -> Elements:
    return table.cout * table.size_out**2
