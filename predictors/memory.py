"""Peak activation memory of many architectures at once, under a named memory model.

N architectures, G genes, L layers.  For one image; in, out: elements of a layer's input and output, held: elements of
a block's input kept for its shortcut while the layer runs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ofa.blocks import BLOCKS
from ofa.blocks import Elements as UnitElements
from ofa.errors import UserError
from ofa.space import Genes, Space
from ofa.table import LayerTable, layer_inputs, layer_outputs, layer_weights
from predictors.costs import check_bits
from predictors.lookup import Lookup

Elements = NDArray[np.int64]


def mcunet(table: LayerTable) -> Elements:
    """in + out + held of each convolution (Lin et al. 2020, MCUNet) and max pool.  Returns: (N, L) elements."""
    return _windows(table) * (layer_inputs(table) + layer_outputs(table) + table.held)


def inplace(table: LayerTable) -> Elements:
    """As `mcunet`, but a depthwise convolution overwrites its input and needs one channel more: in + out / cout + held.

    Lin et al. 2021, MCUNetV2 and TinyEngine.  Returns: (N, L) elements.
    """
    output = np.where(table.groups > 1, table.size_out**2, layer_outputs(table))
    return _windows(table) * (layer_inputs(table) + output + table.held)


def elements_plus_weights(table: LayerTable) -> Elements:
    """in + out + weights of each convolution with batch norm, and the block input at a shortcut block's depthwise one.

    The rule of memory-optimized once-for-all (MOOFA), elements of any width.  Returns: (N, L) elements.
    """
    _, starts, unit = np.unique(table.block, return_index=True, return_inverse=True)
    block_input = np.maximum.reduceat(table.held, starts, axis=1)[:, unit]
    held = np.where(table.groups > 1, block_input, 0)
    return _convolutions(table) * table.bn * (layer_inputs(table) + layer_outputs(table) + layer_weights(table) + held)


def liveness(table: LayerTable) -> Elements:
    """All tensors alive at an operation of the plain network in PyTorch, at the fullest operation of each layer's unit.

    Every convolution, batch norm, activation, pool, product and sum makes a new tensor (nothing in place, nothing
    fused) and a tensor lives until the last operation that reads it; weights do not count.  x: input of the unit; h: x
    where a shortcut reads it again, else 0; m, r: middle channels and those of squeeze-excite; a, b: pixels before and
    after; y: output of the unit.  The fullest operation is the largest of
      conv        in + y;  2 y + h with batch norm, activation or shortcut
      mbconv      x + m a;  2 m a + h (batch norm of the expansion);  m a + m b + h (x for m a, no h without expansion);
                  2 m b + h;  2 m b + m + h, m b + m + max(m, r) + h (squeeze-excite);  m b + y + h;  2 y + h
      bottleneck  x + 2 m a;  x + m a + m b;  x + 2 m b;  x + m b + y;  x + 2 y;  3 y with a shortcut, otherwise
                  x + y + pooled x (stride above 1);  y + pooled x + y;  3 y
      maxpool     x + 3 y, since its indices are of 64 bits, which an element of 32 bits counts as 2
      others      x + y
    `ofa.liveness.peak_elements` records the same on a running network.  Returns: (N, L) elements.
    """
    units, peaks = table.units, []
    for u, kind in enumerate(units.kind):
        elements = UnitElements(units, u, table.unit_in[:, u], table.unit_out[:, u])
        fixed = elements.x + (3 if kind == "maxpool" else 1) * elements.y
        peaks.append(BLOCKS[kind].liveness(elements) if kind in BLOCKS else fixed)
    return np.stack(peaks, axis=1)[:, table.block] * table.active


MODELS: dict[str, Callable[[LayerTable], Elements]] = {
    "mcunet": mcunet,
    "inplace": inplace,
    "elements_plus_weights": elements_plus_weights,
    "liveness": liveness,
}


def peak_memory(table: LayerTable, *, model: str = "mcunet", bits: int = 8) -> NDArray[np.int64]:
    """Peak bytes of each network in a layer table at `bits` an element, rounded up.  Returns: (N,)."""
    return _bytes(_model(model)(table).max(axis=1), bits)


class PeakMemory:
    """Bytes of activations at the fullest moment of a forward pass: genes (N, G) to (N,) int64.

    model: "mcunet" (default), "inplace", "elements_plus_weights" or "liveness", the functions above; bits: width of one
    element.
    With bits=8 the bytes are also the elements.
    """

    name, unit = "peak_memory_bytes", "bytes"

    def __init__(self, space: Space, model: str = "mcunet", bits: int = 8) -> None:
        check_bits(bits)
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


def _windows(table: LayerTable) -> NDArray[np.bool_]:
    return np.array([op in ("conv", "maxpool") for op in table.op])


def _convolutions(table: LayerTable) -> NDArray[np.bool_]:
    return np.array([op == "conv" for op in table.op])
