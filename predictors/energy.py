"""Energy of one inference, an estimate from multiply-accumulates and memory traffic.  N architectures, L layers.

Energies of operations are those published by Horowitz 2014 ("Computing's energy problem", ISSCC, figure 1.1.9; 45 nm,
0.9 V): multiply 0.2 / 1.1 / 3.7 pJ and add 0.1 / 0.4 / 0.9 pJ for int8 into int32 / fp16 / fp32; 64 bits from a 1 MB
SRAM 100 pJ, from DRAM 1.3 nJ (the lower end of the 1.3 to 2.6 nJ given).  A real chip differs by its process, caches
and control, so these figures rank networks; they do not replace a measurement.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes, Space
from ofa.spec import NetSpec
from ofa.table import POOLS, LayerTable, layer_inputs, layer_joins, layer_macs, layer_outputs, spec_table
from predictors.costs import layer_params
from predictors.lookup import Lookup

Float = NDArray[np.float64]
MAC_PJ = {8: 0.2 + 0.1, 16: 1.1 + 0.4, 32: 3.7 + 0.9}  # multiply + add, by bits of the numbers
BYTE_PJ = {"sram": 100 / 8, "dram": 1300 / 8}


def layer_picojoules(table: LayerTable, *, bits: int = 8, activations: str = "sram", weights: str = "dram") -> Float:
    """Picojoules of each layer: its MACs, its input and output, its parameters, each moved once; skipped ones give 0.

    A shortcut is read once more, with the last layer of its block.  Activation functions, pooling and the product of
    squeeze-excite count as fused.  bits: 8 (int8), 16 (fp16) or 32 (fp32) of a number.  activations, weights: the
    memory that they are in, "sram" or "dram".  Returns: (N, L).
    """
    if bits not in MAC_PJ:
        raise UserError(f"bits {bits} has no published energy; choose from {', '.join(map(str, MAC_PJ))}")
    moved = _elements(table) * _byte_pj("activations", activations) + layer_params(table) * _byte_pj("weights", weights)
    return np.asarray(layer_macs(table) * MAC_PJ[bits] + moved * (bits / 8))


class Energy:
    """Microjoules of one inference, an estimate: genes (N, G) to (N,) float64.

    bits, activations, weights: as in `layer_picojoules`.
    """

    name, unit = "energy_uj", "µJ"

    def __init__(self, space: Space, bits: int = 8, activations: str = "sram", weights: str = "dram") -> None:
        self._lookup = Lookup(space, partial(layer_picojoules, bits=bits, activations=activations, weights=weights))

    def __call__(self, genes: Genes) -> Float:
        """Microjoules of each architecture, (N,)."""
        return np.asarray(self._lookup(genes) / 1e6)


def spec_energy(spec: NetSpec, *, bits: int = 8, activations: str = "sram", weights: str = "dram") -> float:
    """Microjoules of one inference of one plain network."""
    table = spec_table(spec)
    return float(layer_picojoules(table, bits=bits, activations=activations, weights=weights).sum() / 1e6)


def _elements(table: LayerTable) -> NDArray[np.int64]:
    """Elements that a layer reads and writes, (N, L)."""
    read = layer_inputs(table)
    again = np.where(table.held > 0, table.held, read)  # a block of one layer holds nothing besides that layer's input
    moved = read + layer_outputs(table) + np.where(layer_joins(table), again, 0)
    return moved * ~np.isin(table.op, POOLS)


def _byte_pj(what: str, memory: str) -> float:
    if memory not in BYTE_PJ:
        raise UserError(f"{what}={memory} is no memory with a published energy; choose from {', '.join(BYTE_PJ)}")
    return BYTE_PJ[memory]
