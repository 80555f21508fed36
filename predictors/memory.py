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
      others      x + y
    `ofa.liveness.peak_elements` records the same on a running network.  Returns: (N, L) elements.
    """
    units = table.units
    peaks = [UNIT_LIVENESS[kind](_Places(table, u)) for u, kind in enumerate(units.kind)]
    return np.stack(peaks, axis=1)[:, table.block] * table.active


class _Places:
    """Elements of the tensors that a unit works on, (N,) each."""

    def __init__(self, table: LayerTable, u: int) -> None:
        units = table.units
        before, after = table.unit_in[:, u] ** 2, table.unit_out[:, u] ** 2
        self.x, self.y = units.cin[:, u] * before, units.cout[:, u] * after
        self.h = self.x * bool(units.shortcut[u])
        self.pooled = units.cin[:, u] * after
        self.m, self.r = units.mid[:, u], units.se[:, u]
        self.ma, self.mb = self.m * before, self.m * after
        self.expand, self.shortcut = bool(units.expand[u]), bool(units.shortcut[u])
        self.stride = int(units.stride[u])
        self.plain = not units.bn[u] and units.act[u] == "none" and not self.shortcut


def _largest(*elements: Elements) -> Elements:
    return np.max(np.stack(elements), axis=0)


def _conv_liveness(p: _Places) -> Elements:
    return p.x + p.y if p.plain else _largest(p.x + p.y, 2 * p.y + p.h)


def _mbconv_liveness(p: _Places) -> Elements:
    expand = [p.x + p.ma, 2 * p.ma + p.h] if p.expand else []
    depthwise = [p.ma + p.mb + p.h * p.expand, 2 * p.mb + p.h]
    gate = [_largest(2 * p.mb + p.m, p.mb + p.m + _largest(p.m, p.r)) + p.h] * bool(p.r.any())
    gate = [np.where(p.r > 0, peak, 0) for peak in gate]
    return _largest(*expand, *depthwise, *gate, p.mb + p.y + p.h, 2 * p.y + p.h)


def _bottleneck_liveness(p: _Places) -> Elements:
    path = [p.x + 2 * p.ma, p.x + p.ma + p.mb, p.x + 2 * p.mb, p.x + p.mb + p.y, p.x + 2 * p.y]
    pool = [p.x + p.y + p.pooled] if p.stride > 1 else []
    shortcut = [] if p.shortcut else [*pool, p.pooled + 2 * p.y]
    return _largest(*path, *shortcut, 3 * p.y)


UNIT_LIVENESS: dict[str, Callable[[_Places], Elements]] = {
    "conv": _conv_liveness,
    "mbconv": _mbconv_liveness,
    "bottleneck": _bottleneck_liveness,
    "maxpool": lambda p: p.x + p.y,
    "pool": lambda p: p.x + p.y,
    "linear": lambda p: p.x + p.y,
}


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
