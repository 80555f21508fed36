"""What the bits of each layer's weights and inputs cost, for search: a space of bits, and sums over its layers.

N choices of bits for all layers, L layers, B choices for a layer's weights, A for its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes, Layer, Space, Stage

Floats = NDArray[np.float64]


def bits_space(layers: int, weight_choices: Sequence[int], input_choices: Sequence[int]) -> Space:
    """A space of one gene for each layer's weights, then one for each layer's inputs; every agent takes it.

    A gene is the position of its bits among the choices, and `Arch.op` holds these positions.
    """
    for name, choices in (("weight_choices", weight_choices), ("input_choices", input_choices)):
        if not choices or list(choices) != sorted(set(choices)):
            raise UserError(f"{name} {tuple(choices)} must be different bits in ascending order, such as 2, 4, 8")
    stages = tuple(
        Stage(1, depth=layers, op=tuple(range(len(choices))), ops=(Layer("skip"),) * len(choices))
        for choices in (weight_choices, input_choices)
    )
    return Space("bits", (1,), stages, stem=(), head=(), in_channels=1)


def chosen_bits(space: Space, genes: Genes, choices: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], ...]:
    """Bits of the weights, and of the inputs, of each layer: (N, L) each, from genes (N, G)."""
    picked = np.split(genes[:, space.columns("op")], 2, axis=1)
    return tuple(np.array(bits)[part] for bits, part in zip(choices, picked, strict=True))


class LayerSum:
    """A cost that is the sum over the layers of what each costs with its bits.

    table: (L, B, A), or (L, B, 1) and (L, 1, A) for what depends on one of them alone.
    """

    def __init__(self, name: str, unit: str, space: Space, table: Floats, constant: float = 0.0) -> None:
        self.name, self.unit, self.constant = name, unit, constant
        self._space, self._table = space, table

    def __call__(self, genes: Genes) -> Floats:
        """The cost of each choice of bits, (N,), for genes (N, G)."""
        weights, inputs = (part.astype(np.int64) for part in np.split(genes[:, self._space.columns("op")], 2, axis=1))
        layers, b, a = self._table.shape
        picked = self._table[np.arange(layers), weights * (b > 1), inputs * (a > 1)]
        return picked.sum(axis=1) + self.constant

    @property
    def least(self) -> float:
        """The least that any choice of bits costs."""
        return float(self._table.min(axis=(1, 2)).sum() + self.constant)
