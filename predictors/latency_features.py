"""What a network's latency depends on, whatever the device.  N architectures, S stages, F features."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ofa.space import DIMENSIONS, Genes, Space
from ofa.table import LayerTable, layer_inputs, layer_joins, layer_macs, layer_outputs, layer_weights
from predictors.lookup import LayerCost, Lookup

Float = NDArray[np.float64]


def layer_operations(table: LayerTable) -> NDArray[np.int64]:
    """Operations that a device starts one by one, (N, L): convolution, batch norm, activation, shortcut.

    Squeeze-excite adds its pool and its product.  At small batches a GPU spends its time on starting them.
    """
    acts = np.array([act != "none" for act in table.act])
    gates = np.array([name.endswith(".se.reduce") for name in table.names])
    return table.active * (1 + table.bn.astype(np.int64) + acts + 2 * gates + layer_joins(table))


def layer_traffic(table: LayerTable) -> NDArray[np.int64]:
    """Elements that each layer reads and writes, (N, L): its input and its output."""
    return layer_inputs(table) + layer_outputs(table)


def _depthwise(cost: LayerCost) -> LayerCost:
    return lambda table: cost(table) * (table.groups > 1)


class LatencyFeatures:
    """Costs of whole networks and of their stages, from genes (N, G).

    costs: what latency grows with on any device, operations, multiply-accumulates and memory traffic.
    """

    costs = ("operations", "macs", "traffic")

    def __init__(self, space: Space) -> None:
        self.space = space
        whole: list[LayerCost] = [layer_operations, layer_macs, layer_traffic]
        others: list[LayerCost] = [layer_weights, _depthwise(layer_macs), _depthwise(layer_traffic)]
        self._costs = [Lookup(space, cost) for cost in whole]
        self._others = [Lookup(space, cost) for cost in others]
        self._stages = [[Lookup(space, _of_stage(c, s)) for s in range(len(space.stages))] for c in whole[1:]]
        self.groups = self._groups()

    def log_costs(self, genes: Genes) -> Float:
        """Natural logarithms of `costs`, (N, 3)."""
        return np.log(np.stack([cost(genes) for cost in self._costs], axis=1).astype(np.float64))

    def __call__(self, genes: Genes) -> Float:
        """Features (N, F) in the groups `groups`: costs of the network and its stages, sums of the choices, and each.

        A device may take longer for one kernel or expand ratio than its costs tell.
        """
        others = np.log(np.maximum(np.stack([cost(genes) for cost in self._others], axis=1), 1).astype(np.float64))
        stages = [np.stack([cost(genes) for cost in costs], axis=1) for costs in self._stages]
        used, of = self.space.used(genes), np.eye(len(self.space.stages))[self.space.blocks[:, 0]]
        sums = [np.where(used, self.space.block_values(genes, name), 0) @ of for name in ("kernel", "expand")]
        image = np.log(self.space.values(genes, "resolution"))
        depth = self.space.depths(genes)
        choices = self.space.onehot(genes)
        return np.concatenate([self.log_costs(genes), others, image, depth, *stages, *sums, choices], axis=1)

    def _groups(self) -> tuple[slice, ...]:
        choices = [int(self.space.counts[self.space.columns(name)].sum()) for name in DIMENSIONS]
        ends = np.cumsum([0, 1, 2, 3, 1, *[len(self.space.stages)] * 5, *choices])
        return tuple(slice(int(a), int(b)) for a, b in pairwise(ends) if a < b)


def _of_stage(cost: LayerCost, stage: int) -> Callable[[LayerTable], NDArray[np.int64]]:
    def masked(table: LayerTable) -> NDArray[np.int64]:
        inside = np.array([name.startswith(f"stages.{stage}.") for name in table.names])
        return np.asarray(cost(table) * inside)

    return masked
