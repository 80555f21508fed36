"""Exact costs of one plain network, pruned or not."""

from __future__ import annotations

from ofa.spec import NetSpec
from ofa.table import layer_macs, spec_table
from predictors.costs import check_bits, layer_params
from predictors.memory import peak_memory


def spec_costs(spec: NetSpec, *, bits: int = 32, model: str = "mcunet") -> dict[str, int]:
    """MACs, parameters, weight bytes and peak activation bytes of a network whose numbers have `bits` bits.

    `model` names the memory model, as in `PeakMemory`.
    """
    check_bits(bits)
    table = spec_table(spec)
    params = int(layer_params(table).sum())
    return {
        "macs": int(layer_macs(table).sum()),
        "params": params,
        "weight_bytes": -(-params * bits // 8),
        "peak_memory_bytes": int(peak_memory(table, model=model, bits=bits)[0]),
    }
