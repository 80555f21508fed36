"""What the learned predictors see of an architecture.  N architectures, F features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.space import DIMENSIONS, Genes, Space
from predictors.costs import Macs, Params

Float = NDArray[np.float64]
SLOPES = {"depth": -4.0, "kernel": -4.0, "expand": -4.0, "log kernels": -2.0, "log expands": -2.0}


@dataclass(frozen=True, slots=True)
class Group:
    """Features that belong together: a name, their columns, and the logarithm of how much they matter on their own.

    slope: 0, or less where other groups hold the bulk of their effect, as the sums of a stage do for its blocks.
    """

    name: str
    columns: slice
    slope: float = 0.0


class Features:
    """One-hot genes with skipped blocks masked, and what they amount to, in logarithms.

    log MACs and parameters; log resolution and width; log sums of the kernels and of the expand ratios of each stage,
    and its depth; log kernel and expand ratio of each block, half the smallest choice where it is skipped.
    Masking and the sums tell a model that a skipped block does nothing; they are worth more than the choice of model.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._macs, self._params = Macs(space), Params(space)
        self.groups = self._groups()

    def __call__(self, genes: Genes) -> Float:
        """Genes (N, G) to features (N, F), grouped as in `groups`."""
        onehot = self.space.onehot(genes).astype(np.float64)
        parts = (self._counts(genes), *self._blocks(genes, "kernel"), *self._blocks(genes, "expand"))
        return np.concatenate([onehot, *parts, self.space.depths(genes)], axis=1)

    def _counts(self, genes: Genes) -> Float:
        """Log MACs, parameters, resolution and widths, (N, 3 + widths)."""
        sides = (self.space.values(genes, name) for name in ("resolution", "width"))
        return np.log(np.column_stack([self._macs(genes), self._params(genes), *sides]))

    def _blocks(self, genes: Genes, dimension: str) -> tuple[Float, Float]:
        """Log values of each block (N, B) and log sums of each stage (N, S)."""
        every = self.space.block_choices(dimension)
        smallest = np.array([min((choice for choice in choices if choice > 0), default=1) for choices in every]) / 2
        values = np.where(self.space.used(genes), self.space.block_values(genes, dimension), 0)
        sums = values @ np.eye(len(self.space.stages))[self.space.blocks[:, 0]]
        return np.log(np.where(values > 0, values, smallest)), np.log(np.maximum(sums, smallest.min()))

    def _groups(self) -> tuple[Group, ...]:
        stages, blocks = len(self.space.stages), len(self.space.blocks)
        sizes = {name: int(self.space.counts[self.space.columns(name)].sum()) for name in DIMENSIONS}
        sizes |= {"log MACs": 1, "log params": 1, "log resolution": 1, "log widths": self.space.widths}
        sizes |= {"log kernels": blocks, "log kernel sums": stages, "log expands": blocks, "log expand sums": stages}
        ends = np.cumsum([0, *sizes.values(), stages])
        return tuple(
            Group(name, slice(int(a), int(b)), SLOPES.get(name, 0.0))
            for name, a, b in zip([*sizes, "depths"], ends, ends[1:], strict=False)
            if a < b
        )


class OneHot:
    """One-hot genes with skipped blocks masked, as once-for-all's network sees them: float32, and quick."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.groups = (Group("genes", slice(0, int(space.counts.sum()))),)

    def __call__(self, genes: Genes) -> NDArray[Any]:
        """Genes (N, G) to features (N, F), float32."""
        return self.space.onehot(genes)
